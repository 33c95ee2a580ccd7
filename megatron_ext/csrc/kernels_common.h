// What all instruction sets share: storage types, shapes, and the cutting of work into tasks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "kernels_threads.h"

namespace kernels {

struct Bf16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(Bf16 value) {
  uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

// Cuts rows into at most `most` blocks of at least `smallest` rows. Depends on the shape alone: a
// sum over rows is the sum of its blocks' sums in order, whatever the number of threads.
struct Blocks {
  int64_t size, count;
  Blocks(int64_t rows, int64_t smallest, int64_t most = 32)
      : size(std::max(smallest, (rows + most - 1) / most)), count((rows + size - 1) / size) {}
};

// Rows that make a task worth handing to another thread, at `width` elements a row.
inline int64_t rows_for(int64_t width) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width)); }

// out[j] = sum over blocks of sums[block * stride + j], j in [0, n).
inline void add_blocks(const float *sums, int64_t blocks, int64_t stride, int64_t n, float *out, int threads) {
  constexpr int64_t kColumns = 2048;
  parallel_for((n + kColumns - 1) / kColumns, threads, [&](int64_t task) {
    int64_t begin = task * kColumns, end = std::min(n, begin + kColumns);
    std::fill(out + begin, out + end, 0.0f);
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t j = begin; j < end; ++j) out[j] += sums[block * stride + j];
  });
}

// Extents of t [s, b, n, d], how many of d are rotated, and the strides of s, b, n.
struct RopeShape {
  int64_t s, b, n, d, rot;
  int64_t in[3], out[3];
};

// Causal self attention: s tokens, b samples, `groups` keys and values of r query heads each, width d.
struct AttentionShape {
  int64_t s, b, groups, r, d;
  float scale;
};

// Cosines and sines [s, rot] of a rotary embedding; rot = 0 for none.
struct Rotation {
  const float *cosine = nullptr, *sine = nullptr;
  int64_t rot = 0;
};

constexpr int64_t kLine = 16;  // floats of a cache line

// Room for a task's temporaries, kept by the thread between tasks: fresh memory costs page faults.
class Scratch {
 public:
  // `floats`: all that will be taken; each piece starts at a cache line.
  explicit Scratch(int64_t floats) {
    static thread_local std::vector<float> room;
    if (room.size() < static_cast<size_t>(floats + kSlack)) room.resize(floats + kSlack);
    next_ = align(room.data());
  }
  float *take(int64_t floats) {
    float *piece = next_;
    next_ = align(piece + floats);
    return piece;
  }

 private:
  static constexpr int64_t kSlack = 16 * kLine;
  static float *align(float *p) {
    return reinterpret_cast<float *>((reinterpret_cast<uintptr_t>(p) + 4 * kLine - 1) & ~(4 * kLine - 1));
  }
  float *next_;
};

using Pointers = std::vector<uintptr_t>;

struct Piece {
  int64_t tensor, begin, size;
};

inline std::vector<Piece> cut(const std::vector<int64_t> &sizes) {
  constexpr int64_t kPiece = 1 << 15;
  std::vector<Piece> pieces;
  for (size_t i = 0; i < sizes.size(); ++i)
    for (int64_t begin = 0; begin < sizes[i]; begin += kPiece)
      pieces.push_back({static_cast<int64_t>(i), begin, std::min(kPiece, sizes[i] - begin)});
  return pieces;
}

}  // namespace kernels
