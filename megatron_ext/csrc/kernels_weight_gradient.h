// The gradient of a linear layer's weight, accumulated in place (no include guard: once per
// instruction set): sum [m, n] += g^T x, g [rows, m], x [rows, n], all float32 and contiguous.
//
// A task owns a block of `sum`. It processes the rows, kDepth at a time, and adds outer products in
// registers, kTileRows by kTileVectors at once: g is read in place, x is packed, so that a tile reads
// contiguous memory. Neither is in the caches any more, so the next pieces are prefetched. The order of
// the additions is that of the rows, for any number of threads.

constexpr int kTileRows = W == 16 ? 12 : 6;  // all sums of a tile fit into registers
constexpr int kTileVectors = 2;
constexpr int64_t kTileColumns = kTileVectors * W;
constexpr int64_t kDepth = 192;
constexpr int64_t kMostRows = 384, kMostColumns = 512;  // of a block; packed x needs 384 KiB

// sum [Rows, kTileColumns] += left^T right; left [depth, Rows] has stride m, right is packed.
template <int Rows>
static void add_tile(const float *left, int64_t m, const float *right, float *sum, int64_t n, int64_t depth) {
  F total[Rows][kTileVectors] = {};
  for (int i = 0; i < Rows; ++i)
    for (int64_t j = 0; j < kTileColumns; j += kLine) __builtin_prefetch(sum + i * n + j, 1);
  add_products<2 * kTileRows>(total, left, 1, m, right, kTileColumns, depth);  // prefetches the tile after the next
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kTileVectors; ++j) store(sum + i * n + j * W, load(sum + i * n + j * W) + total[i][j]);
}

// Packs columns begin .. end of x [rows, n], kDepth rows at a time, into panels [kDepth, kTileColumns].
struct Panels {
  const float *x;
  int64_t rows, n, begin, end;
  float *room;
  int64_t next_row = 0, next_column = 0;  // the next position of `prefetch`

  static constexpr int64_t kStride = kDepth * kTileColumns + kLine;  // start in different cache sets
  static constexpr int64_t kFloats = kMostColumns / kTileColumns * kStride;
  const float *panel(int64_t column) const { return room + (column - begin) / kTileColumns * kStride; }

  void pack(int64_t first, int64_t depth) {
    for (int64_t k = 0; k < depth; ++k) {
      const float *from = x + (first + k) * n;
      float *to = room + k * kTileColumns;
      for (int64_t j = begin; j < end; j += kTileColumns, to += kStride)
        std::memcpy(to, from + j, kTileColumns * sizeof(float));
    }
    next_row = first + depth, next_column = begin;
  }

  // Prefetches 1 / `parts` of what the next `pack` will read.
  void prefetch(int64_t parts) {
    const int64_t last = std::min(rows, next_row + kDepth);
    for (int64_t lines = kDepth * (end - begin) / kLine / parts + 1; lines > 0 && next_row < last; --lines) {
      __builtin_prefetch(x + next_row * n + next_column, 0, 2);
      next_column += kLine;
      if (next_column >= end) next_column = begin, ++next_row;
    }
  }
};

// Rows begin .. end of `sum`, in the columns of the panels.
static void add_block(const float *g, int64_t m, int64_t begin, int64_t end, Panels &panels, float *sum) {
  const int64_t n = panels.n, tiles = (end - begin + kTileRows - 1) / kTileRows;
  for (int64_t first = 0; first < panels.rows; first += kDepth) {
    const int64_t depth = std::min(kDepth, panels.rows - first);
    panels.pack(first, depth);
    for (int64_t i = begin; i < end; i += kTileRows) {
      panels.prefetch(tiles);
      for (int64_t j = panels.begin; j < panels.end; j += kTileColumns) {
        if (i + kTileRows <= end)
          add_tile<kTileRows>(g + first * m + i, m, panels.panel(j), sum + i * n + j, n, depth);
        else
          for (int64_t r = i; r < end; ++r)
            add_tile<1>(g + first * m + r, m, panels.panel(j), sum + r * n + j, n, depth);
      }
    }
  }
}

// n is a multiple of kTileColumns.
static void weight_gradient(const float *g, const float *x, float *sum, int64_t rows, int64_t m, int64_t n,
                            int threads) {
  const int64_t tiles = (m + kTileRows - 1) / kTileRows;
  int64_t blocks = (tiles * kTileRows + kMostRows - 1) / kMostRows;
  blocks += blocks % 2;  // two threads get the same amount of work
  const int64_t height = (tiles + blocks - 1) / blocks * kTileRows;
  blocks = (m + height - 1) / height;
  parallel_for(blocks * ((n + kMostColumns - 1) / kMostColumns), threads, [&](int64_t task) {
    const int64_t i = task % blocks * height, j = task / blocks * kMostColumns;
    Scratch scratch(Panels::kFloats);
    Panels panels{x, rows, n, j, std::min(n, j + kMostColumns), scratch.take(Panels::kFloats)};
    add_block(g, m, i, std::min(m, i + height), panels, sum);
  });
}
