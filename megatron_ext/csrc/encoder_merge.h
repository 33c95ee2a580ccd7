// The greedy merge of byte-pair encoding over numbered symbols ("nodes").
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

namespace encoder {

constexpr uint32_t kNone = 0xFFFFFFFFu;
// A node number occupies 20 bits of a pair table entry.
constexpr uint32_t kMaxNodes = (1u << 20) - 1;

// (left, right) -> merged node. Open addressing with 8 bytes per entry, behind a filter that fits into the L2 cache:
// most pairs that are looked up are not in the table.
class PairTable {
 public:
  explicit PairTable(size_t expected = 0) {
    while ((size_t{1} << bits_) < expected * 2 + 16) ++bits_;
    entries_.assign(size_t{1} << bits_, 0);
    filter_.assign((size_t{1} << kFilterBits) / 64, 0);
  }

  void insert(uint32_t left, uint32_t right, uint32_t merged) {
    const uint64_t key = key_of(left, right);
    const uint64_t bit = filter_bit(key);
    filter_[bit >> 6] |= uint64_t{1} << (bit & 63);
    size_t at = slot(key);
    while (entries_[at] != 0 && entries_[at] >> 20 != key) at = (at + 1) & (entries_.size() - 1);
    entries_[at] = key << 20 | merged;
  }

  uint32_t find(uint32_t left, uint32_t right) const {
    const uint64_t key = key_of(left, right);
    const uint64_t bit = filter_bit(key);
    if ((filter_[bit >> 6] >> (bit & 63) & 1) == 0) return kNone;
    for (size_t at = slot(key);; at = (at + 1) & (entries_.size() - 1)) {
      const uint64_t entry = entries_[at];
      if (entry >> 20 == key) return static_cast<uint32_t>(entry) & kMaxNodes;
      if (entry == 0) return kNone;
    }
  }

 private:
  // The top bit distinguishes an entry of nodes 0, 0, 0 from an empty one.
  static uint64_t key_of(uint32_t left, uint32_t right) {
    return uint64_t{1} << 43 | static_cast<uint64_t>(left) << 20 | right;
  }
  size_t slot(uint64_t key) const { return key * 0x9E3779B97F4A7C15u >> (64 - bits_); }

  static constexpr uint32_t kFilterBits = 20;
  static size_t filter_bit(uint64_t key) { return key * 0x9E3779B97F4A7C15u >> (64 - kFilterBits); }

  uint32_t bits_ = 4;
  std::vector<uint64_t> filter_;
  std::vector<uint64_t> entries_;
};

// Merges a run of symbols: repeatedly the adjacent pair in the table with the lowest rank, the leftmost among equal
// ranks, until there is none. Keeps its work space between calls.
class Merger {
 public:
  // rank[node]: rank of the node's score, 0 is the highest; equal scores share a rank.
  Merger(const PairTable& pairs, const std::vector<uint32_t>& rank) : pairs_(pairs), rank_(rank) {}

  // nodes[count] and starts[count] (offset of each symbol in its text) are overwritten by the result; returns how
  // many symbols are left.
  size_t run(uint32_t* nodes, uint32_t* starts, size_t count) {
    return count <= kShort ? run_short(nodes, starts, count) : run_long(nodes, starts, count);
  }

  // The last pair merged by run(): the derivation of its result if that is a single symbol.
  std::pair<uint32_t, uint32_t> last_pair() const { return last_; }

 private:
  static constexpr size_t kShort = 48;

  uint32_t rank_of(uint32_t merged) const { return merged == kNone ? kNone : rank_[merged]; }

  // Linear search for the best pair: fastest for words.
  size_t run_short(uint32_t* nodes, uint32_t* starts, size_t count) {
    uint32_t merged[kShort], rank[kShort];
    for (size_t i = 0; i + 1 < count; ++i) {
      merged[i] = pairs_.find(nodes[i], nodes[i + 1]);
      rank[i] = rank_of(merged[i]);
    }
    while (count > 1) {
      size_t best = 0;
      for (size_t i = 1; i + 1 < count; ++i) best = rank[i] < rank[best] ? i : best;
      if (rank[best] == kNone) break;
      last_ = {nodes[best], nodes[best + 1]};
      nodes[best] = merged[best];
      --count;
      for (size_t i = best + 1; i < count; ++i) {
        nodes[i] = nodes[i + 1];
        starts[i] = starts[i + 1];
        merged[i - 1] = merged[i];
        rank[i - 1] = rank[i];
      }
      if (best > 0) update(nodes, merged, rank, best - 1);
      if (best + 1 < count) update(nodes, merged, rank, best);
    }
    return count;
  }

  void update(const uint32_t* nodes, uint32_t* merged, uint32_t* rank, size_t at) const {
    merged[at] = pairs_.find(nodes[at], nodes[at + 1]);
    rank[at] = rank_of(merged[at]);
  }

  // Linked list and heap: O(n log n). A heap entry is stale if the rank of its pair has changed.
  size_t run_long(uint32_t* nodes, uint32_t* starts, size_t count) {
    links_.resize(count);
    heap_.clear();
    for (size_t i = 0; i < count; ++i) {
      links_[i] = {i > 0 ? static_cast<uint32_t>(i - 1) : kNone, i + 1 < count ? static_cast<uint32_t>(i + 1) : kNone,
                   kNone, kNone};
      if (i > 0) look_up(nodes, static_cast<uint32_t>(i - 1), static_cast<uint32_t>(i));
    }
    std::make_heap(heap_.begin(), heap_.end(), std::greater<>());
    while (!heap_.empty()) {
      std::pop_heap(heap_.begin(), heap_.end(), std::greater<>());
      const uint64_t top = heap_.back();
      heap_.pop_back();
      const uint32_t at = static_cast<uint32_t>(top);
      if (links_[at].rank != static_cast<uint32_t>(top >> 32)) continue;
      merge_at(nodes, at);
    }
    size_t kept = 0;
    for (uint32_t i = 0; i != kNone; i = links_[i].next, ++kept) {
      nodes[kept] = nodes[i];
      starts[kept] = starts[i];
    }
    return kept;
  }

  void merge_at(uint32_t* nodes, uint32_t at) {
    Link& link = links_[at];
    Link& gone = links_[link.next];
    last_ = {nodes[at], nodes[link.next]};
    nodes[at] = link.merged;
    gone.rank = kNone;
    link.rank = kNone;
    link.next = gone.next;
    if (link.next != kNone) {
      links_[link.next].prev = at;
      push(nodes, at, link.next);
    }
    if (link.prev != kNone) push(nodes, link.prev, at);
  }

  // Updates the pair (left, right); true if it is in the table.
  bool look_up(const uint32_t* nodes, uint32_t left, uint32_t right) {
    Link& link = links_[left];
    link.merged = pairs_.find(nodes[left], nodes[right]);
    link.rank = rank_of(link.merged);
    if (link.rank == kNone) return false;
    heap_.push_back(static_cast<uint64_t>(link.rank) << 32 | left);
    return true;
  }

  void push(const uint32_t* nodes, uint32_t left, uint32_t right) {
    if (look_up(nodes, left, right)) std::push_heap(heap_.begin(), heap_.end(), std::greater<>());
  }

  struct Link {
    uint32_t prev, next;
    uint32_t merged, rank;  // of the pair (this, next); kNone if it is not in the table
  };

  const PairTable& pairs_;
  const std::vector<uint32_t>& rank_;
  std::pair<uint32_t, uint32_t> last_{kNone, kNone};
  std::vector<Link> links_;
  std::vector<uint64_t> heap_;
};

}  // namespace encoder
