// Vectors of W floats, W = KERNELS_WIDTH. Included once for every instruction set, inside its
// namespace (no include guard), so that each set gets its own copy of everything below.
// Uses the vector extensions of GCC and clang, without intrinsics.

constexpr int W = KERNELS_WIDTH;
typedef float F __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint16_t H __attribute__((vector_size(2 * W)));
typedef float HalfF __attribute__((vector_size(2 * W)));
typedef double D __attribute__((vector_size(4 * W)));  // W / 2 doubles

#define INLINE static inline __attribute__((always_inline))

INLINE F splat(float value) { return value - F{}; }  // x - 0 is x, also for -0, and costs nothing

INLINE F widen(H bits) { return (F)(__builtin_convertvector(bits, U) << 16); }

// float to bfloat16, to nearest even; a NaN stays a NaN.
INLINE H narrow(F value) {
  U bits = (U)value;
  U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  U quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector((U)(value == value ? (I)rounded : (I)quiet), H);
}

INLINE F load(const float *p) {
  F value;
  __builtin_memcpy(&value, p, sizeof(F));
  return value;
}
INLINE F load(const Bf16 *p) {
  H bits;
  __builtin_memcpy(&bits, p, sizeof(H));
  return widen(bits);
}
INLINE void store(float *p, F value) { __builtin_memcpy(p, &value, sizeof(F)); }
INLINE void store(Bf16 *p, F value) {
  H bits = narrow(value);
  __builtin_memcpy(p, &bits, sizeof(H));
}

// The first `lanes` elements at a row's end. Not inlined, to reduce code size and compile time: they run
// at most once per row.
template <class T>
__attribute__((noinline)) static F load_part(const T *p, int lanes, float rest) {
  T buffer[W] = {};
  std::copy_n(p, lanes, buffer);
  F value = load(buffer);
  for (int i = lanes; i < W; ++i) value[i] = rest;
  return value;
}
template <class T>
__attribute__((noinline)) static void store_part(T *p, F value, int lanes) {
  T buffer[W];
  store(buffer, value);
  std::copy_n(buffer, lanes, p);
}

// The first `lanes` elements, with `rest` in the other lanes. In FOR_LANES's full steps `lanes` is a
// constant and the test costs nothing.
template <class T>
INLINE F load(const T *p, int lanes, float rest = 0.0f) {
  return lanes == W ? load(p) : load_part(p, lanes, rest);
}
template <class T>
INLINE void store(T *p, F value, int lanes) {
  lanes == W ? store(p, value) : store_part(p, value, lanes);
}

INLINE float sum(F value) {
  float total = 0.0f;
  for (int i = 0; i < W; ++i) total += value[i];
  return total;
}
INLINE float maximum(F value) {
  float top = value[0];
  for (int i = 1; i < W; ++i) top = value[i] > top ? value[i] : top;
  return top;
}
INLINE F larger(F a, F b) { return a > b ? a : b; }

// exp(x), about 1 ulp (docs/kernels.md): x = k ln 2 + r, a polynomial in r, then 2^k by one instruction or
// as two factors, so that overflow gives inf and underflow passes through subnormals to 0.
INLINE F exp(F x) {
  x = x > splat(89.0f) ? splat(89.0f) : x;
  x = x < splat(-104.0f) ? splat(-104.0f) : x;  // a NaN passes both
  constexpr float kMagic = 12582912.0f;         // 1.5 * 2^23: adding it rounds to an integer
  F shifted = x * 1.44269504088896341f + kMagic;
  F k = shifted - kMagic;
  F r = x - k * 0.693359375f;
  r = r - k * -2.12194440e-4f;
  F p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  F result = p * (r * r) + r + 1.0f;
#ifdef KERNELS_SCALE
  return KERNELS_SCALE(result, k);
#else
  I n = (I)shifted - 0x4b400000;
  I half = n >> 1;
  return result * (F)((half + 127) << 23) * (F)((n - half + 127) << 23);
#endif
}

INLINE F sigmoid(F z) { return 1.0f / (1.0f + exp(-z)); }

// Runs the block over [0, n) in steps of W: `j` is the first element, `lanes` the number of elements, which
// is a constant except in the last, partial step.
#define FOR_LANES(j, n, ...)                                                    \
  {                                                                             \
    int64_t j = 0;                                                              \
    for (; j + W <= (n); j += W) {                                              \
      constexpr int lanes = W;                                                  \
      __VA_ARGS__                                                               \
    }                                                                           \
    if (j < (n)) {                                                              \
      const int lanes = static_cast<int>((n) - j);                              \
      __VA_ARGS__                                                               \
    }                                                                           \
  }

static void exponential(const float *x, float *y, int64_t n) {
  FOR_LANES(j, n, { store(y + j, exp(load(x + j, lanes)), lanes); })
}
