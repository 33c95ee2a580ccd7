// Small matrix products without packing their operands (no include guard: once per instruction set).

constexpr int kRows = 4;  // rows and vectors of a tile: all sums fit into registers
constexpr int kVectors = W == 16 ? 4 : 2;

// total[i][j] += sum_k a[i * a_row + k * a_step] b[k * ldb + j], in registers. With `Ahead` each step
// prefetches the element of a at that distance.
template <int Ahead = 0, int Rows, int Vectors>
INLINE void add_products(F (&total)[Rows][Vectors], const float *a, int64_t a_row, int64_t a_step, const float *b,
                         int64_t ldb, int64_t depth) {
  for (int64_t k = 0; k < depth; ++k) {
    if (Ahead) __builtin_prefetch(a + k * a_step + Ahead);
    F right[Vectors];
#pragma GCC unroll 16
    for (int j = 0; j < Vectors; ++j) right[j] = load(b + k * ldb + j * W);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      F left = splat(a[i * a_row + k * a_step]);
#pragma GCC unroll 16
      for (int j = 0; j < Vectors; ++j) total[i][j] += left * right[j];
    }
  }
}

// c[i][j] (+)= sum_k a[i * a_row + k * a_step] b[k * ldb + j] for Rows rows and Vectors vectors.
template <int Rows, int Vectors>
INLINE void product_tile(const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t ldb, float *c,
                         int64_t ldc, int64_t depth, bool add) {
  F total[Rows][Vectors];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < Vectors; ++j) total[i][j] = add ? load(c + i * ldc + j * W) : F{};
  add_products(total, a, a_row, a_step, b, ldb, depth);
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < Vectors; ++j) store(c + i * ldc + j * W, total[i][j]);
}

template <int Vectors>
static void product_panel(const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t ldb, float *c,
                          int64_t ldc, int64_t m, int64_t depth, bool add) {
  int64_t i = 0;
  for (; i + kRows <= m; i += kRows)
    product_tile<kRows, Vectors>(a + i * a_row, a_row, a_step, b, ldb, c + i * ldc, ldc, depth, add);
  for (; i < m; ++i)
    product_tile<1, Vectors>(a + i * a_row, a_row, a_step, b, ldb, c + i * ldc, ldc, depth, add);
}

// c [m, n] (+)= a [m, depth] b [depth, n]; n is a multiple of W; a has two strides.
static void product(const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t ldb, float *c, int64_t ldc,
                    int64_t m, int64_t n, int64_t depth, bool add) {
  int64_t j = 0;
  for (; j + kVectors * W <= n; j += kVectors * W)
    product_panel<kVectors>(a, a_row, a_step, b + j, ldb, c + j, ldc, m, depth, add);
  if (kVectors > 2 && n - j == 3 * W)
    product_panel<3>(a, a_row, a_step, b + j, ldb, c + j, ldc, m, depth, add);
  else if (kVectors > 2 && n - j == 2 * W)
    product_panel<2>(a, a_row, a_step, b + j, ldb, c + j, ldc, m, depth, add);
  else if (j < n)
    product_panel<1>(a, a_row, a_step, b + j, ldb, c + j, ldc, m, depth, add);
}
