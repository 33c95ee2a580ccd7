// megatron_ext._kernels: fused CPU kernels, forward and backward each one pass over memory.
//
// The functions receive addresses and sizes, so that the module builds without torch;
// megatron_ext/kernels/fused.py wraps them and checks their arguments. Formulas and numerics: docs/kernels.md.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kernels_common.h"

// Every namespace below has the same kernels, compiled for its instruction set. `portable` runs
// on any processor, the others on x86 processors that support them; chosen when the module is loaded.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define KERNELS_X86 1
#include <immintrin.h>
#endif

namespace kernels {

namespace portable {
#define KERNELS_WIDTH 4
#include "kernels_isa.h"
}  // namespace portable

#ifdef KERNELS_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define KERNELS_WIDTH 8
#include "kernels_isa.h"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
namespace avx512 {
#define KERNELS_WIDTH 16
#define KERNELS_SCALE(x, k) ((F)_mm512_maskz_scalef_ps(-1, (__m512)(x), (__m512)(k)))
#include "kernels_isa.h"
}  // namespace avx512
#pragma GCC pop_options
#endif

namespace {

enum class Isa { portable, avx2, avx512 };

std::vector<Isa> available() {
  std::vector<Isa> sets{Isa::portable};
#ifdef KERNELS_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.push_back(Isa::avx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    sets.push_back(Isa::avx512);
#endif
  return sets;
}

Isa active = available().back();

const char *name_of(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "portable";
}

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (Isa isa : available()) names.push_back(name_of(isa));
  return names;
}

void use_isa(const std::string &name) {
  for (Isa isa : available())
    if (name == name_of(isa)) {
      active = isa;
      return;
    }
  throw std::invalid_argument("instruction set " + name + " is not one that this processor has: see isa_names()");
}

#ifdef KERNELS_X86
#define RUN(kernel, ...)                                            \
  (active == Isa::avx512 ? avx512::kernel(__VA_ARGS__)              \
   : active == Isa::avx2 ? avx2::kernel(__VA_ARGS__)                \
                         : portable::kernel(__VA_ARGS__))
#else
#define RUN(kernel, ...) portable::kernel(__VA_ARGS__)
#endif

using Address = uintptr_t;

// An address that converts to the pointer type of the kernel's parameter.
template <class T>
T *at(Address address) {
  return reinterpret_cast<T *>(address);
}

// Calls body(T{}) with the storage type: float, or Bf16.
template <class Body>
auto with_type(bool bf16, const Body &body) {
  return bf16 ? body(Bf16{}) : body(float{});
}

void series_forward(bool bf16, Address x, Address a, Address b, Address y, int64_t rows, int64_t f, int64_t n,
                    int threads) {
  with_type(bf16, [&](auto t) {
    using T = decltype(t);
    RUN(series_forward, at<const T>(x), at<const float>(a), at<const float>(b), at<T>(y), rows, f, n, threads);
  });
}

void series_backward(bool bf16, Address x, Address a, Address b, Address dy, Address dx, Address da, Address db,
                     int64_t rows, int64_t f, int64_t n, int threads) {
  with_type(bf16, [&](auto t) {
    using T = decltype(t);
    RUN(series_backward, at<const T>(x), at<const float>(a), at<const float>(b), at<const T>(dy), at<T>(dx),
        at<float>(da), at<float>(db), rows, f, n, threads);
  });
}

void rms_norm_forward(bool bf16, Address x, Address w, Address y, Address rstd, int64_t rows, int64_t h, float eps,
                      int threads) {
  with_type(bf16, [&](auto t) {
    using T = decltype(t);
    RUN(rms_norm_forward, at<const T>(x), at<const float>(w), at<T>(y), at<float>(rstd), rows, h, eps, threads);
  });
}

void rms_norm_backward(bool bf16, Address dy, Address x, Address w, Address rstd, Address dx, Address dw,
                       int64_t rows, int64_t h, int threads) {
  with_type(bf16, [&](auto t) {
    using T = decltype(t);
    RUN(rms_norm_backward, at<const T>(dy), at<const T>(x), at<const float>(w), at<const float>(rstd), at<T>(dx),
        at<float>(dw), rows, h, threads);
  });
}

using Strides = std::array<int64_t, 3>;

void rope(bool bf16, Address in, Address cosine, Address sine, Address out, const std::array<int64_t, 4> &shape,
          int64_t rot, const Strides &in_strides, const Strides &out_strides, bool transpose, int threads) {
  RopeShape s{shape[0], shape[1], shape[2], shape[3], rot, {}, {}};
  std::copy(in_strides.begin(), in_strides.end(), s.in);
  std::copy(out_strides.begin(), out_strides.end(), s.out);
  with_type(bf16, [&](auto t) {
    using T = decltype(t);
    RUN(rope, at<const T>(in), at<const float>(cosine), at<const float>(sine), at<T>(out), s, transpose, threads);
  });
}

using Sizes = std::array<int64_t, 5>;

AttentionShape attention_shape(const Sizes &sizes, Address first, float scale) {
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], at<const int32_t>(first), scale};
}

