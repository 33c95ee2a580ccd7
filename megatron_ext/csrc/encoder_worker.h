// Encodes documents, one at a time; each thread has its own worker.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <string_view>

#include "encoder_cache.h"
#include "encoder_tables.h"

namespace encoder {

class Worker {
 public:
  explicit Worker(const Tables& tables) : t_(tables), merger_(tables.pairs, tables.rank) { forget(); }

  // Appends the ids of a document to `out`. `text` must be valid UTF-8.
  void encode(std::string_view text, Buffer<uint32_t>& out) {
    if (text.empty()) return;
    const size_t begin = out.size();
    out_ = &out;
    prepare(text);
    scan();
    if (!t_.byte_fallback) join_unknown(begin);
  }

  // Empties the caches but for the pieces that they know from the start.
  void forget() {
    words_.clear();
    phrases_.clear();
    for (const Tables::Word& word : t_.words) {
      const WordCache::Key key = WordCache::key_of(word.text.data(), word.bytes);
      words_.put(key, word.bytes, WordCache::slot_of(key, word.bytes), &word.id, 1);
    }
  }

 private:
  static constexpr size_t kPadding = 128;  // zeros after the text: blocks of 64 bytes begin before its end
  static constexpr size_t kQueue = 64;

  // A run of characters that merges independently. It is looked up in the caches, or in the tables if it is known to
  // be one or two characters.
  struct Segment {
    const uint8_t* at;
    uint32_t bytes;
    uint32_t chars;  // 1 or 2; 0: to look up in the caches
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

  // A run of unknown characters gives one id.
  void join_unknown(size_t begin) {
    const auto both_unknown = [unknown = static_cast<uint32_t>(t_.unknown_id)](uint32_t a, uint32_t b) {
      return a == unknown && b == unknown;
    };
    uint32_t* const data = out_->data();
    out_->resize(static_cast<size_t>(std::unique(data + begin, data + out_->size(), both_unknown) - data));
  }

  // Cuts the text between characters that no piece joins, and at user-defined symbols.
  void scan() {
    const uint8_t* at = text_.data();
    const uint8_t* const end = at + text_.size();
    Ends ends = ends_in(at);
    int32_t id;
    while (at < end) {
      const size_t size = t_.user_first[*at] ? t_.user.match(at, end, t_.blank, &id) : 0;
      if (size > 0) {
        resolve_queue();
        out_->reserve(out_->size() + 1);
        out_->push(static_cast<uint32_t>(id));
        at += size;
        continue;
      }
      if (is_ascii(at)) at = take_ascii_segments(at, ends);
      at = take_segment(at, end);
    }
    resolve_queue();
  }

  // Whether eight bytes are ASCII characters, or the end of the text.
  static bool is_ascii(const uint8_t* at) {
    uint64_t eight;
    std::memcpy(&eight, at, 8);
    return (eight & 0x8080808080808080u) == 0;
  }

  // Where segments may end in 64 bytes of text: bit i is set if one may between block[i] and block[i + 1].
  struct Ends {
    const uint8_t* block;
    uint64_t bits;
  };

  Ends ends_in(const uint8_t* block) const {
    uint64_t bits = 0;
    for (int i = 63; i >= 0; --i) bits = bits << 1 | t_.may_end[Tables::pair_of(block + i)];
    return {block, bits};
  }

  // Queues segments of ASCII characters and returns the start of the first that may not be one. Their ends are found
  // without branches; `ends` are the latest that were, so that no byte is asked for twice.
  const uint8_t* take_ascii_segments(const uint8_t* at, Ends& ends) {
    if (at - ends.block >= 64) ends = ends_in(at);
    uint64_t bits = ends.bits & ~uint64_t{0} << (at - ends.block);
    while (true) {
      for (const uint8_t* block = ends.block; bits != 0; bits &= bits - 1) {
        const uint8_t* next = block + __builtin_ctzll(bits) + 1;
        if (t_.special[*next]) return at;
        Segment& segment = queue_[queued_];
        segment.at = at;
        segment.chars = 0;
        enqueue(segment, static_cast<size_t>(next - at));
        at = next;
      }
      ends = ends_in(ends.block + 64);
      bits = ends.bits;
    }
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
        while (!t_.may_end[Tables::pair_of(at)]) ++at;
        if (at != begin) note(segment, t_.code_of(*at), static_cast<size_t>(at - begin));
        last.code = t_.code_of(*at++);
        if (!t_.special[*at]) break;
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
    segment.chars = segment.chars == 1 && more == 1 ? 2 : 0;
  }

