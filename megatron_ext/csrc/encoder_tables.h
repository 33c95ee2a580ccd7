// Look-up tables of the encoder, computed once from a model.
//
// The design relies on two facts, which follow from the merge order "highest score, then leftmost":
// - If a symbol is formed over a span, no earlier merge crossed the ends of the span, so the merges inside are those
//   of the span by itself. Hence a piece can be produced anywhere if and only if merging its own characters produces
//   it, and its last merge is always the same pair: one table entry per piece is enough, and pieces that do not
//   produce themselves can be omitted.
// - A merge across a boundary creates a piece that contains the two characters at the boundary next to each other. If
//   no producible piece contains them in this way, text can be cut there and the parts merged independently.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "encoder_merge.h"
#include "encoder_proto.h"
#include "encoder_user_symbols.h"
#include "encoder_utf8.h"

namespace encoder {

// A model whose ids this encoder is not guaranteed to reproduce.
struct Unsupported : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Tables {
 public:
  struct CharEntry {
    uint32_t node;
    int32_t id;  // -1: unknown
  };
  // A piece that makes up a whole segment, as it stands in a text.
  struct Word {
    std::array<uint8_t, 16> text;
    uint32_t bytes, id;
  };

  explicit Tables(const ModelFile& model);

  bool joins(uint32_t left, uint32_t right) const {
    const uint32_t bit = join_bit(left, right);
    return join_bits_[bit >> 6] >> (bit & 63) & 1;
  }
  static uint16_t pair_of(const uint8_t* at) {
    uint16_t pair;
    std::memcpy(&pair, at, sizeof(pair));
    return pair;
  }
  uint32_t code_of(uint32_t raw) const { return raw == ' ' ? blank : raw; }

  // The text has to be normalized by SentencePiece first; it is then encoded unchanged.
  bool needs_normalizer = false;
  bool byte_fallback = false, add_dummy_prefix = false, remove_extra_whitespaces = false;
  uint32_t blank = ' ';  // the code point that ' ' represents
  int32_t unknown_id = -1;
  std::array<int32_t, 256> byte_ids{};
  size_t num_pieces = 0;

  std::vector<CharEntry> chars;  // by code point
  std::vector<uint32_t> rank;    // by node
  std::vector<int32_t> node_id;  // by node; -1: unknown
  uint32_t unknown_node = 0;     // represents every character that is in no piece; it never merges
  PairTable pairs;
  UserSymbols user;
  std::array<bool, 256> user_first{};  // by byte: a user-defined symbol may start with it
  // By byte: more than the byte is needed to know whether it joins the one before. It may start a longer character or
  // a user-defined symbol; NUL may be the padding after the text.
  std::array<bool, 256> special{};
  // By pair_of two bytes, 1 if a segment may end between them: no piece joins them, or one is special.
  std::array<uint8_t, 256 * 256> may_end;
  std::vector<Word> words;  // producible pieces of up to 16 bytes, the highest score last
  // By piece id, the two pieces that its last merge joins: -1 for a character that is not a piece; {-1, -1} also for
  // single characters and for pieces that are never merged; {-2, -2} for a normal piece that cannot be produced.
  std::vector<std::array<int32_t, 2>> derivation;

 private:
  static constexpr uint32_t kJoinBits = 19;
  static uint32_t join_bit(uint32_t left, uint32_t right) {
    return (left * 0x9E3779B1u ^ right * 0x85EBCA77u) >> (32 - kJoinBits);
  }

  static uint16_t pair_of(uint32_t a, uint32_t b) {
    const uint8_t bytes[2] = {static_cast<uint8_t>(a), static_cast<uint8_t>(b)};
    return pair_of(bytes);
  }

  void check_pieces(const ModelFile& model);
  void set_normalization(const ModelFile& model);
  void number_nodes(const ModelFile& model);
  PairTable all_splits() const;
  void derive(const PairTable& splits);
  void add_piece_joins(const std::vector<uint32_t>& codes);
  void add_join(uint32_t left, uint32_t right);
  void finish_ascii();
  void collect_words();
  bool contains_user_symbol(const std::string& text) const;

