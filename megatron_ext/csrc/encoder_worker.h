// Encodes documents, one at a time; each thread has its own worker.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <vector>

#include "encoder_tables.h"

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

// A cache of segments' results: fixed size, two slots per hash value, the older one is overwritten.
template <uint32_t kWords, uint32_t kMaxIds, uint32_t kBits>
class SegmentCache {
 public:
  static constexpr uint32_t kMaxBytes = 8 * kWords;

  using Key = std::array<uint64_t, kWords>;
  struct alignas(32) Entry {
    Key key;
    uint16_t bytes;  // 0: empty
    uint16_t count;
    uint32_t ids[kMaxIds];
  };

  SegmentCache() : entries_(size_t{2} << kBits, Entry{}) {}

  // The bytes of a segment; kMaxBytes must be readable at `at`.
  static Key key_of(const uint8_t* at, uint32_t bytes) {
    Key key;
    std::memcpy(key.data(), at, kMaxBytes);
    for (uint32_t i = 0; i < kWords; ++i) {
      if (bytes < 8 * (i + 1)) key[i] &= bytes > 8 * i ? ~uint64_t{0} >> (64 * (i + 1) - 8 * bytes) : 0;
    }
    return key;
  }
  static uint32_t slot_of(const Key& key, uint32_t bytes) {
    uint64_t mixed = key[0];
    for (uint32_t i = 1; i < kWords; ++i) mixed ^= (key[i] + bytes) * (0xD6E8FEB86659FD93u + 2 * i);
    mixed *= 0x9E3779B97F4A7C15u;
    return static_cast<uint32_t>((mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9u >> (64 - kBits));
  }

  void clear() { std::fill(entries_.begin(), entries_.end(), Entry{}); }
  const Entry* place(uint32_t slot) const { return &entries_[size_t{2} * slot]; }

  // nullptr if the segment is not in the cache.
  const Entry* find(const Key& key, uint32_t bytes, uint32_t slot) const {
    const Entry* entry = place(slot);
    for (uint32_t way = 0; way < 2; ++way, ++entry) {
      uint64_t differs = entry->bytes ^ bytes;
      for (uint32_t i = 0; i < kWords; ++i) differs |= entry->key[i] ^ key[i];
      if (differs == 0) return entry;
    }
    return nullptr;
  }

  // Does nothing if there are too many ids.
  void put(const Key& key, uint32_t bytes, uint32_t slot, const uint32_t* ids, size_t count) {
    if (count > kMaxIds) return;
    Entry* entry = &entries_[size_t{2} * slot];
    entry[1] = entry[0];
    entry->key = key;
    entry->bytes = static_cast<uint16_t>(bytes);
    entry->count = static_cast<uint16_t>(count);
    std::memcpy(entry->ids, ids, count * sizeof(uint32_t));
  }

 private:
  std::vector<Entry> entries_;
};

using WordCache = SegmentCache<2, 3, 16>;    // entries of 32 bytes, 4 MiB
using PhraseCache = SegmentCache<5, 5, 12>;  // entries of 64 bytes, half a MiB

class Worker {
 public:
  explicit Worker(const Tables& tables) : t_(tables), merger_(tables.pairs, tables.rank) {}

  // Ids of one document; they stay valid until the next call. `text` must be valid UTF-8.
  const Buffer<uint32_t>& encode(std::string_view text) {
    out_.clear();
    if (text.empty()) return out_;
    prepare(text);
    scan();
    return out_;
  }

  // Empties the caches.
  void forget() {
    words_.clear();
    phrases_.clear();
  }

 private:
  static constexpr size_t kPadding = 64;
  static constexpr size_t kQueue = 64;

  // A run of characters that merges independently. One or two characters are looked up in tables, longer runs in the
  // cache.
  struct Segment {
    const uint8_t* at;
    uint32_t bytes;
    uint32_t chars;  // 1, 2 or 3 for more
    union {
      uint32_t codes[2];  // of one or two characters
      WordCache::Key key;
    };
    uint32_t slot;
  };