  bool user_matches(const uint8_t* at, const uint8_t* end) const {
    int32_t id;
    return t_.user_first[*at] && t_.user.match(at, end, t_.blank, &id) > 0;
  }

  void enqueue(Segment& segment, size_t bytes) {
    segment.bytes = static_cast<uint32_t>(bytes);
    if (segment.chars == 0 && bytes <= WordCache::kMaxBytes) {
      segment.key = WordCache::key_of(segment.at, segment.bytes);
      segment.slot = WordCache::slot_of(segment.key, segment.bytes);
      words_.prefetch(segment.slot);
    }
    if (++queued_ == kQueue) resolve_queue();
  }

  void resolve_queue() {
    size_t bytes = 0;
    for (size_t i = 0; i < queued_; ++i) bytes += queue_[i].bytes;
    // A blank without a piece becomes the three bytes of U+2581; a copy of cached ids may write more than it keeps.
    out_->reserve(out_->size() + 3 * bytes + PhraseCache::kMaxIds);
    uint32_t* to = out_->data() + out_->size();
    for (size_t i = 0; i < queued_; ++i) to = resolve(queue_[i], to);
    out_->resize(static_cast<size_t>(to - out_->data()));
    queued_ = 0;
  }

  // This and the functions below write ids to `to` and return their end.
  uint32_t* resolve(const Segment& segment, uint32_t* to) {
    if (segment.chars > 0) return resolve_chars(segment, to);
    if (segment.bytes <= WordCache::kMaxBytes) return look_up(segment, words_, segment.key, segment.slot, to);
    if (segment.bytes > PhraseCache::kMaxBytes) return merge(segment, to);
    const PhraseCache::Key key = PhraseCache::key_of(segment.at, segment.bytes);
    return look_up(segment, phrases_, key, PhraseCache::slot_of(key, segment.bytes), to);
  }

  template <typename Cache>
  uint32_t* look_up(const Segment& segment, Cache& cache, const typename Cache::Key& key, uint32_t slot, uint32_t* to) {
    if (const auto* entry = cache.find(key, segment.bytes, slot)) {
      std::memcpy(to, entry->ids, sizeof(entry->ids));
      return to + entry->count;
    }
    uint32_t* end = merge(segment, to);
    cache.put(key, segment.bytes, slot, to, static_cast<size_t>(end - to));
    return end;
  }

  uint32_t* resolve_chars(const Segment& segment, uint32_t* to) const {
    const Tables::CharEntry first = t_.chars[segment.codes[0]];
    if (segment.chars == 1) return emit(first.id, segment.codes[0], to);
    const Tables::CharEntry second = t_.chars[segment.codes[1]];
    const uint32_t merged = t_.pairs.find(first.node, second.node);
    if (merged != kNone) return emit(t_.node_id[merged], 0, to);
    return emit(second.id, segment.codes[1], emit(first.id, segment.codes[0], to));
  }

  uint32_t* emit(int32_t id, uint32_t code, uint32_t* to) const {
    if (id < 0 && t_.byte_fallback) {
      uint8_t bytes[4];
      const uint32_t size = encode_char(code, bytes);
      for (uint32_t i = 0; i < size; ++i) to[i] = static_cast<uint32_t>(t_.byte_ids[bytes[i]]);
      return to + size;
    }
    *to = static_cast<uint32_t>(id < 0 ? t_.unknown_id : id);
    return to + 1;
  }

  // Merges a segment.
  uint32_t* merge(const Segment& segment, uint32_t* to) {
    nodes_.resize(segment.bytes);
    starts_.resize(segment.bytes);
    uint32_t* const nodes = nodes_.data();
    uint32_t* const starts = starts_.data();
    size_t count = 0;
    for (uint32_t offset = 0; offset < segment.bytes; ++count) {
      const Char c = decode_char(segment.at + offset);
      nodes[count] = t_.chars[c.code].node;
      starts[count] = offset;
      offset += c.size;
    }
    count = merger_.run(nodes, starts, count);
    for (size_t i = 0; i < count; ++i) {
      to = emit(t_.node_id[nodes[i]], t_.code_of(decode_char(segment.at + starts[i]).code), to);
    }
    return to;
  }

  const Tables& t_;
  Merger merger_;
  WordCache words_;
  PhraseCache phrases_;
  Buffer<uint8_t> text_;
  Buffer<uint32_t>* out_ = nullptr;  // of the document that is being encoded
  Segment queue_[kQueue];
  size_t queued_ = 0;
  Buffer<uint32_t> nodes_, starts_;  // work space of merge()
};

}  // namespace encoder
