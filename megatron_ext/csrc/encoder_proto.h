// Reads the parts of a SentencePiece ModelProto that encoding needs, straight from the protobuf wire format.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace encoder {

enum PieceType { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kUnused = 5, kByte = 6 };
enum ModelType { kUnigram = 1, kBpe = 2 };

struct Piece {
  std::string text;
  float score = 0;
  int type = kNormal;
};

// Field defaults are those of sentencepiece_model.proto.
struct ModelFile {
  std::vector<Piece> pieces;
  int model_type = kUnigram;
  bool byte_fallback = false;
  bool whitespace_as_suffix = false;
  bool has_charsmap = false;
  bool add_dummy_prefix = true;
  bool remove_extra_whitespaces = true;
  bool escape_whitespaces = true;
};

// One protobuf message: next() advances to a field, then exactly one of the readers or skip() consumes its value.
class WireReader {
 public:
  explicit WireReader(std::string_view data)
      : at_(reinterpret_cast<const uint8_t*>(data.data())), end_(at_ + data.size()) {}

  bool next() {
    if (at_ == end_) return false;
    const uint64_t key = varint();
    field_ = static_cast<uint32_t>(key >> 3);
    wire_ = static_cast<uint32_t>(key & 7);
    if (field_ == 0) fail();
    return true;
  }
  bool is(uint32_t field, uint32_t wire) const { return field_ == field && wire_ == wire; }

  uint64_t varint() {
    uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      if (at_ == end_) fail();
      const uint8_t byte = *at_++;
      value |= static_cast<uint64_t>(byte & 0x7F) << shift;
      if (byte < 0x80) return value;
    }
    fail();
    return 0;
  }

  std::string_view bytes() { return take(varint()); }

  float float32() {
    float value;
    std::memcpy(&value, take(4).data(), 4);
    return value;
  }

  void skip() {
    switch (wire_) {
      case 0: varint(); break;
      case 1: take(8); break;
      case 2: bytes(); break;
      case 5: take(4); break;
      default: fail();  // groups are not part of any SentencePiece model
    }
  }

 private:
  std::string_view take(uint64_t size) {
    if (size > static_cast<uint64_t>(end_ - at_)) fail();
    std::string_view view(reinterpret_cast<const char*>(at_), size);
    at_ += size;
    return view;
  }
  [[noreturn]] static void fail() { throw std::invalid_argument("the model is not a readable protobuf message"); }

  const uint8_t* at_;
  const uint8_t* end_;
  uint32_t field_ = 0, wire_ = 0;
};

inline Piece read_piece(std::string_view data) {
  Piece piece;
  for (WireReader reader(data); reader.next();) {
    if (reader.is(1, 2)) {
      piece.text = reader.bytes();
    } else if (reader.is(2, 5)) {
      piece.score = reader.float32();
    } else if (reader.is(3, 0)) {
      const int64_t type = static_cast<int64_t>(reader.varint());
      if (type >= kNormal && type <= kByte) piece.type = static_cast<int>(type);  // proto2 drops unknown enums
    } else {
      reader.skip();
    }
  }
  return piece;
}

inline void read_trainer_spec(std::string_view data, ModelFile& model) {
  for (WireReader reader(data); reader.next();) {
    if (reader.is(3, 0)) {
      const int64_t type = static_cast<int64_t>(reader.varint());
      if (type >= 1 && type <= 4) model.model_type = static_cast<int>(type);
    } else if (reader.is(24, 0)) {
      model.whitespace_as_suffix = reader.varint() != 0;
    } else if (reader.is(35, 0)) {
      model.byte_fallback = reader.varint() != 0;
    } else {
      reader.skip();
    }
  }
}

inline void read_normalizer_spec(std::string_view data, ModelFile& model) {
  for (WireReader reader(data); reader.next();) {
    if (reader.is(2, 2)) {
      model.has_charsmap = !reader.bytes().empty();
    } else if (reader.is(3, 0)) {
      model.add_dummy_prefix = reader.varint() != 0;
    } else if (reader.is(4, 0)) {
      model.remove_extra_whitespaces = reader.varint() != 0;
    } else if (reader.is(5, 0)) {
      model.escape_whitespaces = reader.varint() != 0;
    } else {
      reader.skip();
    }
  }
}

// Throws std::invalid_argument if the bytes are not a protobuf message.
inline ModelFile read_model(std::string_view data) {
  ModelFile model;
  for (WireReader reader(data); reader.next();) {
    if (reader.is(1, 2)) {
      model.pieces.push_back(read_piece(reader.bytes()));
    } else if (reader.is(2, 2)) {
      read_trainer_spec(reader.bytes(), model);
    } else if (reader.is(3, 2)) {
      read_normalizer_spec(reader.bytes(), model);
    } else {
      reader.skip();
    }
  }
  return model;
}

}  // namespace encoder
