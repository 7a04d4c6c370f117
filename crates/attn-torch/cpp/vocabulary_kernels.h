// What vocabulary.cpp, compiled for any processor, and vocabulary_kernels.cpp, compiled once for each set of instructions, share.
// Plain types alone: see rows.h.
#pragma once

#include <cstdint>

namespace attn {

// What a row of logits says, in `out`, relative to the largest: its logarithm of the sum of exponentials, the logit of the target,
// the place of the largest, and the mean by `p`. 0 where there is no target, or no p.
struct LogitRow {
  const float* logits;
  const float* p;  // or null
  int64_t n;
  int64_t target;  // or -1
  double* out;
};

struct VocabularyKernels {
  void (*row)(const LogitRow&);
};

}  // namespace attn