  struct Node {
    int32_t id;
    std::string text;
    std::vector<uint32_t> codes;
    float score;
    bool unused;
  };
  std::vector<Node> nodes_;  // mergeable pieces by score descending; emptied once the tables are built
  std::vector<uint64_t> join_bits_;
};

inline Tables::Tables(const ModelFile& model)
    : num_pieces(model.pieces.size()),
      chars(0x110000, CharEntry{kNone, -1}),
      derivation(model.pieces.size(), {-1, -1}),
      join_bits_((size_t{1} << kJoinBits) / 64, 0) {
  if (model.model_type != kBpe) throw Unsupported("its model type is not BPE");
  may_end.fill(1);
  set_normalization(model);
  check_pieces(model);
  number_nodes(model);
  derive(all_splits());
  finish_ascii();
  collect_words();
  nodes_ = {};
}

inline void Tables::set_normalization(const ModelFile& model) {
  bool blank_in_user_symbol = false;
  for (const Piece& piece : model.pieces) {
    blank_in_user_symbol |= piece.type == kUserDefined && piece.text.find(' ') != std::string::npos;
  }
  byte_fallback = model.byte_fallback;
  needs_normalizer = model.has_charsmap || (model.whitespace_as_suffix && model.add_dummy_prefix) ||
                     (blank_in_user_symbol && model.remove_extra_whitespaces);
  if (needs_normalizer) return;
  add_dummy_prefix = model.add_dummy_prefix;
  remove_extra_whitespaces = model.remove_extra_whitespaces;
  if (model.escape_whitespaces) blank = kVisibleBlank;
}

inline void Tables::check_pieces(const ModelFile& model) {
  std::unordered_set<std::string_view> seen;
  for (size_t i = 0; i < model.pieces.size(); ++i) {
    const Piece& piece = model.pieces[i];
    const int32_t id = static_cast<int32_t>(i);
    if (piece.text.empty() || !is_valid(piece.text)) throw Unsupported("a piece is empty or not UTF-8");
    if (!seen.insert(piece.text).second) throw Unsupported("two pieces have the same text");
    if (std::isnan(piece.score)) throw Unsupported("a score is not a number");
    const bool reserved = piece.type == kUnknown || piece.type == kControl || piece.type == kByte;
    const auto codes = code_points(piece.text);
    if (reserved && codes.size() == 1) throw Unsupported("a control piece is a single character");
    if (piece.type == kUnknown) unknown_id = id;
    if (piece.type == kByte) {
      const int byte = std::stoi("0" + piece.text.substr(2, 3), nullptr, 16);
      byte_ids.at(static_cast<size_t>(byte)) = id;
    }
    if (piece.type == kUserDefined) {
      if (piece.text.find('\0') != std::string::npos) throw Unsupported("a user-defined piece contains NUL");
      user.add(codes, id);
    }
  }
}

inline bool Tables::contains_user_symbol(const std::string& text) const {
  if (user.empty()) return false;
  const uint8_t* at = reinterpret_cast<const uint8_t*>(text.data());
  int32_t id;
  for (const uint8_t* end = at + text.size(); at < end; at += decode_char(at).size) {
    // If blanks are escaped, normalization never outputs a literal blank, so it matches nothing.
    if (user.match(at, end, ' ', &id) > 0) return true;
  }
  return false;
}

inline void Tables::number_nodes(const ModelFile& model) {
  for (size_t i = 0; i < model.pieces.size(); ++i) {
    const Piece& piece = model.pieces[i];
    if (piece.type != kNormal && piece.type != kUnused) continue;
    // SentencePiece treats a piece with a NUL as unused.
    const bool unused = piece.type == kUnused || piece.text.find('\0') != std::string::npos;
    nodes_.push_back({static_cast<int32_t>(i), piece.text, code_points(piece.text), piece.score, unused});
  }
  std::stable_sort(nodes_.begin(), nodes_.end(), [](const Node& a, const Node& b) { return a.score > b.score; });
  uint32_t place = 0;
  for (size_t i = 0; i < nodes_.size(); ++i) {
    const Node& node = nodes_[i];
    if (i > 0 && node.score != nodes_[i - 1].score) ++place;
    rank.push_back(place);
    node_id.push_back(node.unused ? -1 : node.id);
    if (node.codes.size() == 1) chars[node.codes[0]] = {static_cast<uint32_t>(i), node_id.back()};
  }
  const auto add_node = [&] {  // a symbol that is not a piece itself
    rank.push_back(place);
    node_id.push_back(-1);
    return static_cast<uint32_t>(rank.size() - 1);
  };
  for (const Node& node : nodes_) {
    for (uint32_t code : node.codes) {
      if (chars[code].node == kNone) chars[code].node = add_node();
    }
  }
  unknown_node = add_node();
  for (CharEntry& entry : chars) entry.node = entry.node == kNone ? unknown_node : entry.node;
  if (rank.size() > kMaxNodes) throw Unsupported("it has over a million pieces");
}

// Every way to cut a piece into two symbols.
inline PairTable Tables::all_splits() const {
  std::unordered_map<std::string_view, uint32_t> node_of;
  node_of.reserve(nodes_.size() * 2);
  size_t most = 0;
  for (size_t i = 0; i < nodes_.size(); ++i) {
    node_of[nodes_[i].text] = static_cast<uint32_t>(i);
    most += nodes_[i].codes.size() - 1;
  }
  const auto symbol = [&](std::string_view text, uint32_t code, bool single) {
    if (single) return chars[code].node;
    const auto found = node_of.find(text);
    return found == node_of.end() ? kNone : found->second;
  };
  PairTable splits(most);
  for (size_t i = 0; i < nodes_.size(); ++i) {
    const Node& node = nodes_[i];
    const std::string_view text = node.text;
    size_t offset = 0;
    for (size_t cut = 1; cut < node.codes.size(); ++cut) {
      uint8_t ignored[4];
      offset += encode_char(node.codes[cut - 1], ignored);
      const uint32_t left = symbol(text.substr(0, offset), node.codes[0], cut == 1);
      if (left == kNone) continue;
      const uint32_t right = symbol(text.substr(offset), node.codes.back(), cut + 1 == node.codes.size());
      if (right != kNone) splits.insert(left, right, static_cast<uint32_t>(i));
    }
  }
  return splits;
}

// Merges each piece's own characters; keeps the last pair of the pieces that are produced.
inline void Tables::derive(const PairTable& splits) {
  struct Entry {
    uint32_t left, right, merged;
  };
  std::vector<Entry> entries;
  std::vector<uint32_t> symbols, starts;
  Merger merger(splits, rank);
  for (size_t i = 0; i < nodes_.size(); ++i) {
    const Node& node = nodes_[i];
    if (node.codes.size() == 1) continue;
    symbols.clear();
    for (uint32_t code : node.codes) symbols.push_back(chars[code].node);
    starts.assign(symbols.size(), 0);
    const bool whole = merger.run(symbols.data(), starts.data(), symbols.size()) == 1;
    if (!whole || contains_user_symbol(node.text)) {
      derivation[node.id] = {-2, -2};
      continue;
    }
    if (node.unused) throw Unsupported("an unused piece can be produced");
    const auto [left, right] = merger.last_pair();
    entries.push_back({left, right, static_cast<uint32_t>(i)});
    derivation[node.id] = {node_id[left], node_id[right]};
    add_piece_joins(node.codes);
  }
  pairs = PairTable(entries.size());
  for (const Entry& entry : entries) pairs.insert(entry.left, entry.right, entry.merged);
}

inline void Tables::add_piece_joins(const std::vector<uint32_t>& codes) {
  for (size_t i = 0; i + 1 < codes.size(); ++i) add_join(codes[i], codes[i + 1]);
}

inline void Tables::add_join(uint32_t left, uint32_t right) {
  const uint32_t bit = join_bit(left, right);
  join_bits_[bit >> 6] |= uint64_t{1} << (bit & 63);
  // In the table of bytes a blank is the byte 0x20, whatever it represents.
  const uint32_t a = left == blank ? ' ' : left, b = right == blank ? ' ' : right;
  if (a < 128 && b < 128) may_end[pair_of(a, b)] = 0;
}

inline void Tables::finish_ascii() {
  chars[' '] = chars[blank];
  for (uint32_t first : user.firsts()) {
    uint8_t bytes[4];
    encode_char(first, bytes);
    user_first[bytes[0]] = true;
    if (first == blank) user_first[' '] = true;
  }
  for (uint32_t b = 0; b < 256; ++b) {
    special[b] = b == 0 || b >= 128 || user_first[b];
    if (!special[b]) continue;
    for (uint32_t a = 0; a < 256; ++a) may_end[pair_of(a, b)] = 1;
  }
}

inline void Tables::collect_words() {
  for (auto node = nodes_.rbegin(); node != nodes_.rend(); ++node) {
    if (node->unused || derivation[node->id][0] == -2) continue;
    // In texts a blank stands for `blank`, and for nothing else.
    if (blank != ' ' && node->text.find(' ') != std::string::npos) continue;
    Word word{{}, 0, static_cast<uint32_t>(node->id)};
    std::string text;
    for (uint32_t code : node->codes) {
      uint8_t bytes[4];
      text.append(reinterpret_cast<const char*>(bytes), encode_char(code == blank ? ' ' : code, bytes));
    }
    if (text.size() > word.text.size()) continue;
    std::copy(text.begin(), text.end(), word.text.begin());
    word.bytes = static_cast<uint32_t>(text.size());
    words.push_back(word);
  }
}

}  // namespace encoder
