// Attention of single queries to a cache: it costs what reading the cache costs.
#include "decode_kernels.h"
#include "isa.h"
#include "shim.h"

#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>

#include <cmath>

ATTN_KERNELS(DecodeKernels, decode_kernels)

namespace {

// Keys of a task: the same whatever the threads, as are the sums then.
constexpr int64_t kStretch = 1024;

}  // namespace

extern "C" {

// z, [batch, heads, 1, head_dim]; null where LibTorch has to do it. `keep`, [batch, n], may be null.
int attn_decode(const at::Tensor* q, const at::Tensor* k, const at::Tensor* v, const at::Tensor* keep, double scale, at::Tensor** out,
                char** err) {
  return attempt(err, [&] {
    *out = nullptr;
    TORCH_CHECK(q->dim() == 4 && k->dim() == 4 && v->dim() == 4 && k->sizes().slice(0, 3) == v->sizes().slice(0, 3) && q->size(0) == k->size(0) && q->size(2) == 1 &&
                    q->size(3) == k->size(3) && k->size(1) > 0 && q->size(1) % k->size(1) == 0,
                "queries ", q->sizes(), ", keys ", k->sizes(), ", values ", v->sizes());
    TORCH_CHECK(!keep || (keep->dim() == 2 && keep->size(0) == k->size(0) && keep->size(1) == k->size(2) && keep->scalar_type() == at::kBool),
                "kept keys of keys ", k->sizes(), ": bool, [batch, n] expected");
    const auto* run = attn::decode_kernels_here();
    auto served = [](const at::Tensor& x) {
      return x.is_cpu() && x.scalar_type() == at::kFloat && x.layout() == at::kStrided && x.stride(3) == 1 &&
             !(at::GradMode::is_enabled() && x.requires_grad());
    };
    if (!run || !served(*q) || !served(*k) || !served(*v) || (keep && !keep->is_cpu()) || at::autocast::is_autocast_enabled(at::kCPU)) return;
    if (k->size(3) != v->size(3) || q->size(3) == 0 || q->size(3) % run->panel != 0 || k->size(2) == 0) return;
    attn::Decode a{};
    a.q = attn::rows(*q), a.k = attn::rows(*k), a.v = attn::rows(*v);
    at::Tensor kept = keep ? keep->contiguous() : at::Tensor();
    a.keep = keep ? kept.const_data_ptr<bool>() : nullptr;
    a.batch = k->size(0), a.n_kv = k->size(1), a.group = q->size(1) / k->size(1), a.n = k->size(2), a.head_dim = k->size(3);
    a.stretch = kStretch, a.n_stretches = (a.n + kStretch - 1) / kStretch;
    a.scale = static_cast<float>(scale * M_LOG2E);
    int64_t n_queries = a.batch * q->size(1);
    auto sums = at::empty({2, n_queries, a.n_stretches}, q->options());
    auto parts = at::empty({n_queries, a.n_stretches, a.head_dim}, q->options());
    a.most = sums.mutable_data_ptr<float>(), a.total = a.most + n_queries * a.n_stretches, a.z = parts.mutable_data_ptr<float>();
    at::parallel_for(0, a.batch * a.n_kv * a.n_stretches, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) run->stretch(a, task);
    });
    auto z = at::empty({a.batch, q->size(1), 1, a.head_dim}, q->options());
    float* to = z.mutable_data_ptr<float>();
    at::parallel_for(0, n_queries, 64, [&](int64_t first, int64_t last) {
      for (int64_t at = first; at < last; ++at) run->merge(a, at, to + at * a.head_dim);
    });
    *out = new at::Tensor(std::move(z));
  });
}

}  // extern "C"
