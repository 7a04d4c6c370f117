// The kernels for this processor, and tensors as they read them: for files that are compiled for any processor.
#pragma once

#include "rows.h"

#include <ATen/core/Tensor.h>

namespace attn {

#if defined(__x86_64__)
// 2 for AVX-512, 1 for AVX2 with FMA, 0 for neither.
inline int instructions() {
  static const int found = __builtin_cpu_supports("avx512f")                                   ? 2
                           : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 1
                                                                                               : 0;
  return found;
}

// Declares `attn::NAME_here()`: the kernels `NAME` for this processor, or null.
#define ATTN_KERNELS(type, name)                                             \
  namespace attn {                                                           \
  namespace avx2 {                                                           \
  extern const type name;                                                    \
  }                                                                          \
  namespace avx512 {                                                         \
  extern const type name;                                                    \
  }                                                                          \
  static const type* name##_here() {                                         \
    int found = instructions();                                              \
    return found == 2 ? &avx512::name : found == 1 ? &avx2::name : nullptr; \
  }                                                                          \
  }
#else
#define ATTN_KERNELS(type, name)                              \
  namespace attn {                                            \
  namespace plain {                                           \
  extern const type name;                                     \
  }                                                           \
  static const type* name##_here() { return &plain::name; }   \
  }
#endif

inline at::Tensor by_row(const at::Tensor& x) { return x.stride(3) == 1 || x.size(3) == 1 ? x : x.contiguous(); }

inline Rows rows(const at::Tensor& x) { return {x.const_data_ptr<float>(), x.stride(0), x.stride(1), x.stride(2)}; }

}  // namespace attn
