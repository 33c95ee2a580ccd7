// The gradient of a linear layer's weight, added to what is there (no include guard: once per
// instruction set): sum [m, n] += g^T x, g [rows, m], x [rows, n], all float32 and contiguous.
//
// A task owns a block of `sum`. It walks over the rows, kDepth at a time: packs them so that the inner
// loop reads straight on, asks for the next rows while it computes, and adds outer products in
// registers, kTileRows by kTileVectors at once. Its additions come in the order of the rows, whatever
// the number of threads.

constexpr int kTileRows = W == 16 ? 12 : 6;  // all sums of a tile fit the registers
constexpr int kTileVectors = 2;
constexpr int64_t kTileColumns = kTileVectors * W;
constexpr int64_t kDepth = 192;
constexpr int64_t kMostRows = 384, kMostColumns = 512;  // of a block: packed, it fills half of a 1 MiB cache
constexpr int64_t kLine = 16;                            // floats of a cache line

// sum [Rows, kTileColumns] += left^T right; left [depth, kTileRows], right [depth, kTileColumns].
template <int Rows>
static void add_tile(const float *left, const float *right, float *sum, int64_t n, int64_t depth) {
  F total[Rows][kTileVectors] = {};
  for (int i = 0; i < Rows; ++i)
    for (int64_t j = 0; j < kTileColumns; j += kLine) __builtin_prefetch(sum + i * n + j, 1);
  for (int64_t k = 0; k < depth; ++k, left += kTileRows, right += kTileColumns) {
    F row[kTileVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kTileVectors; ++j) row[j] = load(right + j * W);
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i) {
      F factor = broadcast(left[i]);
#pragma GCC unroll 2
      for (int j = 0; j < kTileVectors; ++j) total[i][j] += factor * row[j];
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kTileVectors; ++j) store(sum + i * n + j * W, load(sum + i * n + j * W) + total[i][j]);
}

// Columns begin .. end of a matrix [rows, width], read kDepth rows at a time into panels [kDepth, Panel].
template <int64_t Panel>
struct Packer {
  const float *matrix;
  int64_t rows, width, begin, end;
  float *room;
  int64_t next_row = 0, next_column = 0;  // of the line that `prefetch` asks for next

  static constexpr int64_t kStride = kDepth * Panel + kLine;  // panels begin in different sets of the cache
  static int64_t floats(int64_t columns) { return (columns + Panel - 1) / Panel * kStride; }
  const float *panel(int64_t column) const { return room + (column - begin) / Panel * kStride; }

  void pack(int64_t first, int64_t depth) {
    for (int64_t k = 0; k < depth; ++k) {
      const float *from = matrix + (first + k) * width;
      float *to = room + k * Panel;
      int64_t j = begin;
      for (; j + Panel <= end; j += Panel, to += kStride) std::memcpy(to, from + j, Panel * sizeof(float));
      if (j < end) std::copy(from + j, from + end, to);
    }
    next_row = first + depth, next_column = begin;
  }

  void prefetch(int64_t lines, int64_t last_row) {
    for (; lines > 0 && next_row < last_row; --lines) {
      __builtin_prefetch(matrix + next_row * width + next_column, 0, 2);
      next_column += kLine;
      if (next_column >= end) next_column = begin, ++next_row;
    }
  }
};

// The block of `sum` that two packers' columns make.
static void add_block(Packer<kTileRows> &left, Packer<kTileColumns> &right, float *sum) {
  const int64_t tiles = ((left.end - left.begin + kTileRows - 1) / kTileRows) *
                        ((right.end - right.begin) / kTileColumns);
  const int64_t left_lines = kDepth * (left.end - left.begin) / kLine / tiles + 1;
  const int64_t right_lines = kDepth * (right.end - right.begin) / kLine / tiles + 1;
  for (int64_t first = 0; first < left.rows; first += kDepth) {
    const int64_t depth = std::min(kDepth, left.rows - first);
    const int64_t last = std::min(left.rows, first + 2 * kDepth);
    left.pack(first, depth), right.pack(first, depth);
    for (int64_t j = right.begin; j < right.end; j += kTileColumns)
      for (int64_t i = left.begin; i < left.end; i += kTileRows) {
        left.prefetch(left_lines, last), right.prefetch(right_lines, last);
        float *to = sum + i * right.width + j;
        if (i + kTileRows <= left.end)
          add_tile<kTileRows>(left.panel(i), right.panel(j), to, right.width, depth);
        else
          for (int64_t r = 0; i + r < left.end; ++r)
            add_tile<1>(left.panel(i) + r, right.panel(j), to + r * right.width, right.width, depth);
      }
  }
}

// n is a multiple of kTileColumns.
static void weight_gradient(const float *g, const float *x, float *sum, int64_t rows, int64_t m, int64_t n,
                            int threads) {
  const int64_t tiles = (m + kTileRows - 1) / kTileRows;
  int64_t blocks = (tiles * kTileRows + kMostRows - 1) / kMostRows;
  blocks += blocks % 2;  // two threads get the same
  const int64_t height = (tiles + blocks - 1) / blocks * kTileRows;
  blocks = (m + height - 1) / height;
  parallel_for(blocks * ((n + kMostColumns - 1) / kMostColumns), threads, [&](int64_t task) {
    const int64_t i = task % blocks * height, j = task / blocks * kMostColumns;
    Packer<kTileRows> left{g, rows, m, i, std::min(m, i + height), nullptr};
    Packer<kTileColumns> right{x, rows, n, j, std::min(n, j + kMostColumns), nullptr};
    const int64_t left_floats = left.floats(left.end - i), right_floats = right.floats(right.end - j);
    Scratch scratch(left_floats + right_floats);
    left.room = scratch.take(left_floats), right.room = scratch.take(right_floats);
    add_block(left, right, sum);
  });
}
