// UTF-8: decoding of text known to be valid, and repair of text that is not.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

namespace encoder {

// U+2581, SentencePiece's visible blank.
constexpr uint32_t kVisibleBlank = 0x2581;

struct Char {
  uint32_t code;
  uint32_t size;  // bytes
};

// `at` must be the first byte of a valid character.
inline Char decode_char(const uint8_t* at) {
  const uint32_t a = at[0];
  if (a < 0x80) return {a, 1};
  if (a >= 0xE0 && a < 0xF0) return {(a & 0x0F) << 12 | (at[1] & 0x3Fu) << 6 | (at[2] & 0x3Fu), 3};
  if (a < 0xE0) return {(a & 0x1F) << 6 | (at[1] & 0x3Fu), 2};
  return {(a & 0x07) << 18 | (at[1] & 0x3Fu) << 12 | (at[2] & 0x3Fu) << 6 | (at[3] & 0x3Fu), 4};
}

// Writes 1 to 4 bytes and returns how many.
inline uint32_t encode_char(uint32_t code, uint8_t* out) {
  if (code < 0x80) {
    out[0] = static_cast<uint8_t>(code);
    return 1;
  }
  const uint32_t size = code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
  for (uint32_t i = size - 1; i > 0; --i, code >>= 6) out[i] = static_cast<uint8_t>(0x80 | (code & 0x3F));
  out[0] = static_cast<uint8_t>((size == 2 ? 0xC0 : size == 3 ? 0xE0 : 0xF0) | code);
  return size;
}

// Length in bytes of the valid character at `at`, 0 if there is none (overlong forms, surrogates and values above
// U+10FFFF are not characters).
inline uint32_t valid_char_size(const uint8_t* at, size_t left) {
  const auto tail = [&](uint32_t i) { return (at[i] & 0xC0) == 0x80; };
  const uint32_t a = at[0];
  if (a < 0x80) return 1;
  if (a < 0xC2) return 0;
  if (a < 0xE0) return left >= 2 && tail(1) ? 2 : 0;
  if (a < 0xF0) {
    if (left < 3 || !tail(1) || !tail(2)) return 0;
    if ((a == 0xE0 && at[1] < 0xA0) || (a == 0xED && at[1] >= 0xA0)) return 0;
    return 3;
  }
  if (a > 0xF4 || left < 4 || !tail(1) || !tail(2) || !tail(3)) return 0;
  if ((a == 0xF0 && at[1] < 0x90) || (a == 0xF4 && at[1] >= 0x90)) return 0;
  return 4;
}

// Length of the longest valid prefix of `text`.
inline size_t valid_prefix(std::string_view text) {
  const uint8_t* data = reinterpret_cast<const uint8_t*>(text.data());
  size_t at = 0;
  while (at < text.size()) {
    uint64_t eight;
    if (text.size() - at >= 8 && (std::memcpy(&eight, data + at, 8), (eight & 0x8080808080808080u) == 0)) {
      at += 8;
      continue;
    }
    const uint32_t size = valid_char_size(data + at, text.size() - at);
    if (size == 0) return at;
    at += size;
  }
  return at;
}

// Replaces every byte that is not part of a valid character by U+FFFD, as SentencePiece does.
inline std::string repair(std::string_view text) {
  std::string fixed;
  while (true) {
    const size_t valid = valid_prefix(text);
    fixed.append(text.substr(0, valid));
    if (valid == text.size()) return fixed;
    fixed.append("\xEF\xBF\xBD");
    text.remove_prefix(valid + 1);
  }
}

inline bool is_valid(std::string_view text) { return valid_prefix(text) == text.size(); }

// Code points of valid text.
inline std::vector<uint32_t> code_points(std::string_view text) {
  std::vector<uint32_t> codes;
  const uint8_t* at = reinterpret_cast<const uint8_t*>(text.data());
  for (const uint8_t* end = at + text.size(); at < end;) {
    const Char c = decode_char(at);
    codes.push_back(c.code);
    at += c.size;
  }
  return codes;
}

}  // namespace encoder
