// Causal self attention on the joint QKV projection, including norms of queries and keys and rotary embedding (no
// include guard: once per instruction set). No [s, s] matrix is stored: scores are computed in blocks of kBlock x
// kBlock, and blocks without a visible key are skipped.
//   qkv: [s, b, groups, (r + 2) d], the r query heads of a group, then its key, then its value
//   out: [s, b, groups r d];  lse: [b, groups r, s], the logarithm of each softmax's denominator
// Scores are stored transposed, [key, query]: a vector holds one key's scores for W queries, so that
// maxima and sums over keys need no exchange between lanes. All intermediate values are float32.

constexpr int64_t kBlock = 64;
constexpr int64_t kStrip = 16;  // blocks on the causal diagonal are cut into strips, to skip masked scores
constexpr int64_t kAhead = 8;   // number of rows to prefetch ahead

// Rows are far apart in memory, so the hardware prefetcher does not predict the next one.
template <class T>
INLINE void prefetch(const T *row, int64_t n) {
  for (int64_t j = 0; j < n; j += 64 / sizeof(T)) __builtin_prefetch(row + j);
}

// dst = src, rotated by the cosines and sines of its row; they may be the same.
template <class T>
static void rotate_row(const T *src, const float *c, const float *s, int64_t rot, float *dst, int64_t d) {
  const int64_t half = rot / 2;
  FOR_LANES(j, half, {
    F t1 = load(src + j, lanes);
    F t2 = load(src + half + j, lanes);
    store(dst + j, t1 * load(c + j, lanes) - t2 * load(s + j, lanes), lanes);
    store(dst + half + j, t2 * load(c + half + j, lanes) + t1 * load(s + half + j, lanes), lanes);
  })
  FOR_LANES(j, d - rot, { store(dst + rot + j, load(src + rot + j, lanes), lanes); })
}

// dst = factor * src, rotated by the opposite angles; they may be the same.
template <class T>
static void rotate_row_back(const float *src, const float *c, const float *s, int64_t rot, float factor, T *dst,
                            int64_t d) {
  const int64_t half = rot / 2;
  FOR_LANES(j, half, {
    F y1 = load(src + j, lanes) * factor;
    F y2 = load(src + half + j, lanes) * factor;
    store(dst + j, y1 * load(c + j, lanes) + y2 * load(s + half + j, lanes), lanes);
    store(dst + half + j, y2 * load(c + half + j, lanes) - y1 * load(s + j, lanes), lanes);
  })
  FOR_LANES(j, d - rot, { store(dst + rot + j, load(src + rot + j, lanes) * factor, lanes); })
}

// dst [rows, d] = src, normalized and rotated by the angles of rows first, first + 1, ... if it is to be.
template <class T>
static void gather(const T *src, int64_t stride, int64_t rows, const HeadTransform &by, int64_t first, float *dst,
                   int64_t d) {
  const int64_t rot = by.rotation.rot;
  for (int64_t i = 0; i < rows; ++i, src += stride, dst += d) {
    prefetch(src + kAhead * stride, d);
    const float *c = by.rotation.cosine + (first + i) * rot, *s = by.rotation.sine + (first + i) * rot;
    if (by.norm.gain == nullptr) {
      rotate_row(src, c, s, rot, dst, d);
    } else {
      float rstd;
      rms_norm_row(src, by.norm.gain, dst, &rstd, d, by.norm.eps);
      if (rot > 0) rotate_row(dst, c, s, rot, dst, d);
    }
  }
}

// The backward pass of `gather`: factor * grad [rows, d], which is overwritten, becomes the gradient of src, in
// dst; the gradient of the gain is added to gain_grad [d].
template <class T>
static void scatter(float *grad, int64_t rows, const HeadTransform &by, int64_t first, float factor, const T *src,
                    T *dst, int64_t stride, int64_t d, float *gain_grad) {
  const int64_t rot = by.rotation.rot;
  for (int64_t i = 0; i < rows; ++i, grad += d, src += stride, dst += stride) {
    const float *c = by.rotation.cosine + (first + i) * rot, *s = by.rotation.sine + (first + i) * rot;
    if (by.norm.gain == nullptr) {
      rotate_row_back(grad, c, s, rot, factor, dst, d);
    } else {
      rotate_row_back(grad, c, s, rot, factor, grad, d);
      rms_norm_row_backward(grad, src, by.norm.gain, rms_norm_rstd(src, d, by.norm.eps), dst, gain_grad, d);
    }
  }
}

// dst [d, kBlock] = factor * transpose of src [rows, d]; columns past `rows` are zero.
static void transpose_block(const float *src, int64_t rows, int64_t d, float factor, float *dst) {
  for (int64_t c = 0; c < d; ++c) {
    float *to = dst + c * kBlock;
    for (int64_t r = 0; r < rows; ++r) to[r] = src[r * d + c] * factor;
    std::fill(to + rows, to + kBlock, 0.0f);
  }
}

