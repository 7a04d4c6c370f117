// What rows of logits say, in one reading: their logarithm of the sum of exponentials, a target's logit, the largest, a mean.
#include "isa.h"
#include "shim.h"
#include "vocabulary_kernels.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

ATTN_KERNELS(VocabularyKernels, vocabulary_kernels)

extern "C" {

// `out`: [n, 4] of f64 for logits [n, vocabulary], as LogitRow says; null where LibTorch has to do it. `p` and `targets` may be null.
int attn_read_logits(const at::Tensor* logits, const at::Tensor* p, const at::Tensor* targets, at::Tensor** out, char** err) {
  return attempt(err, [&] {
    *out = nullptr;
    TORCH_CHECK(logits->dim() == 2, "logits ", logits->sizes(), ", [n, vocabulary] expected");
    int64_t n = logits->size(0), size = logits->size(1);
    TORCH_CHECK(!p || p->sizes() == logits->sizes(), "probabilities ", p->sizes(), " of logits ", logits->sizes());
    TORCH_CHECK(!targets || (targets->dim() == 1 && targets->size(0) == n && targets->scalar_type() == at::kLong),
                "targets of logits ", logits->sizes(), ": ", n, " of 64 bits expected");
    auto served = [](const at::Tensor& x) { return x.is_cpu() && x.scalar_type() == at::kFloat && x.is_contiguous() && !x.requires_grad(); };
    const auto* run = attn::vocabulary_kernels_here();
    if (!run || size == 0 || !served(*logits) || (p && !served(*p)) || (targets && !targets->is_cpu())) return;
    at::Tensor chosen = targets ? targets->contiguous() : at::Tensor();
    const int64_t* wanted = targets ? chosen.const_data_ptr<int64_t>() : nullptr;
    for (int64_t at = 0; wanted && at < n; ++at) TORCH_CHECK(wanted[at] >= 0 && wanted[at] < size, "target ", wanted[at], " of ", size);
    auto found = at::empty({n, 4}, logits->options().dtype(at::kDouble));
    const float *x = logits->const_data_ptr<float>(), *own = p ? p->const_data_ptr<float>() : nullptr;
    double* to = found.mutable_data_ptr<double>();
    at::parallel_for(0, n, 1, [&](int64_t first, int64_t last) {
      for (int64_t at = first; at < last; ++at)
        run->row({x + at * size, own ? own + at * size : nullptr, size, wanted ? wanted[at] : -1, to + at * 4});
    });
    *out = new at::Tensor(std::move(found));
  });
}

}  // extern "C"
