// What decode.cpp, compiled for any processor, and decode_kernels.cpp, compiled once for each set of instructions, share.
// Plain types alone: see rows.h.
#pragma once

#include "rows.h"

namespace attn {

// Single queries of groups of heads over keys and values as a cache keeps them. Task t is a stretch of `stretch` keys of one
// key/value head of one row, t = (row · n_kv + head) · n_stretches + stretch. It leaves for each of the group's queries
//   most    the largest score · log2(e),                  total   Σ 2^(score − most),                  z   Σ 2^(score − most) v
// at [row, head, query, stretch]; -inf, 0 and 0 where it sees none.
struct Decode {
  Rows q, k, v;
  const bool* keep;  // [batch, n], or null
  int64_t batch, n_kv, group, n, head_dim;
  int64_t stretch, n_stretches;
  float scale;  // of scores, log2(e) among it
  float *most, *total, *z;
};

struct DecodeKernels {
  int64_t panel;  // head_dim has to be a multiple
  void (*stretch)(const Decode&, int64_t task);
  // z of query `at` of batch · heads: what its stretches come to, in `to`.
  void (*merge)(const Decode&, int64_t at, float* to);
};

}  // namespace attn
