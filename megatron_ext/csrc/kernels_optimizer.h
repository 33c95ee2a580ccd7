// Sum of squares and scaling over lists of flat tensors (no include guard: once per
// instruction set). Lists are divided into pieces, each a range of one tensor.

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
