// Cross entropy and the divergence from a teacher over a shard of the vocabulary (no include guard: once per
// instruction set). logits and teacher: [rows, v]; `inverse` is 1 / temperature. Other names are those of
// kernels_cross_entropy.h; formulas: megatron_ext/kernels/distillation.py.

// Below it exp is 0; a logit of -inf is taken as this, since 0 times -inf is NaN.
constexpr float kLowest = -104.0f;

// soft = sum_j exp((l_j - top) / T).
template <class T>
static float soft_total(const T *l, float top, float inverse, int64_t n) {
  const float lowest = -std::numeric_limits<float>::infinity();
  F shift = splat(top == lowest ? 0.0f : top), totals[2] = {};
  FOR_LANES(j, n, { totals[(j / W) & 1] += exp((load(l + j, lanes, lowest) - shift) * inverse); })
  return sum(totals[0] + totals[1]);
}

// total = sum_j e_j with e_j = exp((u_j - top) / T),  cross = sum_j e_j ((u_j - top) - (l_j - student)) / T.
template <class T, class U>
static void teacher_row(const T *l, const U *u, float student, float inverse, float *top, float *total, float *cross,
                        int64_t n) {
  const float lowest = -std::numeric_limits<float>::infinity();
  F tops[2] = {splat(lowest), splat(lowest)};
  FOR_LANES(j, n, { tops[(j / W) & 1] = larger(load(u + j, lanes, lowest), tops[(j / W) & 1]); })
  *top = maximum(larger(tops[0], tops[1]));
  F shift = splat(*top == lowest ? 0.0f : *top), totals[2] = {}, crosses[2] = {};
  FOR_LANES(j, n, {
    F d = (load(u + j, lanes, lowest) - shift) * inverse;
    d = d < splat(kLowest) ? splat(kLowest) : d;  // a NaN passes
    F e = exp(d);
    totals[(j / W) & 1] += e;
    crosses[(j / W) & 1] += e * (d - (load(l + j, lanes, student) - student) * inverse);
  })
  *total = sum(totals[0] + totals[1]);
  *cross = sum(crosses[0] + crosses[1]);
}

// stats: [7, rows]: top, total, chosen, soft, and the teacher's top, total and cross, which are left alone without
// a teacher.
template <class T, class U>
static void distillation_forward(const T *logits, const int64_t *target, int64_t first, const U *teacher,
                                 float inverse, float *stats, int64_t rows, int64_t n, int64_t v, int threads) {
  Blocks blocks(rows, rows_for(v), 256);
  parallel_for(blocks.count, threads, [&](int64_t block) {
    for (int64_t r = block * blocks.size; r < std::min(rows, (block + 1) * blocks.size); ++r) {
      const T *l = logits + r * v;
      float *s = stats + r;
      cross_entropy_row(l, target[r] - first, s, s + rows, s + 2 * rows, n, v);
      s[3 * rows] = inverse == 1.0f ? s[rows] : soft_total(l, *s, inverse, n);
      if (teacher != nullptr)
        teacher_row(l, teacher + r * v, *s, inverse, s + 4 * rows, s + 5 * rows, s + 6 * rows, n);
    }
  });
}

// Factors of a row's gradient: of exp(l_j - top), exp((l_j - top) / T), exp((u_j - teacher_top) / T), and what is
// subtracted at the target.
struct DistillationFactors {
  float top, teacher_top, hard, soft, teacher, chosen;
};

template <class U>
INLINE F distillation_gradient(F l, const U *u, int64_t j, int lanes, const DistillationFactors &f, float inverse) {
  F x = l - f.top;
  F gradient = inverse == 1.0f ? exp(x) * (f.hard + f.soft) : exp(x) * f.hard + exp(x * inverse) * f.soft;
  if (u != nullptr) gradient -= exp((load(u + j, lanes) - f.teacher_top) * inverse) * f.teacher;
  return gradient;
}

template <class T, class U>
static void distillation_row_backward(T *l, int64_t column, const U *u, const DistillationFactors &f, float inverse,
                                      int64_t n, int64_t v) {
  bool here = column >= 0 && column < n;
  float chosen = here ? to_float(l[column]) : 0.0f;  // saved before the loop overwrites it: rounded once
  FOR_LANES(j, n, { store(l + j, distillation_gradient(load(l + j, lanes), u, j, lanes, f, inverse), lanes); })
  std::fill(l + n, l + v, T{});
  if (here) store(l + column, distillation_gradient(splat(chosen), u, column, 1, f, inverse) - f.chosen, 1);
}

// Overwrites the logits with their gradient. factors: [6, rows], in the order of DistillationFactors.
template <class T, class U>
static void distillation_backward(T *logits, const int64_t *target, int64_t first, const U *teacher, float inverse,
                                  const float *factors, int64_t rows, int64_t n, int64_t v, int threads) {
  Blocks blocks(rows, rows_for(v), 256);
  parallel_for(blocks.count, threads, [&](int64_t block) {
    for (int64_t r = block * blocks.size; r < std::min(rows, (block + 1) * blocks.size); ++r) {
      const float *f = factors + r;
      DistillationFactors row{f[0], f[rows], f[2 * rows], f[3 * rows], f[4 * rows], f[5 * rows]};
      const U *u = teacher == nullptr ? nullptr : teacher + r * v;
      distillation_row_backward(logits + r * v, target[r] - first, u, row, inverse, n, v);
    }
  });
}
