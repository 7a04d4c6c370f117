// Tensors as the kernels read them. Plain types alone: files that are compiled for any processor and files that are compiled
// once for each set of instructions share them, and an inline function would exist once in the program, with whichever
// instructions.
#pragma once

#include <cstdint>

namespace attn {

// `[batch, heads, n, head_dim]`, channels side by side.
struct Rows {
  const float* at;
  int64_t batch, head, row;  // strides
};

}  // namespace attn
