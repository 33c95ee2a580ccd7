// User-defined symbols: taken out of the text before anything is merged.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "encoder_utf8.h"

namespace encoder {

// Longest match among the user-defined symbols.
class UserSymbols {
 public:
  bool empty() const { return firsts_.empty(); }
  // The first code points of symbols.
  const std::unordered_set<uint32_t>& firsts() const { return firsts_; }

  void add(const std::vector<uint32_t>& codes, int32_t id) {
    uint32_t state = 0;
    firsts_.insert(codes[0]);
    for (uint32_t code : codes) {
      const auto found = next_.try_emplace(key(state, code), static_cast<uint32_t>(ids_.size()));
      if (found.second) ids_.push_back(-1);
      state = found.first->second;
    }
    ids_[state] = id;
  }

  // Length in bytes of the longest symbol at `at`, 0 if there is none; a blank in the text is read as `blank`.
  size_t match(const uint8_t* at, const uint8_t* end, uint32_t blank, int32_t* id) const {
    uint32_t state = 0;
    size_t size = 0;
    for (const uint8_t* start = at; at < end;) {
      const Char c = decode_char(at);
      const auto found = next_.find(key(state, c.code == ' ' ? blank : c.code));
      if (found == next_.end()) break;
      state = found->second;
      at += c.size;
      if (ids_[state] >= 0) {
        size = static_cast<size_t>(at - start);
        *id = ids_[state];
      }
    }
    return size;
  }

 private:
  static uint64_t key(uint32_t state, uint32_t code) { return static_cast<uint64_t>(state) << 32 | code; }

  std::unordered_set<uint32_t> firsts_;
  std::unordered_map<uint64_t, uint32_t> next_;
  std::vector<int32_t> ids_{-1};
};

}  // namespace encoder