// Scores [keys, kBlock] of a block on the diagonal: -inf if the key comes after the query. A row is
// never read to the left of its strip.
static void mask_block(float *scores, int64_t keys) {
  for (int64_t r = 0; r < keys; ++r) {
    const int64_t strip = r / kStrip * kStrip;
    std::fill_n(scores + r * kBlock + strip, r - strip, -std::numeric_limits<float>::infinity());
  }
}

// Scores of n queries and the keys from k0 on: -inf where the query's first visible key is a later one.
static void mask_before(float *scores, int64_t keys, int64_t n, int64_t k0, const int32_t *first) {
  int64_t seen = 0;  // queries before this one see the key, because `first` ascends
  for (int64_t r = 0; r < keys; ++r) {
    while (seen < n && first[seen] <= k0 + r) ++seen;
    std::fill_n(scores + r * kBlock + seen, n - seen, -std::numeric_limits<float>::infinity());
  }
}

// The keys that a block of n queries from q0 on attends to, in blocks: the block at k0 begins with key `from(k0)`.
struct VisibleKeys {
  const int32_t *first;  // of each query, the first key that it sees; null for key 0
  int64_t q0, n, start;  // start: the first key that one of the queries sees, at the beginning of a strip

  VisibleKeys(const int32_t *first_keys, int64_t q0, int64_t n)
      : first(first_keys == nullptr ? nullptr : first_keys + q0), q0(q0), n(n),
        start(first == nullptr ? 0 : first[0] / kStrip * kStrip) {}

  int64_t first_block() const { return start / kBlock * kBlock; }
  int64_t from(int64_t k0) const { return std::max(k0, start); }
  int64_t count(int64_t k0) const { return std::min(k0 + kBlock, q0 + n) - from(k0); }
  void mask(float *scores, int64_t k0) const {
    if (k0 == q0) mask_block(scores, n);
    if (first != nullptr && first[n - 1] > from(k0)) mask_before(scores, count(k0), n, from(k0), first);
  }
};

// Replaces scores by exp(score - top), with the running maximum `top` and sum `total` of each query;
// `decay` is the factor for earlier sums.
static void softmax_block(float *scores, int64_t keys, int64_t strip, float *top, float *total, float *decay) {
  for (int64_t j = 0; j < kBlock; j += W) {
    const int64_t count = std::min(keys, j / strip * strip + strip);
    F before = load(top + j);
    F tops[2] = {before, before};
    for (int64_t r = 0; r < count; ++r) tops[r & 1] = larger(load(scores + r * kBlock + j), tops[r & 1]);
    F now = larger(tops[0], tops[1]);
    F shrink = exp(before - now);
    F sums[2] = {load(total + j) * shrink, F{}};
    for (int64_t r = 0; r < count; ++r) {
      F p = exp(load(scores + r * kBlock + j) - now);
      store(scores + r * kBlock + j, p);
      sums[r & 1] += p;
    }
    store(top + j, now);
    store(total + j, sums[0] + sums[1]);
    store(decay + j, shrink);
  }
}

// The three products with a block of scores [keys, queries]. On the diagonal, where the keys of a strip are
// visible only to queries from that strip on, `strip` is kStrip; elsewhere it is kBlock, the whole block.

// scores [keys, kBlock] = k [keys, d] q_t [d, kBlock]
static void scores_block(const float *k, const float *q_t, float *scores, int64_t keys, int64_t d, int64_t strip) {
  for (int64_t t = 0; t < keys; t += strip)
    product(k + t * d, d, 1, q_t + t, kBlock, scores + t * kBlock + t, kBlock, std::min(strip, keys - t), kBlock - t,
            d, false);
}

// out [n, d] (+)= scores^T x, x [keys, d]
static void query_sums(const float *scores, const float *x, float *out, int64_t n, int64_t keys, int64_t d,
                       int64_t strip, bool add) {
  for (int64_t t = 0; t < n; t += strip)
    product(scores + t, 1, kBlock, x, d, out + t * d, d, std::min(strip, n - t), d, std::min(keys, t + strip), add);
}

// out [keys, d] += scores y, y [n, d]
static void key_sums(const float *scores, const float *y, float *out, int64_t n, int64_t keys, int64_t d,
                     int64_t strip) {
  for (int64_t t = 0; t < keys; t += strip)
    product(scores + t * kBlock + t, kBlock, 1, y + t * d, d, out + t * d, d, std::min(strip, keys - t), d, n - t, true);
}

