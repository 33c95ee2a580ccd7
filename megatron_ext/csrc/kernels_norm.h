// RMSNorm (no include guard: once per instruction set).
//   rstd = (mean(x^2) + eps)^(-1/2),  y = x rstd w

template <class T>
static float rms_norm_rstd(const T *x, int64_t h, float eps) {
  F squares[2] = {};
  FOR_LANES(j, h, {
    F value = load(x + j, lanes);
    squares[(j / W) & 1] += value * value;
  })
  return 1.0f / std::sqrt(sum(squares[0] + squares[1]) / h + eps);
}

template <class T, class Y>
static void rms_norm_row(const T *x, const float *w, Y *y, float *rstd, int64_t h, float eps) {
  *rstd = rms_norm_rstd(x, h, eps);
  FOR_LANES(j, h, { store(y + j, load(x + j, lanes) * *rstd * load(w + j, lanes), lanes); })
}

// dx = rstd (w dy - x_hat mean(w dy x_hat)),  x_hat = x rstd;  dw += dy x_hat.
template <class G, class T>
static void rms_norm_row_backward(const G *dy, const T *x, const float *w, float rstd, T *dx, float *dw, int64_t h) {
  F dots[2] = {};
  FOR_LANES(j, h, {
    F grad = load(dy + j, lanes);
    F hat = load(x + j, lanes) * rstd;
    store(dw + j, load(dw + j, lanes) + grad * hat, lanes);
    dots[(j / W) & 1] += grad * load(w + j, lanes) * hat;
  })
  float mean = sum(dots[0] + dots[1]) / h;
  FOR_LANES(j, h, {
    F hat = load(x + j, lanes) * rstd;
    store(dx + j, (load(dy + j, lanes) * load(w + j, lanes) - hat * mean) * rstd, lanes);
  })
}

template <class T>
static void rms_norm_forward(const T *x, const float *w, T *y, float *rstd, int64_t rows, int64_t h, float eps,
                             int threads) {
  Blocks blocks(rows, rows_for(h), 256);
  expect_large_write(y, rows * h * sizeof(T));
  parallel_for(blocks.count, threads, [&](int64_t block) {
    for (int64_t r = block * blocks.size; r < std::min(rows, (block + 1) * blocks.size); ++r)
      rms_norm_row(x + r * h, w, y + r * h, rstd + r, h, eps);
  });
}

template <class T>
static void rms_norm_backward(const T *dy, const T *x, const float *w, const float *rstd, T *dx, float *dw,
                              int64_t rows, int64_t h, int threads) {
  Blocks blocks(rows, rows_for(h));
  std::unique_ptr<float[]> sums(new float[blocks.count * h]);
  expect_large_write(dx, rows * h * sizeof(T));
  parallel_for(blocks.count, threads, [&](int64_t block) {
    float *share = sums.get() + block * h;
    std::fill_n(share, h, 0.0f);
    for (int64_t r = block * blocks.size; r < std::min(rows, (block + 1) * blocks.size); ++r)
      rms_norm_row_backward(dy + r * h, x + r * h, w, rstd[r], dx + r * h, share, h);
  });
  add_blocks(sums.get(), blocks.count, h, h, dw, threads);
}
