// Softmax attention in f32 to a few stretches of keys a query, and the choice of blocks by what they weigh.
#include "attend_kernels.h"
#include "isa.h"
#include "shim.h"

#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

ATTN_KERNELS(AttendKernels, attend_kernels)

using attn::Attend;
using attn::AttendKernels;

namespace {

// Keys taken at a time where nothing says otherwise; of a chosen block a part of about as many, if it has one.
constexpr int64_t kTile = 64;

int64_t tile_of(int64_t block) {
  if (block <= 2 * kTile) return block;
  for (int64_t tile = 2 * kTile; tile >= kTile / 2; --tile) {
    if (block % tile == 0) return tile;
  }
  return block;
}

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

void each(int64_t n, void (*run)(const Attend&, int64_t), const Attend& a) {
  at::parallel_for(0, n, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) run(a, task);
  });
}

bool is_int(const at::Tensor& x) { return x.is_cpu() && x.scalar_type() == at::kInt; }

// What is attended, with the memory that the kernels read it from.
struct Problem {
  Attend a{};
  const AttendKernels* run = attn::attend_kernels_here();
  at::Tensor q, k, v, lo, hi, choices, packed;

  Problem(const at::Tensor& given_q, const at::Tensor& given_k, const at::Tensor& given_v, const at::Tensor& given_lo,
          const at::Tensor& given_hi, const at::Tensor* given_choices, int64_t first, int64_t block, double scale)
      : q(attn::by_row(given_q)), k(attn::by_row(given_k)), v(attn::by_row(given_v)), lo(given_lo.contiguous()), hi(given_hi.contiguous()) {
    TORCH_CHECK(run, "no kernel for this processor");
    TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && k.sizes() == v.sizes() && q.size(0) == k.size(0) && q.size(3) == k.size(3) &&
                    k.size(1) > 0 && q.size(1) % k.size(1) == 0,
                "queries ", q.sizes(), ", keys ", k.sizes(), ", values ", v.sizes());
    for (const auto& x : {q, k, v}) TORCH_CHECK(x.is_cpu() && x.scalar_type() == at::kFloat, "f32 on the CPU expected");
    TORCH_CHECK(lo.sizes() == hi.sizes() && lo.dim() == 2 && (lo.size(0) == 1 || lo.size(0) == q.size(0)) &&
                    lo.size(1) == q.size(2) && is_int(lo) && is_int(hi),
                "limits ", lo.sizes(), " and ", hi.sizes(), " of queries ", q.sizes(), ", int32 on the CPU expected");
    a.batch = q.size(0), a.n_heads = q.size(1), a.n_q = q.size(2), a.head_dim = q.size(3);
    a.n_kv = k.size(1), a.n_k = k.size(2);
    a.scale = static_cast<float>(scale);
    a.lo = lo.const_data_ptr<int32_t>(), a.hi = hi.const_data_ptr<int32_t>();
    a.limits_batch = lo.size(0) == 1 ? 0 : a.n_q;
    a.first = first;
    a.tile = kTile;
    if (given_choices) {
      choices = given_choices->contiguous();
      TORCH_CHECK(choices.dim() == 4 && choices.size(0) == a.batch && choices.size(2) == a.n_q && choices.size(1) > 0 &&
                      a.n_heads % choices.size(1) == 0 && is_int(choices) && first == 0 && block > 0,
                  "choices ", choices.sizes(), " of blocks of ", block, " and ", first, " first keys, queries ", q.sizes(),
                  ", int32 on the CPU expected");
      a.choices = choices.const_data_ptr<int32_t>();
      a.n_groups = choices.size(1), a.n_choices = choices.size(3);
      a.block = block;
      a.tile = tile_of(block);
    }
    a.q = attn::rows(q), a.k = attn::rows(k), a.v = attn::rows(v);
  }

  int64_t n_tiles() const { return (a.n_k + a.tile - 1) / a.tile; }
  int64_t n_chunks() const {
    int64_t size = a.choices ? attn::kChunkOfChoices : attn::kChunk;
    return (a.n_q + size - 1) / size;
  }
  int64_t wide() const { return round_up(a.head_dim, run->panel); }

  at::Tensor empty(at::IntArrayRef size) const { return at::empty(size, q.options()); }

  // Lays out keys and values as the kernels read them.
  void pack(bool k_side, bool v_side, bool k_flat, bool v_flat) {
    int64_t tiles = a.batch * a.n_kv * n_tiles(), side = tiles * a.head_dim * round_up(a.tile, run->panel);
    int64_t flat = tiles * a.tile * wide();
    packed = empty({(k_side + v_side) * side + (k_flat + v_flat) * flat});
    float* at = packed.mutable_data_ptr<float>();
    auto take = [&](bool wanted, int64_t size) { return wanted ? std::exchange(at, at + size) : nullptr; };
    a.k_side = take(k_side, side), a.v_side = take(v_side, side);
    a.k_flat = take(k_flat, flat), a.v_flat = take(v_flat, flat);
    each(tiles, run->pack, a);
  }

  at::Tensor like_keys() const { return at::zeros({a.batch, a.n_kv, n_tiles() * a.tile, wide()}, q.options()); }
};

}  // namespace

