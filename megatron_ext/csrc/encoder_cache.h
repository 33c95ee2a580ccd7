// Memory of a worker: arrays that grow, and results of segments met before.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

namespace encoder {

// A growing array without initialisation.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept : data_(other.data_), size_(other.size_), capacity_(other.capacity_) {
    other.data_ = nullptr;
    other.size_ = other.capacity_ = 0;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return size_; }
  void clear() { size_ = 0; }
  void resize(size_t size) { reserve(size), size_ = size; }
  void push(T value) { data_[size_++] = value; }  // the caller has reserved space

  void reserve(size_t size) {
    if (size <= capacity_) return;
    const size_t capacity = std::max(size, capacity_ + capacity_ / 2);
    T* data = static_cast<T*>(std::realloc(data_, std::max<size_t>(capacity, 1) * sizeof(T)));
    if (data == nullptr) throw std::bad_alloc();
    data_ = data;
    capacity_ = capacity;
  }
  T* release() {
    T* data = data_;
    data_ = nullptr;
    size_ = capacity_ = 0;
    return data;
  }

 private:
  T* data_ = nullptr;
  size_t size_ = 0, capacity_ = 0;
};

// A cache of segments' results: fixed size, two slots per hash value, of which the one used longest ago is overwritten.
template <uint32_t kWords, uint32_t kIds, uint32_t kBits>
class SegmentCache {
 public:
  static constexpr uint32_t kMaxBytes = 8 * kWords, kMaxIds = kIds;

  using Key = std::array<uint64_t, kWords>;
  struct Entry {
    Key key;
    uint32_t ids[kIds];
    uint16_t bytes;  // 0: empty
    uint16_t count;
  };

  SegmentCache() : sets_(size_t{1} << kBits, Set{}) {}

  // The bytes of a segment, zeros behind them; kMaxBytes must be readable at `at`.
  static Key key_of(const uint8_t* at, uint32_t bytes) {
    Key key, mask;
    std::memcpy(key.data(), at, kMaxBytes);
    std::memcpy(mask.data(), kMask.data() + kMaxBytes - bytes, kMaxBytes);
    for (uint32_t i = 0; i < kWords; ++i) key[i] &= mask[i];
    return key;
  }
  static uint32_t slot_of(const Key& key, uint32_t bytes) {
    uint64_t mixed = key[0];
    for (uint32_t i = 1; i < kWords; ++i) mixed ^= (key[i] + bytes) * (0xD6E8FEB86659FD93u + 2 * i);
    mixed *= 0x9E3779B97F4A7C15u;
    return static_cast<uint32_t>((mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9u >> (64 - kBits));
  }

  void clear() { std::fill(sets_.begin(), sets_.end(), Set{}); }
  void prefetch(uint32_t slot) const { __builtin_prefetch(&sets_[slot]); }

  // nullptr if the segment is not in the cache. What is found moves to the front, where frequent segments stay: the
  // branch can then be predicted.
  const Entry* find(const Key& key, uint32_t bytes, uint32_t slot) {
    Entry* ways = sets_[slot].ways;
    if (is(ways[0], key, bytes)) return ways;
    if (!is(ways[1], key, bytes)) return nullptr;
    std::swap(ways[0], ways[1]);
    return ways;
  }

  // Does nothing if there are too many ids.
  void put(const Key& key, uint32_t bytes, uint32_t slot, const uint32_t* ids, size_t count) {
    if (count > kIds) return;
    Set& set = sets_[slot];
    set.ways[1] = set.ways[0];
    Entry& entry = set.ways[0];
    entry.key = key;
    entry.bytes = static_cast<uint16_t>(bytes);
    entry.count = static_cast<uint16_t>(count);
    std::memcpy(entry.ids, ids, count * sizeof(uint32_t));
  }

 private:
  struct alignas(64) Set {
    Entry ways[2];
  };

  static bool is(const Entry& entry, const Key& key, uint32_t bytes) {
    uint64_t differs = entry.bytes ^ bytes;
    for (uint32_t i = 0; i < kWords; ++i) differs |= entry.key[i] ^ key[i];
    return differs == 0;
  }

  // Bytes of ones, then as many zeros: n ones and zeros begin at kMaxBytes - n.
  static constexpr std::array<uint8_t, 2 * kMaxBytes> make_mask() {
    std::array<uint8_t, 2 * kMaxBytes> mask{};
    for (uint32_t i = 0; i < kMaxBytes; ++i) mask[i] = 0xFF;
    return mask;
  }
  alignas(64) static constexpr std::array<uint8_t, 2 * kMaxBytes> kMask = make_mask();

  std::vector<Set> sets_;
};

using WordCache = SegmentCache<2, 3, 16>;    // entries of 32 bytes, 4 MiB
using PhraseCache = SegmentCache<5, 5, 12>;  // entries of 64 bytes, half a MiB

}  // namespace encoder