struct AttentionBlock {  // the state of a task for a block of queries
  float *q, *q_t, *scores, *out, *grad, *grad_t, *score_grads;
};

// One head, queries q0 .. q0 + n: their outputs in `w.out`, not yet divided by `total`.
// The diagonal comes first: there each query sees a key, itself, so that its maximum is a number from then on.
static void attend_queries(const float *keys, const float *values, const VisibleKeys &visible, int64_t d,
                           AttentionBlock w, float *top, float *total) {
  const int64_t q0 = visible.q0, n = visible.n;
  alignas(64) float decay[kBlock];
  std::fill_n(top, kBlock, -std::numeric_limits<float>::infinity());
  std::fill_n(total, kBlock, 0.0f);
  for (int64_t k0 = q0; k0 >= visible.first_block(); k0 -= kBlock) {
    const int64_t from = visible.from(k0), count = visible.count(k0), strip = k0 == q0 ? kStrip : kBlock;
    scores_block(keys + from * d, w.q_t, w.scores, count, d, strip);
    visible.mask(w.scores, k0);
    softmax_block(w.scores, count, strip, top, total, decay);
    for (int64_t i = 0; k0 < q0 && i < n; ++i) FOR_LANES(j, d, { store(w.out + i * d + j, load(w.out + i * d + j, lanes) * decay[i], lanes); })
    query_sums(w.scores, values + from * d, w.out, n, count, d, strip, k0 < q0);
  }
}

template <class T>
static void attention_forward(const T *qkv, const HeadTransform &queries, const HeadTransform &keys_by, T *out,
                              float *lse, const AttentionShape &s, int threads) {
  const int64_t d = s.d, heads = s.groups * s.r, width = (s.r + 2) * d;
  const int64_t in_row = s.b * s.groups * width, out_row = s.b * heads * d;
  const HeadTransform none{};
  parallel_for(s.b * heads, threads, [&](int64_t task) {
    const int64_t batch = task / heads, head = task % heads, group = head / s.r;
    Scratch scratch(2 * s.s * d + 3 * kBlock * d + kBlock * kBlock);
    float *keys = scratch.take(s.s * d), *values = scratch.take(s.s * d);
    AttentionBlock w{};
    w.q = scratch.take(kBlock * d), w.q_t = scratch.take(kBlock * d), w.out = scratch.take(kBlock * d);
    w.scores = scratch.take(kBlock * kBlock);
    const T *from = qkv + (batch * s.groups + group) * width;
    gather(from + s.r * d, in_row, s.s, keys_by, 0, keys, d);
    gather(from + (s.r + 1) * d, in_row, s.s, none, 0, values, d);
    for (int64_t q0 = 0; q0 < s.s; q0 += kBlock) {
      alignas(64) float top[kBlock], total[kBlock];
      const int64_t n = std::min(kBlock, s.s - q0);
      gather(from + head % s.r * d + q0 * in_row, in_row, n, queries, q0, w.q, d);
      transpose_block(w.q, n, d, s.scale, w.q_t);
      attend_queries(keys, values, {s.first_of(batch), q0, n}, d, w, top, total);
      for (int64_t i = 0; i < n; ++i) {
        T *to = out + (q0 + i) * out_row + (batch * heads + head) * d;
        FOR_LANES(j, d, { store(to + j, load(w.out + i * d + j, lanes) * (1.0f / total[i]), lanes); })
        lse[task * s.s + q0 + i] = top[i] + std::log(total[i]);
      }
    }
  });
}

// p = exp(score - lse);  score_grads = p (score_grads - delta), queries in lanes.
static void softmax_block_backward(AttentionBlock w, int64_t keys, int64_t strip, const float *lse,
                                   const float *delta) {
  for (int64_t j = 0; j < kBlock; j += W) {
    const int64_t count = std::min(keys, j / strip * strip + strip);
    F base = load(lse + j);
    F mean = load(delta + j);
    for (int64_t r = 0; r < count; ++r) {
      int64_t at = r * kBlock + j;
      F p = exp(load(w.scores + at) - base);
      store(w.scores + at, p);
      store(w.score_grads + at, p * (load(w.score_grads + at) - mean));
    }
  }
}

