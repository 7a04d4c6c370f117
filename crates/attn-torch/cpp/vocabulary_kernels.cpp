// Rows of logits, read while they are near.
#include "vocabulary_kernels.h"
#include "vectors.h"

#include <cmath>

namespace attn {
namespace ATTN_ISA {
namespace {

// Terms that are summed in f32 before they go to the sum in f64.
constexpr int64_t kTerms = 64 * kWidth;

INLINE float largest_of(const float* x, int64_t n) {
  vec most[2] = {all(kNothing), all(kNothing)};
  int64_t at = 0;
  for (; at + 2 * kWidth <= n; at += 2 * kWidth) {
    for (int i = 0; i < 2; ++i) {
      vec here = load(x + at + i * kWidth);
      most[i] = here > most[i] ? here : most[i];
    }
  }
  float found = largest(most[0] > most[1] ? most[0] : most[1]);
  for (; at < n; ++at) found = x[at] > found ? x[at] : found;
  return found;
}

void row(const LogitRow& a) {
  float most = largest_of(a.logits, a.n);
  int64_t top = 0;
  while (top + 1 < a.n && a.logits[top] != most) ++top;  // a row of NaN ends at the last
  double sum_of_exp = 0, mean = 0;
  for (int64_t from = 0; from < a.n; from += kTerms) {
    int64_t to = least(from + kTerms, a.n), at = from;
    vec exps = {}, means = {};
    for (; at + kWidth <= to; at += kWidth) {
      vec x = load(a.logits + at) - most;
      exps += exp2_of(x * kLog2E);
      if (a.p) means += load(a.p + at) * x;
    }
    float last_exp = 0, last_mean = 0;
    for (; at < to; ++at) {
      float x = a.logits[at] - most;
      last_exp += std::exp(x);
      if (a.p) last_mean += a.p[at] * x;
    }
    sum_of_exp += sum(exps) + last_exp;
    mean += sum(means) + last_mean;
  }
  // exp2_of takes a NaN for nothing at all.
  a.out[0] = std::isfinite(most) ? std::log(sum_of_exp) : static_cast<double>(NAN);
  a.out[1] = a.target < 0 ? 0 : static_cast<double>(a.logits[a.target]) - most;
  a.out[2] = static_cast<double>(top);
  a.out[3] = mean;
}

}  // namespace

extern const VocabularyKernels vocabulary_kernels;
const VocabularyKernels vocabulary_kernels = {row};

}  // namespace ATTN_ISA
}  // namespace attn