extern "C" {

// Whether there are kernels for this processor, and autocast, which would have other kinds, is off.
int attn_attends() { return attn::attend_kernels_here() != nullptr && !at::autocast::is_autocast_enabled(at::kCPU); }

// Appends z, `[batch, n_heads, n_q, head_dim rounded up]`, and the base-2 logarithms of the sums of exponentials,
// `[batch, n_heads, n_q]`. `choices` may be null.
int attn_attend(const at::Tensor* q, const at::Tensor* k, const at::Tensor* v, const at::Tensor* lo, const at::Tensor* hi,
                const at::Tensor* choices, int64_t first, int64_t block, double scale, List* out, char** err) {
  return attempt(err, [&] {
    Problem problem(*q, *k, *v, *lo, *hi, choices, first, block, scale);
    Attend& a = problem.a;
    problem.pack(true, false, false, true);
    auto z = problem.empty({a.batch, a.n_heads, a.n_q, problem.wide()});
    auto lse = problem.empty({a.batch, a.n_heads, a.n_q});
    a.z = z.mutable_data_ptr<float>(), a.lse = lse.mutable_data_ptr<float>();
    each(a.batch * a.n_heads * problem.n_chunks(), problem.run->forward, a);
    *out = {z, lse};
  });
}

// Appends the gradients of q, k and v, given `z` and `lse` of `attn_attend` and the gradient of z.
int attn_attend_backward(const at::Tensor* q, const at::Tensor* k, const at::Tensor* v, const at::Tensor* lo,
                         const at::Tensor* hi, const at::Tensor* choices, int64_t first, int64_t block, double scale,
                         const at::Tensor* z, const at::Tensor* lse, const at::Tensor* grad, List* out, char** err) {
  return attempt(err, [&] {
    Problem problem(*q, *k, *v, *lo, *hi, choices, first, block, scale);
    Attend& a = problem.a;
    problem.pack(true, true, true, false);
    auto dz = attn::by_row(*grad);
    auto dq = at::zeros(z->sizes(), q->options()), dk = problem.like_keys(), dv = problem.like_keys();
    a.z = const_cast<float*>(z->const_data_ptr<float>()), a.lse = const_cast<float*>(lse->const_data_ptr<float>());
    a.dz = attn::rows(dz);
    a.dq = dq.mutable_data_ptr<float>(), a.dk = dk.mutable_data_ptr<float>(), a.dv = dv.mutable_data_ptr<float>();
    each(a.batch * a.n_kv, problem.run->backward, a);
    auto cut = [&](const at::Tensor& x, int64_t n) { return x.narrow(2, 0, n).narrow(3, 0, a.head_dim); };
    *out = {cut(dq, a.n_q), cut(dk, a.n_k), cut(dv, a.n_k)};
  });
}

// Leaves the blocks that weigh most for the queries of each key/value head, int32 `[batch, n_kv, n_q, n_chosen]`, in no
// order and -1 where there are fewer. `k` are keys that stand for several tokens each, of which query i sees the first
// hi[i], and `lse` is of `attn_attend` with the same. A block's score is the sum over the heads of the group and over m <
// per_block and n < reach of the weights of keys per_block · block + m − n. Of a query's `end` blocks those before
// `n_initial` and less than `n_local` from its `own` are chosen in any case.
int attn_choose_blocks(const at::Tensor* q, const at::Tensor* k, const at::Tensor* hi, const at::Tensor* lse,
                       const at::Tensor* own, const at::Tensor* end, double scale, int64_t reach, int64_t per_block,
                       int64_t n_blocks, int64_t n_initial, int64_t n_local, int64_t n_chosen, at::Tensor** out, char** err) {
  return attempt(err, [&] {
    auto lo = at::zeros(hi->sizes(), hi->options());
    Problem problem(*q, *k, *k, lo, *hi, nullptr, 0, 0, scale);
    Attend& a = problem.a;
    auto sums = lse->contiguous(), owns = own->contiguous(), ends = end->contiguous();
    TORCH_CHECK(owns.dim() == 1 && owns.size(0) == a.n_q && ends.sizes() == hi->sizes() && is_int(owns) && is_int(ends) &&
                    sums.numel() == a.batch * a.n_heads * a.n_q && sums.is_cpu() && sums.scalar_type() == at::kFloat,
                "own blocks ", owns.sizes(), ", ends ", ends.sizes(), ", sums ", sums.sizes(), ", queries ", q->sizes());
    TORCH_CHECK(reach > 0 && per_block > 0 && n_chosen > 0 && n_blocks >= 0, n_chosen, " of ", n_blocks, " blocks of ", per_block,
                " keys and ", reach, " before");
    const int32_t* last = ends.const_data_ptr<int32_t>();
    for (int64_t at = 0; at < ends.numel(); ++at) TORCH_CHECK(last[at] <= n_blocks, "block ", last[at], " of ", n_blocks);
    a.lse = sums.mutable_data_ptr<float>();
    a.own = owns.const_data_ptr<int32_t>(), a.end = ends.const_data_ptr<int32_t>();
    a.reach = reach, a.per_block = per_block, a.n_blocks = n_blocks;
    a.n_initial = n_initial, a.n_local = n_local, a.n_choices = n_chosen;
    auto chosen = at::empty({a.batch, a.n_kv, a.n_q, n_chosen}, hi->options());
    a.chosen = chosen.mutable_data_ptr<int32_t>();
    problem.pack(true, false, false, false);
    each(a.batch * a.n_kv * problem.n_chunks(), problem.run->choose, a);
    *out = new at::Tensor(std::move(chosen));
  });
}

}  // extern "C"