  // Copies the normalized text and appends zeros.
  void prepare(std::string_view text) {
    text_.clear();
    text_.reserve(text.size() + 1 + kPadding);
    if (t_.remove_extra_whitespaces) {
      collapse(text);
    } else {
      if (t_.add_dummy_prefix) text_.push(' ');
      std::memcpy(text_.data() + text_.size(), text.data(), text.size());
      text_.resize(text_.size() + text.size());
    }
    std::memset(text_.data() + text_.size(), 0, kPadding);
  }

  void collapse(std::string_view text) {
    size_t at = text.find_first_not_of(' ');
    if (at == std::string_view::npos) return;
    if (t_.add_dummy_prefix) text_.push(' ');
    for (; at < text.size(); ++at) {
      if (text[at] != ' ' || text[at - 1] != ' ') text_.push(static_cast<uint8_t>(text[at]));
    }
    while (size_t size = trailing_blank()) text_.resize(text_.size() - size);
  }

  // Length in bytes of a blank at the end; if blanks are escaped, a literal U+2581 counts as one.
  size_t trailing_blank() const {
    const size_t size = text_.size();
    if (size >= 1 && text_.data()[size - 1] == ' ') return 1;
    if (t_.blank != kVisibleBlank || size < 3) return 0;
    return std::memcmp(text_.data() + size - 3, "\xE2\x96\x81", 3) == 0 ? 3 : 0;
  }

  // Cuts the text between characters that no piece joins, and at user-defined symbols.
  void scan() {
    const uint8_t* at = text_.data();
    const uint8_t* const end = at + text_.size();
    int32_t id;
    while (at < end) {
      const size_t size = t_.user_first[*at] ? t_.user.match(at, end, t_.blank, &id) : 0;
      if (size > 0) {
        resolve_queue();
        out_.reserve(out_.size() + 1);
        out_.push(static_cast<uint32_t>(id));
        at += size;
      } else {
        at = take_segment(at, end);
      }
    }
    resolve_queue();
  }

  // Queues the segment that starts at `at` and returns its end.
  const uint8_t* take_segment(const uint8_t* at, const uint8_t* end) {
    Segment& segment = queue_[queued_];
    segment.at = at;
    Char last = decode_char(at);
    last.code = t_.code_of(last.code);
    segment.codes[0] = last.code;
    segment.chars = 1;
    at += last.size;
    while (true) {
      if (last.size == 1) {
        const uint8_t* begin = --at;
        uint8_t join;
        while ((join = t_.ascii_join[static_cast<size_t>(at[0]) << 8 | at[1]]) == 1) ++at;
        if (at != begin) note(segment, t_.code_of(*at), static_cast<size_t>(at - begin));
        last.code = t_.code_of(*at++);
        if (join == 0 || ((join & 1) == 0 && *at < 128)) break;
      }
      if (at >= end || user_matches(at, end)) break;
      last.size = decode_char(at).size;
      const uint32_t code = t_.code_of(decode_char(at).code);
      if (!t_.joins(last.code, code)) break;
      note(segment, code, 1);
      last.code = code;
      at += last.size;
    }
    enqueue(segment, static_cast<size_t>(at - segment.at));
    return at;
  }

  // `more` characters were added to the segment, the last of them `code`.
  static void note(Segment& segment, uint32_t code, size_t more) {
    segment.codes[1] = code;
    segment.chars = segment.chars + more > 2 ? 3 : 2;
  }

  bool user_matches(const uint8_t* at, const uint8_t* end) const {
    int32_t id;
    return t_.user_first[*at] && t_.user.match(at, end, t_.blank, &id) > 0;
  }

  void enqueue(Segment& segment, size_t bytes) {
    segment.bytes = static_cast<uint32_t>(bytes);
    if (segment.chars > 2 && bytes <= WordCache::kMaxBytes) {
      segment.key = WordCache::key_of(segment.at, segment.bytes);
      segment.slot = WordCache::slot_of(segment.key, segment.bytes);
      __builtin_prefetch(words_.place(segment.slot));
    }
    if (++queued_ == kQueue) resolve_queue();
  }

  void resolve_queue() {
    size_t bytes = 0;
    for (size_t i = 0; i < queued_; ++i) bytes += queue_[i].bytes;
    out_.reserve(out_.size() + 3 * bytes);  // a blank without a piece becomes the three bytes of U+2581
    for (size_t i = 0; i < queued_; ++i) resolve(queue_[i]);
    queued_ = 0;
  }

