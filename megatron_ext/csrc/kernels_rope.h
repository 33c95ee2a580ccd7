// Rotary position embedding, which rotates the two halves (GPT-NeoX style; no include guard:
// once per instruction set).
//   y1 = t1 c1 - t2 s1,  y2 = t2 c2 + t1 s2, elements past `rot` are copied;
// its transpose is the backward pass:  d1 = y1 c1 + y2 s2,  d2 = y2 c2 - y1 s1.
// t: [s, b, n, d] with stride 1 for d and any other strides; out likewise; cosine, sine: [s, rot].

template <class T, bool Transpose>
static void rope_head(const T *t, const float *c, const float *s, T *out, int64_t half) {
  FOR_LANES(j, half, {
    F t1 = load(t + j, lanes);
    F t2 = load(t + half + j, lanes);
    F s1 = load(s + j, lanes);
    F s2 = load(s + half + j, lanes);
    F c1 = load(c + j, lanes);
    F c2 = load(c + half + j, lanes);
    store(out + j, Transpose ? t1 * c1 + t2 * s2 : t1 * c1 - t2 * s1, lanes);
    store(out + half + j, Transpose ? t2 * c2 - t1 * s1 : t2 * c2 + t1 * s2, lanes);
  })
}

template <class T>
static void rope(const T *t, const float *cosine, const float *sine, T *out, const RopeShape &shape, bool transpose,
                 int threads) {
  auto head = transpose ? rope_head<T, true> : rope_head<T, false>;
  Blocks blocks(shape.s, rows_for(shape.b * shape.n * shape.d), 256);
  parallel_for(blocks.count, threads, [&](int64_t block) {
    for (int64_t i = block * blocks.size; i < std::min(shape.s, (block + 1) * blocks.size); ++i)
      for (int64_t j = 0; j < shape.b; ++j)
        for (int64_t k = 0; k < shape.n; ++k) {
          const T *from = t + i * shape.in[0] + j * shape.in[1] + k * shape.in[2];
          T *to = out + i * shape.out[0] + j * shape.out[1] + k * shape.out[2];
          head(from, cosine + i * shape.rot, sine + i * shape.rot, to, shape.rot / 2);
          if (from != to) std::copy(from + shape.rot, from + shape.d, to + shape.rot);
        }
  });
}
