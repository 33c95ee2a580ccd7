// Series activation on the SwiGLU gate (no include guard: once per instruction set).
//   y = (sum_i silu(a_i g + b_i)) u,  x = [g | u]: [rows, 2 f],  a, b: [n, f],  y: [rows, f]
// Terms >= 0 fixes n at compile time; with -1 it is read at run time. n = 0 means y = silu(g) u.

INLINE void value_and_slope(F z, F &value, F &slope) {
  F s = sigmoid(z);
  value = z * s;
  slope = s * (1.0f + z * (1.0f - s));
}

template <class T, int Terms>
static void series_forward_tile(const T *x, const float *a, const float *b, T *y, int64_t rows, int64_t f,
                                int64_t n, int64_t width) {
  if (Terms >= 0) n = Terms;
  for (int64_t r = 0; r < rows; ++r, x += 2 * f, y += f) {
    FOR_LANES(j, width, {
      F g = load(x + j, lanes);
      F total = n == 0 ? g * sigmoid(g) : F{};
      for (int64_t i = 0; i < n; ++i) {
        F z = load(a + i * f + j, lanes) * g + load(b + i * f + j, lanes);
        total += z * sigmoid(z);
      }
      store(y + j, total * load(x + f + j, lanes), lanes);
    })
  }
}

// `sums` holds this row block's part of [da; db]: [2 n, f].
template <class T, int Terms>
static void series_backward_tile(const T *x, const float *a, const float *b, const T *dy, T *dx, float *sums,
                                 int64_t rows, int64_t f, int64_t n, int64_t width) {
  if (Terms >= 0) n = Terms;
  for (int64_t i = 0; i < 2 * n; ++i) std::fill_n(sums + i * f, width, 0.0f);
  for (int64_t r = 0; r < rows; ++r, x += 2 * f, dx += 2 * f, dy += f) {
    FOR_LANES(j, width, {
      F g = load(x + j, lanes);
      F grad = load(dy + j, lanes);
      F gate_grad = grad * load(x + f + j, lanes);
      F total = F{};
      F slope = F{};
      if (n == 0) value_and_slope(g, total, slope);
      for (int64_t i = 0; i < n; ++i) {
        F scale = load(a + i * f + j, lanes);
        F value;
        F term_slope;
        value_and_slope(scale * g + load(b + i * f + j, lanes), value, term_slope);
        total += value;
        slope += scale * term_slope;
        float *da = sums + i * f + j;
        float *db = sums + (n + i) * f + j;
        F q = gate_grad * term_slope;
        store(da, load(da, lanes) + q * g, lanes);
        store(db, load(db, lanes) + q, lanes);
      }
      store(dx + j, gate_grad * slope, lanes);
      store(dx + f + j, grad * total, lanes);
    })
  }
}

// Tiles keep a, b and the running sums of a column range in the L1 cache.
constexpr int64_t kTile = 1024;

template <class T>
static void series_forward(const T *x, const float *a, const float *b, T *y, int64_t rows, int64_t f, int64_t n,
                           int threads) {
  auto tile = n == 0 ? series_forward_tile<T, 0> : n == 2 ? series_forward_tile<T, 2> : series_forward_tile<T, -1>;
  int64_t tiles = (f + kTile - 1) / kTile;
  Blocks blocks(rows, 32);
  expect_large_write(y, rows * f * sizeof(T));
  parallel_for(blocks.count * tiles, threads, [&](int64_t task) {
    int64_t r = task / tiles * blocks.size, j = task % tiles * kTile;
    tile(x + r * 2 * f + j, a + j, b + j, y + r * f + j, std::min(blocks.size, rows - r), f, n,
         std::min(kTile, f - j));
  });
}

template <class T>
static void series_backward(const T *x, const float *a, const float *b, const T *dy, T *dx, float *da, float *db,
                            int64_t rows, int64_t f, int64_t n, int threads) {
  auto tile = n == 0 ? series_backward_tile<T, 0> : n == 2 ? series_backward_tile<T, 2> : series_backward_tile<T, -1>;
  int64_t tiles = (f + kTile - 1) / kTile;
  Blocks blocks(rows, 32);
  std::unique_ptr<float[]> sums(new float[blocks.count * 2 * n * f]);
  expect_large_write(dx, rows * 2 * f * sizeof(T));
  parallel_for(blocks.count * tiles, threads, [&](int64_t task) {
    int64_t block = task / tiles, r = block * blocks.size, j = task % tiles * kTile;
    tile(x + r * 2 * f + j, a + j, b + j, dy + r * f + j, dx + r * 2 * f + j, sums.get() + block * 2 * n * f + j,
         std::min(blocks.size, rows - r), f, n, std::min(kTile, f - j));
  });
  add_blocks(sums.get(), blocks.count, 2 * n * f, n * f, da, threads);
  add_blocks(sums.get() + n * f, blocks.count, 2 * n * f, n * f, db, threads);
}
