// What performer.cpp, compiled for any processor, and performer_kernels.cpp, compiled once for each set of instructions,
// share. Plain types alone: see rows.h.
#pragma once

#include "rows.h"

namespace attn {

// Causal linear attention by positive random features. `wide` is head_dim rounded up to a panel.
struct Performer {
  int64_t batch, n_heads, n_kv, n, head_dim, n_features, wide;
  float scale, eps;
  // The projections times the root of the scale: `[n_features, wide]`, zeros in what rounding adds.
  const float* omega;
  Rows q, k, v;
  const bool* keep;  // [batch, n], keys that are seen; or null

  // Of forward: `[batch, n_heads, n, wide]`, and what sums were divided by, without the last axis.
  float *z, *total;

  // Gradients: given, and found, as z; keys and values for each query head.
  Rows dz;
  float *dq, *dk, *dv;
};

struct PerformerKernels {
  // Sizes are rounded up to a multiple of this.
  int64_t panel;
  // Head `task` of the `batch * n_heads`.
  void (*forward)(const Performer&, int64_t task);
  void (*backward)(const Performer&, int64_t task);
};

}  // namespace attn
