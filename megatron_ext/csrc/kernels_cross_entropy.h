// Cross entropy over a shard of the vocabulary (no include guard: once per instruction set).
// logits: [rows, v], this shard's columns [first, first + v) of the vocabulary; target: [rows]. The first n columns
// are in the softmax; the others are the vocabulary's padding and count as -inf.

// top = max_j l_j,  total = sum_j exp(l_j - top),  chosen = l_target, or 0 if it is in another shard.
template <class T>
static void cross_entropy_row(const T *l, int64_t column, float *top, float *total, float *chosen, int64_t n,
                              int64_t v) {
  const float lowest = -std::numeric_limits<float>::infinity();
  F tops[2] = {splat(lowest), splat(lowest)};
  FOR_LANES(j, n, { tops[(j / W) & 1] = larger(load(l + j, lanes, lowest), tops[(j / W) & 1]); })
  *top = maximum(larger(tops[0], tops[1]));
  F shift = splat(*top == lowest ? 0.0f : *top);  // a row of -inf sums to 0, not NaN
  F totals[2] = {};
  FOR_LANES(j, n, { totals[(j / W) & 1] += exp(load(l + j, lanes, lowest) - shift); })
  *total = sum(totals[0] + totals[1]);
  bool here = column >= 0 && column < v;
  *chosen = here ? (column < n ? to_float(l[column]) : lowest) : 0.0f;
}

template <class T>
static void cross_entropy_forward(const T *logits, const int64_t *target, int64_t first, float *top, float *total,
                                  float *chosen, int64_t rows, int64_t n, int64_t v, int threads) {
  Blocks blocks(rows, rows_for(v), 256);
  parallel_for(blocks.count, threads, [&](int64_t block) {
    for (int64_t r = block * blocks.size; r < std::min(rows, (block + 1) * blocks.size); ++r)
      cross_entropy_row(logits + r * v, target[r] - first, top + r, total + r, chosen + r, n, v);
  });
}

// out_j = grad (exp(l_j - top) / total - [j is the target]), top and total over the whole vocabulary; padding: 0.
template <class T>
static void cross_entropy_row_backward(const T *l, int64_t column, float top, float total, float grad, T *out,
                                       int64_t n, int64_t v) {
  float scale = grad / total;
  // saved before the loop overwrites it: subtracted in float, then rounded once
  float chosen = column >= 0 && column < n ? to_float(l[column]) : 0.0f;
  FOR_LANES(j, n, { store(out + j, exp(load(l + j, lanes) - top) * scale, lanes); })
  std::fill(out + n, out + v, T{});
  if (column >= 0 && column < n) {
    F at_target = exp(splat(chosen) - top) * scale - grad;
    store(out + column, at_target, 1);
  }
}

template <class T>
static void cross_entropy_backward(const T *logits, const int64_t *target, int64_t first, const float *top,
                                   const float *total, const float *grad, T *out, int64_t rows, int64_t n,
                                   int64_t v, int threads) {
  Blocks blocks(rows, rows_for(v), 256);
  parallel_for(blocks.count, threads, [&](int64_t block) {
    for (int64_t r = block * blocks.size; r < std::min(rows, (block + 1) * blocks.size); ++r)
      cross_entropy_row_backward(logits + r * v, target[r] - first, top[r], total[r], grad[r], out + r * v, n,
                                 v);
  });
}
