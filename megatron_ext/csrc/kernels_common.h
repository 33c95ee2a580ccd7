// Shared by all instruction sets: storage types, shapes, and the division of work into tasks.
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

// Divides rows into at most `most` blocks of at least `smallest` rows. Depends only on the shape: a sum
// over rows is the sum of its blocks' sums in order, for any number of threads.
struct Blocks {
  int64_t size, count;
  Blocks(int64_t rows, int64_t smallest, int64_t most = 32)
      : size(std::max(smallest, (rows + most - 1) / most)), count((rows + size - 1) / size) {}
};

// Minimum number of rows for a task of its own, at `width` elements per row.
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

// Sizes of t [s, b, n, d], the number of rotated elements of d, and the strides of s, b, n.
struct RopeShape {
  int64_t s, b, n, d, rot;
  int64_t in[3], out[3];
};

// Causal self attention: s tokens, b samples, `groups` key and value heads with r query heads each, width d. Token i
// of a sample attends to tokens first[i] to i; `first` [b, s] ascends within a sample, and null stands for zeros.
struct AttentionShape {
  int64_t s, b, groups, r, d;
  const int32_t *first;
  float scale;

  const int32_t *first_of(int64_t batch) const { return first == nullptr ? nullptr : first + batch * s; }
};

// Cosines and sines [s, rot] of a rotary embedding; rot = 0 for none.
struct Rotation {
  const float *cosine = nullptr, *sine = nullptr;
  int64_t rot = 0;
};

// RMSNorm of the queries or keys of each head, with its gain [d]; no norm without a gain.
struct HeadNorm {
  const float *gain = nullptr;
  float eps = 0;
};

// Applied to queries and keys before the scores: the norm, then the rotation.
struct HeadTransform {
  HeadNorm norm;
  Rotation rotation;
};

constexpr int64_t kLine = 16;  // floats per cache line

// Memory for a task's temporaries, kept by the thread between tasks: new memory costs page faults.
class Scratch {
 public:
  // `floats`: total size; each allocation starts at a cache line.
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