// Cosines and sines [s, rot] with rot, gains [2, d] of the norms of queries and keys with eps; 0 for none.
std::array<HeadTransform, 2> head_transforms(const std::tuple<Address, Address, int64_t> &rotary,
                                             const std::tuple<Address, float> &norms, int64_t d) {
  const auto [cosine, sine, rot] = rotary;
  const auto [gains, eps] = norms;
  const Rotation rotation{at<const float>(cosine), at<const float>(sine), rot};
  const float *gain = at<const float>(gains);
  return {{{{gain, eps}, rotation}, {{gain == nullptr ? nullptr : gain + d, eps}, rotation}}};
}

void attention_forward(bool bf16, Address qkv, const std::tuple<Address, Address, int64_t> &rotary,
                       const std::tuple<Address, float> &norms, Address out, Address lse,
                       const Sizes &sizes, Address first, float scale, int threads) {
  const auto by = head_transforms(rotary, norms, sizes[4]);
  with_type(bf16, [&](auto t) {
    using T = decltype(t);
    RUN(attention_forward, at<const T>(qkv), by[0], by[1], at<T>(out), at<float>(lse),
        attention_shape(sizes, first, scale), threads);
  });
}

void attention_backward(bool bf16, Address qkv, const std::tuple<Address, Address, int64_t> &rotary,
                        const std::tuple<Address, float> &norms, Address out, Address lse, Address grad,
                        Address qkv_grad, Address gain_grads, const Sizes &sizes, Address first, float scale,
                        int threads) {
  const auto by = head_transforms(rotary, norms, sizes[4]);
  with_type(bf16, [&](auto t) {
    using T = decltype(t);
    RUN(attention_backward, at<const T>(qkv), by[0], by[1], at<const T>(out), at<const float>(lse), at<const T>(grad),
        at<T>(qkv_grad), at<float>(gain_grads), attention_shape(sizes, first, scale), threads);
  });
}

void weight_gradient(Address g, Address x, Address sum, int64_t rows, int64_t m, int64_t n, int threads) {
  RUN(weight_gradient, at<const float>(g), at<const float>(x), at<float>(sum), rows, m, n, threads);
}

void cross_entropy_stats(bool bf16, Address logits, Address target, int64_t first, Address top, Address total,
                         Address chosen, int64_t rows, int64_t n, int64_t v, int threads) {
  with_type(bf16, [&](auto t) {
    using T = decltype(t);
    RUN(cross_entropy_forward, at<const T>(logits), at<const int64_t>(target), first, at<float>(top),
        at<float>(total), at<float>(chosen), rows, n, v, threads);
  });
}

void cross_entropy_grad(bool bf16, Address logits, Address target, int64_t first, Address top, Address total,
                        Address grad, Address out, int64_t rows, int64_t n, int64_t v, int threads) {
  with_type(bf16, [&](auto t) {
    using T = decltype(t);
    RUN(cross_entropy_backward, at<const T>(logits), at<const int64_t>(target), first, at<const float>(top),
        at<const float>(total), at<const float>(grad), at<T>(out), rows, n, v, threads);
  });
}

