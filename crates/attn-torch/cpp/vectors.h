// Vectors, small products and memory for the kernels. These are compiled once for each set of instructions: `ATTN_ISA` names
// it, and what is not in `attn::ATTN_ISA` must not be inline, as the linker keeps one of several copies.
#pragma once

#include "rows.h"

#include <cstdlib>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__)
#define ATTN_WIDTH 16
#elif defined(__AVX2__)
#define ATTN_WIDTH 8
#else
#define ATTN_WIDTH 4
#endif
#define INLINE static inline __attribute__((always_inline))

namespace attn {
namespace ATTN_ISA {
namespace {

typedef float vec __attribute__((vector_size(4 * ATTN_WIDTH)));
typedef int32_t ivec __attribute__((vector_size(4 * ATTN_WIDTH)));
typedef uint32_t uvec __attribute__((vector_size(4 * ATTN_WIDTH)));
// In memory, wherever it begins. By memcpy GCC takes halves over the stack.
typedef float unaligned __attribute__((vector_size(4 * ATTN_WIDTH), aligned(4), may_alias));
constexpr int64_t kWidth = ATTN_WIDTH;
// Columns and most rows of the piece of a product that is summed in registers.
constexpr int64_t kPanel = 2 * kWidth;
constexpr int kRows = 6;
constexpr float kNothing = -__builtin_inff();
constexpr float kLog2E = 1.44269504088896341f;

INLINE vec load(const float* p) { return *reinterpret_cast<const unaligned*>(p); }
INLINE void store(float* p, vec x) { *reinterpret_cast<unaligned*>(p) = x; }
INLINE vec all(float x) { return x - vec{}; }
INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// 2^x for x of at most about 1, to f32's rounding, 0 below the smallest normal number. Cephes' polynomial (exp2f).
INLINE vec exp2_of(vec x) {
  const vec magic = all(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  vec in = x < -126.0f ? all(-126.0f) : x;
  vec shifted = in + magic;
  vec r = in - (shifted - magic);
  vec p = all(1.535336188319500e-4f);
  p = p * r + 1.339887440266574e-3f;
  p = p * r + 9.618437357674640e-3f;
  p = p * r + 5.550332471162809e-2f;
  p = p * r + 2.402264791363012e-1f;
  p = p * r + 6.931472028550421e-1f;
  p = p * r + 1.0f;
  // Between vectors a cast keeps the bits; without a sign, as the sum may pass the largest number with one.
  p = (vec)((uvec)p + ((uvec)shifted << 23));
  return x < -126.0f ? vec{} : p;
}

// Lane i is lane i + by.
template <int by>
INLINE vec turned(vec x) {
  ivec from;
  for (int i = 0; i < ATTN_WIDTH; ++i) from[i] = (i + by) % ATTN_WIDTH;
  return __builtin_shuffle(x, from);
}

INLINE float sum(vec x) {
#if ATTN_WIDTH == 16
  x += turned<8>(x);
#endif
#if ATTN_WIDTH >= 8
  x += turned<4>(x);
#endif
  x += turned<2>(x);
  x += turned<1>(x);
  return x[0];
}

INLINE vec larger(vec a, vec b) { return a > b ? a : b; }

INLINE float largest(vec x) {
#if ATTN_WIDTH == 16
  x = larger(turned<8>(x), x);
#endif
#if ATTN_WIDTH >= 8
  x = larger(turned<4>(x), x);
#endif
  x = larger(turned<2>(x), x);
  x = larger(turned<1>(x), x);
  return x[0];
}

// c[i][..panel] = factor[i] c[i][..panel] + Σ_k a[i][k * step] b[k * ldb..][..panel]; without factors c is written alone.
template <int M>
INLINE void product(const float* const* a, int64_t step, const float* b, int64_t ldb, int64_t n, float* const* c,
                    const float* factor) {
  vec s[M][2];
  const float* at[M];
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i) {
    at[i] = a[i];
    s[i][0] = s[i][1] = vec{};
    if (factor) {
      s[i][0] = load(c[i]) * factor[i];
      s[i][1] = load(c[i] + kWidth) * factor[i];
    }
  }
  for (int64_t k = 0; k < n; ++k, b += ldb) {
    vec b0 = load(b), b1 = load(b + kWidth);
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i) {
      vec x = all(at[i][k * step]);
      s[i][0] += x * b0;
      s[i][1] += x * b1;
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i) {
    store(c[i], s[i][0]);
    store(c[i] + kWidth, s[i][1]);
  }
}

// Calls `f` with the number of rows, at most kRows, as a constant.
template <class F>
INLINE void with_rows(int64_t m, F&& f) {
  switch (m) {
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    case 4: return f(std::integral_constant<int, 4>());
    case 5: return f(std::integral_constant<int, 5>());
    default: return f(std::integral_constant<int, 6>());
  }
}

// Memory of one task.
struct Buffer {
  explicit Buffer(int64_t n) : at(static_cast<float*>(aligned_alloc(64, round_up(most(n, 1) * 4, 64)))) {
    if (!at) abort();
  }
  ~Buffer() { free(at); }
  Buffer(const Buffer&) = delete;
  int32_t* ints() const { return reinterpret_cast<int32_t*>(at); }
  float* const at;
};

INLINE const float* row(const Rows& x, int64_t batch, int64_t head, int64_t i) {
  return x.at + batch * x.batch + head * x.head + i * x.row;
}

// to[i] = factor[i] to[i] + Σ_k a[i][k * step] b[k], rows of `d` columns.
template <int M>
INLINE void add_rows(const float* const* a, int64_t step, const float* b, int64_t n, int64_t d, float* const* to,
                     const float* factor) {
  for (int64_t c = 0; c < d; c += kPanel) {
    float* at[M];
    for (int i = 0; i < M; ++i) at[i] = to[i] + c;
    product<M>(a, step, b + c, d, n, at, factor);
  }
}

}  // namespace
}  // namespace ATTN_ISA
}  // namespace attn