  void resolve(const Segment& segment) {
    if (segment.chars <= 2) {
      resolve_chars(segment);
    } else if (segment.bytes <= WordCache::kMaxBytes) {
      look_up(segment, words_, segment.key, segment.slot);
    } else if (segment.bytes <= PhraseCache::kMaxBytes) {
      const PhraseCache::Key key = PhraseCache::key_of(segment.at, segment.bytes);
      look_up(segment, phrases_, key, PhraseCache::slot_of(key, segment.bytes));
    } else {
      merge(segment);
    }
  }

  template <typename Cache>
  void look_up(const Segment& segment, Cache& cache, const typename Cache::Key& key, uint32_t slot) {
    if (const auto* entry = cache.find(key, segment.bytes, slot)) return emit_cached(*entry);
    const size_t begin = merge(segment);
    cache.put(key, segment.bytes, slot, out_.data() + begin, out_.size() - begin);
  }

  void resolve_chars(const Segment& segment) {
    const Tables::CharEntry first = t_.chars[segment.codes[0]];
    if (segment.chars == 2) {
      const Tables::CharEntry second = t_.chars[segment.codes[1]];
      const uint32_t merged = t_.pairs.find(first.node, second.node);
      if (merged != kNone) return emit(static_cast<uint32_t>(t_.node_id[merged]));
      emit_char(first, segment.codes[0]);
      return emit_char(second, segment.codes[1]);
    }
    emit_char(first, segment.codes[0]);
  }

  void emit_char(Tables::CharEntry entry, uint32_t code) {
    entry.id >= 0 ? emit(static_cast<uint32_t>(entry.id)) : emit_unknown(code);
  }

  void emit(uint32_t id) { out_.push(id); }

  // A run of unknown characters gives one id.
  void emit_unknown_id() {
    const uint32_t id = static_cast<uint32_t>(t_.unknown_id);
    if (out_.size() == 0 || out_.data()[out_.size() - 1] != id) emit(id);
  }

  void emit_unknown(uint32_t code) {
    if (!t_.byte_fallback) return emit_unknown_id();
    uint8_t bytes[4];
    const uint32_t size = encode_char(code, bytes);
    for (uint32_t i = 0; i < size; ++i) emit(static_cast<uint32_t>(t_.byte_ids[bytes[i]]));
  }

  template <typename Entry>
  void emit_cached(const Entry& entry) {
    uint32_t* to = out_.data() + out_.size();
    const bool after_unknown = !t_.byte_fallback && entry.ids[0] == static_cast<uint32_t>(t_.unknown_id) &&
                               out_.size() > 0 && to[-1] == entry.ids[0];
    to -= after_unknown;
    std::memcpy(to, entry.ids, sizeof(entry.ids));
    out_.resize(static_cast<size_t>(to - out_.data()) + entry.count);
  }

  // Merges a segment and appends its ids; returns the position of the first, even if a preceding unknown has absorbed
  // it.
  size_t merge(const Segment& segment) {
    nodes_.clear();
    starts_.clear();
    for (uint32_t offset = 0; offset < segment.bytes;) {
      const Char c = decode_char(segment.at + offset);
      nodes_.push_back(t_.chars[c.code].node);
      starts_.push_back(offset);
      offset += c.size;
    }
    const size_t count = merger_.run(nodes_.data(), starts_.data(), nodes_.size());
    const int32_t first = t_.node_id[nodes_[0]];
    const size_t begin = out_.size();
    for (size_t i = 0; i < count; ++i) {
      const int32_t id = t_.node_id[nodes_[i]];
      id >= 0 ? emit(static_cast<uint32_t>(id)) : emit_unknown(t_.code_of(decode_char(segment.at + starts_[i]).code));
    }
    const bool swallowed = first < 0 && !t_.byte_fallback && begin > 0 &&
                           out_.data()[begin - 1] == static_cast<uint32_t>(t_.unknown_id);
    return begin - swallowed;
  }

  const Tables& t_;
  Merger merger_;
  WordCache words_;
  PhraseCache phrases_;
  Buffer<uint8_t> text_;
  Buffer<uint32_t> out_;
  Segment queue_[kQueue];
  size_t queued_ = 0;
  std::vector<uint32_t> nodes_, starts_;
};

}  // namespace encoder