// Calls body(T{}, U{}) with the storage types of logits and teacher.
template <class Body>
void with_types(bool bf16, bool teacher_bf16, const Body &body) {
  with_type(bf16, [&](auto t) { with_type(teacher_bf16, [&](auto u) { body(t, u); }); });
}

void distillation_stats(bool bf16, Address logits, Address target, int64_t first, bool teacher_bf16, Address teacher,
                        float inverse, Address stats, int64_t rows, int64_t n, int64_t v, int threads) {
  with_types(bf16, teacher_bf16, [&](auto t, auto u) {
    using T = decltype(t);
    using U = decltype(u);
    RUN(distillation_forward, at<const T>(logits), at<const int64_t>(target), first, at<const U>(teacher), inverse,
        at<float>(stats), rows, n, v, threads);
  });
}

void distillation_grad(bool bf16, Address logits, Address target, int64_t first, bool teacher_bf16, Address teacher,
                       float inverse, Address factors, int64_t rows, int64_t n, int64_t v, int threads) {
  with_types(bf16, teacher_bf16, [&](auto t, auto u) {
    using T = decltype(t);
    using U = decltype(u);
    RUN(distillation_backward, at<T>(logits), at<const int64_t>(target), first, at<const U>(teacher), inverse,
        at<const float>(factors), rows, n, v, threads);
  });
}

double sum_of_squares(bool bf16, const Pointers &tensors, const std::vector<int64_t> &sizes, int threads) {
  std::vector<Piece> pieces = cut(sizes);
  return with_type(bf16, [&](auto t) { return RUN(sum_of_squares<decltype(t)>, pieces, tensors, threads); });
}

void scale(bool bf16, const Pointers &tensors, const std::vector<int64_t> &sizes, float factor, int threads) {
  std::vector<Piece> pieces = cut(sizes);
  with_type(bf16, [&](auto t) { RUN(scale<decltype(t)>, pieces, tensors, factor, threads); });
}

void exponential(Address x, Address y, int64_t n) { RUN(exponential, at<const float>(x), at<float>(y), n); }

}  // namespace
}  // namespace kernels

// Incremented with every change of a function below; megatron_ext/kernels/fused.py requires this version.
constexpr int kAbi = 4;

PYBIND11_MODULE(_kernels, m) {
  using namespace kernels;
  using Unlocked = pybind11::call_guard<pybind11::gil_scoped_release>;
  watch_forks();
  m.doc() = "Fused CPU kernels over raw addresses; use megatron_ext.kernels.fused, which checks its arguments.";
  m.attr("ABI") = kAbi;
  m.def("isa_names", &isa_names, "Instruction sets that this processor can run, the best last.");
  m.def("isa", [] { return name_of(active); }, "The instruction set in use.");
  m.def("use_isa", &use_isa, "Choose one of isa_names(), for tests and measurements.");
  m.def("series_forward", &series_forward, Unlocked());
  m.def("series_backward", &series_backward, Unlocked());
  m.def("rms_norm_forward", &rms_norm_forward, Unlocked());
  m.def("rms_norm_backward", &rms_norm_backward, Unlocked());
  m.def("rope", &rope, Unlocked());
  m.def("attention_forward", &attention_forward, Unlocked());
  m.def("attention_backward", &attention_backward, Unlocked());
  m.def("weight_gradient", &weight_gradient, Unlocked());
  m.def("cross_entropy_stats", &cross_entropy_stats, Unlocked());
  m.def("cross_entropy_grad", &cross_entropy_grad, Unlocked());
  m.def("distillation_stats", &distillation_stats, Unlocked());
  m.def("distillation_grad", &distillation_grad, Unlocked());
  m.def("sum_of_squares", &sum_of_squares, Unlocked());
  m.def("scale", &scale, Unlocked());
  m.def("exponential", &exponential, Unlocked(), "y = exp(x), n floats: the kernels' own exp, for tests.");
}
