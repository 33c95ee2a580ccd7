// AdamW, sum of squares and scaling over lists of flat tensors (no include guard: once per
// instruction set). Lists come cut into pieces, each a range of one tensor.

// m = m + (1 - b1)(g - m),  v = b2 v + (1 - b2) g^2,
// p = p (1 - lr wd) - (lr / c1) m / (sqrt(v) / sqrt(c2) + eps),  c = 1 - b^step: decoupled decay.
template <class G>
static void adamw_piece(float *p, const G *g, float *m, float *v, Bf16 *copy, int64_t n, const AdamW &o) {
  FOR_LANES(j, n, {
    F grad = load(g + j, lanes) * o.grad_scale;
    F first = load(m + j, lanes);
    first += (grad - first) * o.one_minus_beta1;
    F second = load(v + j, lanes) * o.beta2 + grad * grad * o.one_minus_beta2;
    F denominator = square_root(second) / o.root_correction2 + o.eps;
    F param = load(p + j, lanes) * o.keep - o.step_size * first / denominator;
    store(m + j, first, lanes);
    store(v + j, second, lanes);
    store(p + j, param, lanes);
    if (copy) store(copy + j, param, lanes);
  })
}

template <class G>
static void adamw(const std::vector<Piece> &pieces, const AdamWLists &t, const AdamW &options, int threads) {
  parallel_for(pieces.size(), threads, [&](int64_t k) {
    const auto [i, begin, n] = pieces[k];
    Bf16 *copy = t.copy.empty() ? nullptr : reinterpret_cast<Bf16 *>(t.copy[i]) + begin;
    adamw_piece(reinterpret_cast<float *>(t.p[i]) + begin, reinterpret_cast<const G *>(t.g[i]) + begin,
                reinterpret_cast<float *>(t.m[i]) + begin, reinterpret_cast<float *>(t.v[i]) + begin, copy, n,
                options);
  });
}

template <class T>
static double squares_of_piece(const T *p, int64_t n) {
  D totals[2] = {};
  FOR_LANES(j, n, {
    F value = load(p + j, lanes);
    HalfF halves[2];
    __builtin_memcpy(halves, &value, sizeof(F));
    D low = __builtin_convertvector(halves[0], D);
    D high = __builtin_convertvector(halves[1], D);
    totals[0] += low * low;
    totals[1] += high * high;
  })
  double total = 0.0;
  for (int i = 0; i < W / 2; ++i) total += totals[0][i] + totals[1][i];
  return total;
}

template <class T>
static double sum_of_squares(const std::vector<Piece> &pieces, const Pointers &tensors, int threads) {
  std::vector<double> totals(pieces.size());
  parallel_for(pieces.size(), threads, [&](int64_t k) {
    const auto [i, begin, n] = pieces[k];
    totals[k] = squares_of_piece(reinterpret_cast<const T *>(tensors[i]) + begin, n);
  });
  return std::accumulate(totals.begin(), totals.end(), 0.0);
}

template <class T>
static void scale_piece(T *p, int64_t n, float factor) {
  FOR_LANES(j, n, { store(p + j, load(p + j, lanes) * factor, lanes); })
}

template <class T>
static void scale(const std::vector<Piece> &pieces, const Pointers &tensors, float factor, int threads) {
  parallel_for(pieces.size(), threads, [&](int64_t k) {
    const auto [i, begin, n] = pieces[k];
    scale_piece(reinterpret_cast<T *>(tensors[i]) + begin, n, factor);
  });
}
