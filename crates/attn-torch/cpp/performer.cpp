// Causal linear attention by positive random features in f32.
#include "isa.h"
#include "performer_kernels.h"
#include "shim.h"

#include <ATen/Parallel.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>

#include <cmath>

ATTN_KERNELS(PerformerKernels, performer_kernels)

using attn::Performer;

namespace {

// What is attended, with the memory that the kernels read it from.
struct Problem {
  Performer a{};
  const attn::PerformerKernels* run = attn::performer_kernels_here();
  at::Tensor q, k, v, omega, keep;

  Problem(const at::Tensor& given_q, const at::Tensor& given_k, const at::Tensor& given_v, const at::Tensor& given_omega,
          const at::Tensor* given_keep, double scale, double eps)
      : q(attn::by_row(given_q)), k(attn::by_row(given_k)), v(attn::by_row(given_v)) {
    TORCH_CHECK(run, "no kernel for this processor");
    TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && k.sizes() == v.sizes() && q.size(0) == k.size(0) && q.size(2) == k.size(2) &&
                    q.size(3) == k.size(3) && k.size(1) > 0 && q.size(1) % k.size(1) == 0,
                "queries ", q.sizes(), ", keys ", k.sizes(), ", values ", v.sizes());
    TORCH_CHECK(given_omega.dim() == 2 && given_omega.size(0) > 0 && given_omega.size(1) == q.size(3), "projections ",
                given_omega.sizes(), " of queries ", q.sizes());
    for (const auto& x : {q, k, v, given_omega}) TORCH_CHECK(x.is_cpu() && x.scalar_type() == at::kFloat, "f32 on the CPU expected");
    a.batch = q.size(0), a.n_heads = q.size(1), a.n = q.size(2), a.head_dim = q.size(3);
    a.n_kv = k.size(1), a.n_features = given_omega.size(0);
    a.wide = (a.head_dim + run->panel - 1) / run->panel * run->panel;
    a.scale = static_cast<float>(scale), a.eps = static_cast<float>(eps);
    omega = at::constant_pad_nd(given_omega.mul(std::sqrt(scale)), {0, a.wide - a.head_dim}).contiguous();
    a.omega = omega.const_data_ptr<float>();
    if (given_keep) {
      keep = given_keep->contiguous();
      TORCH_CHECK(keep.dim() == 2 && keep.size(0) == a.batch && keep.size(1) == a.n && keep.is_cpu() && keep.scalar_type() == at::kBool,
                  "kept keys ", keep.sizes(), " of queries ", q.sizes(), ", bool on the CPU expected");
      a.keep = keep.const_data_ptr<bool>();
    }
    a.q = attn::rows(q), a.k = attn::rows(k), a.v = attn::rows(v);
  }

  at::Tensor empty() const { return at::empty({a.batch, a.n_heads, a.n, a.wide}, q.options()); }

  void each(void (*run)(const Performer&, int64_t)) const {
    at::parallel_for(0, a.batch * a.n_heads, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) run(a, task);
    });
  }
};

}  // namespace

extern "C" {

// Appends z, `[batch, n_heads, n, head_dim rounded up]`, and what it was divided by, `[batch, n_heads, n]`. `keep` may be null.
int attn_performer(const at::Tensor* q, const at::Tensor* k, const at::Tensor* v, const at::Tensor* omega, const at::Tensor* keep,
                   double scale, double eps, List* out, char** err) {
  return attempt(err, [&] {
    Problem problem(*q, *k, *v, *omega, keep, scale, eps);
    Performer& a = problem.a;
    auto z = problem.empty(), total = at::empty({a.batch, a.n_heads, a.n}, z.options());
    a.z = z.mutable_data_ptr<float>(), a.total = total.mutable_data_ptr<float>();
    problem.each(problem.run->forward);
    *out = {z, total};
  });
}

// Appends the gradients of q, k and v, given `z` and `total` of `attn_performer` and the gradient of z.
int attn_performer_backward(const at::Tensor* q, const at::Tensor* k, const at::Tensor* v, const at::Tensor* omega,
                            const at::Tensor* keep, double scale, double eps, const at::Tensor* z, const at::Tensor* total,
                            const at::Tensor* grad, List* out, char** err) {
  return attempt(err, [&] {
    Problem problem(*q, *k, *v, *omega, keep, scale, eps);
    Performer& a = problem.a;
    auto dz = attn::by_row(*grad);
    auto dq = problem.empty(), dk = problem.empty(), dv = problem.empty();
    a.z = const_cast<float*>(z->const_data_ptr<float>()), a.total = const_cast<float*>(total->const_data_ptr<float>());
    a.dz = attn::rows(dz);
    a.dq = dq.mutable_data_ptr<float>(), a.dk = dk.mutable_data_ptr<float>(), a.dv = dv.mutable_data_ptr<float>();
    problem.each(problem.run->backward);
    // Query heads that share keys add up.
    auto shared = [&](const at::Tensor& x) {
      return a.n_heads == a.n_kv ? x : x.view({a.batch, a.n_kv, a.n_heads / a.n_kv, a.n, a.wide}).sum(2);
    };
    auto cut = [&](const at::Tensor& x) { return x.narrow(3, 0, a.head_dim); };
    *out = {cut(dq), cut(shared(dk)), cut(shared(dv))};
  });
}

}  // extern "C"