// Adds the contribution of queries q0 .. q0 + n to the gradients of keys and values; their own are in `w.out`.
static void attend_queries_backward(const float *keys, const float *values, const VisibleKeys &visible, int64_t d,
                                    AttentionBlock w, const float *lse, const float *delta, float *key_grads,
                                    float *value_grads) {
  const int64_t q0 = visible.q0, n = visible.n, start = visible.first_block();
  for (int64_t k0 = start; k0 < q0 + n; k0 += kBlock) {
    const int64_t from = visible.from(k0), count = visible.count(k0), strip = k0 == q0 ? kStrip : kBlock;
    scores_block(keys + from * d, w.q_t, w.scores, count, d, strip);
    visible.mask(w.scores, k0);
    scores_block(values + from * d, w.grad_t, w.score_grads, count, d, strip);
    softmax_block_backward(w, count, strip, lse, delta);
    key_sums(w.scores, w.grad, value_grads + from * d, n, count, d, strip);
    key_sums(w.score_grads, w.q, key_grads + from * d, n, count, d, strip);
    query_sums(w.score_grads, keys + from * d, w.out, n, count, d, strip, k0 > start);
  }
}

// delta_i = sum_j grad_ij out_ij, one number per query.
template <class T>
static void row_dots(const float *grad, const T *out, int64_t stride, int64_t rows, int64_t d, float *delta) {
  std::fill_n(delta, kBlock, 0.0f);
  for (int64_t i = 0; i < rows; ++i) {
    F total = F{};
    FOR_LANES(j, d, { total += load(grad + i * d + j, lanes) * load(out + i * stride + j, lanes); })
    delta[i] = sum(total);
  }
}

template <class T>
static void attention_backward(const T *qkv, const HeadTransform &queries, const HeadTransform &keys_by, const T *out,
                               const float *lse, const T *grad, T *qkv_grad, float *gain_grads,
                               const AttentionShape &s, int threads) {
  const int64_t d = s.d, heads = s.groups * s.r, width = (s.r + 2) * d;
  const int64_t in_row = s.b * s.groups * width, out_row = s.b * heads * d;
  const HeadTransform none{};
  expect_large_write(qkv_grad, s.s * in_row * sizeof(T));
  parallel_for(s.b * s.groups, threads, [&](int64_t task) {
    const int64_t batch = task / s.groups, group = task % s.groups;
    Scratch scratch(4 * s.s * d + 5 * kBlock * d + 2 * kBlock * kBlock);
    float *keys = scratch.take(s.s * d), *values = scratch.take(s.s * d);
    float *key_grads = scratch.take(s.s * d), *value_grads = scratch.take(s.s * d);
    AttentionBlock w{};
    w.q = scratch.take(kBlock * d), w.q_t = scratch.take(kBlock * d), w.out = scratch.take(kBlock * d);
    w.grad = scratch.take(kBlock * d), w.grad_t = scratch.take(kBlock * d);
    w.scores = scratch.take(kBlock * kBlock), w.score_grads = scratch.take(kBlock * kBlock);
    const T *from = qkv + task * width;
    T *to = qkv_grad + task * width;
    float *query_gain_grad = gain_grads == nullptr ? nullptr : gain_grads + task * 2 * d;
    float *key_gain_grad = query_gain_grad == nullptr ? nullptr : query_gain_grad + d;
    if (query_gain_grad != nullptr) std::fill_n(query_gain_grad, 2 * d, 0.0f);
    gather(from + s.r * d, in_row, s.s, keys_by, 0, keys, d);
    gather(from + (s.r + 1) * d, in_row, s.s, none, 0, values, d);
    std::fill_n(key_grads, s.s * d, 0.0f);
    std::fill_n(value_grads, s.s * d, 0.0f);
    for (int64_t head = 0; head < s.r; ++head) {
      const int64_t column = (batch * heads + group * s.r + head) * d;
      const float *head_lse = lse + (batch * heads + group * s.r + head) * s.s;
      for (int64_t q0 = 0; q0 < s.s; q0 += kBlock) {
        alignas(64) float denominators[kBlock] = {}, delta[kBlock];
        const int64_t n = std::min(kBlock, s.s - q0);
        gather(from + head * d + q0 * in_row, in_row, n, queries, q0, w.q, d);
        transpose_block(w.q, n, d, s.scale, w.q_t);
        gather(grad + q0 * out_row + column, out_row, n, none, 0, w.grad, d);
        transpose_block(w.grad, n, d, 1.0f, w.grad_t);
        row_dots(w.grad, out + q0 * out_row + column, out_row, n, d, delta);
        std::copy_n(head_lse + q0, n, denominators);
        attend_queries_backward(keys, values, {s.first_of(batch), q0, n}, d, w, denominators, delta, key_grads,
                                value_grads);
        const int64_t at = head * d + q0 * in_row;
        scatter(w.out, n, queries, q0, s.scale, from + at, to + at, in_row, d, query_gain_grad);
      }
    }
    scatter(key_grads, s.s, keys_by, 0, s.scale, from + s.r * d, to + s.r * d, in_row, d, key_gain_grad);
    scatter(value_grads, s.s, none, 0, 1.0f, from + (s.r + 1) * d, to + (s.r + 1) * d, in_row, d, nullptr);
  });
}
