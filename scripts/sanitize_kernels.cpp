// Runs attn-torch's kernels, as they are, on memory that ends where their arguments say it does: for scripts/sanitize.sh. Every buffer is
// an allocation of its own, so that a read or write past it is found. Results are held against the plainest form of each, loosely:
// tests of the crate hold them closely.
#include "attend_kernels.h"
#include "decode_kernels.h"
#include "performer_kernels.h"
#include "vocabulary_kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

namespace attn {
namespace sanitized {
extern const AttendKernels attend_kernels;
extern const DecodeKernels decode_kernels;
extern const PerformerKernels performer_kernels;
extern const VocabularyKernels vocabulary_kernels;
}  // namespace sanitized
}  // namespace attn

using namespace attn;

namespace {

std::mt19937 rng(7);

// Exactly n numbers, between -1 and 1.
std::unique_ptr<float[]> numbers(int64_t n) {
  std::uniform_real_distribution<float> draw(-1, 1);
  auto made = std::make_unique<float[]>(n);
  for (int64_t i = 0; i < n; ++i) made[i] = draw(rng);
  return made;
}

std::unique_ptr<float[]> zeros(int64_t n) { return std::make_unique<float[]>(n); }

Rows rows(const float* at, int64_t heads, int64_t n, int64_t width) { return {at, heads * n * width, n * width, width}; }

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

int n_wrong = 0;

void near(const char* what, double found, double expected) {
  if (std::abs(found - expected) > 1e-3 * (1 + std::abs(expected))) {
    std::printf("%s: %g, expected %g\n", what, found, expected);
    ++n_wrong;
  }
}

void vocabulary() {
  for (int64_t n : {1, 2, 7, 8, 15, 16, 17, 63, 64, 65, 511, 1000, 1025}) {
    auto logits = numbers(n), p = numbers(n);
    for (int64_t target : {int64_t(-1), int64_t(0), n - 1}) {
      auto out = std::make_unique<double[]>(4);
      sanitized::vocabulary_kernels.row({logits.get(), target < 0 ? nullptr : p.get(), n, target, out.get()});
      double most = logits[0], sum = 0;
      for (int64_t i = 0; i < n; ++i) most = std::fmax(most, logits[i]);
      for (int64_t i = 0; i < n; ++i) sum += std::exp(logits[i] - most);
      near("log of sums", out[0], std::log(sum));
    }
  }
}

void decode() {
  for (int64_t n : {1, 3, 64, 65, 300}) {
    for (int64_t group : {1, 3}) {
      Decode a{};
      a.batch = 2, a.n_kv = 2, a.group = group, a.n = n, a.head_dim = 2 * sanitized::decode_kernels.panel;
      a.stretch = 64, a.n_stretches = (n + 63) / 64, a.scale = 0.3f;
      int64_t heads = a.n_kv * group, queries = a.batch * heads;
      auto q = numbers(queries * a.head_dim), k = numbers(a.batch * a.n_kv * n * a.head_dim);
      auto v = numbers(a.batch * a.n_kv * n * a.head_dim);
      auto keep = std::make_unique<bool[]>(a.batch * n);
      for (int64_t i = 0; i < a.batch * n; ++i) keep[i] = i % 3 != 1;
      auto most = zeros(queries * a.n_stretches), total = zeros(queries * a.n_stretches);
      auto z = zeros(queries * a.n_stretches * a.head_dim), to = zeros(a.head_dim);
      a.q = rows(q.get(), heads, 1, a.head_dim), a.k = rows(k.get(), a.n_kv, n, a.head_dim);
      a.v = rows(v.get(), a.n_kv, n, a.head_dim);
      a.most = most.get(), a.total = total.get(), a.z = z.get();
      for (const bool* seen : {static_cast<const bool*>(nullptr), static_cast<const bool*>(keep.get())}) {
        a.keep = seen;
        for (int64_t task = 0; task < a.batch * a.n_kv * a.n_stretches; ++task) sanitized::decode_kernels.stretch(a, task);
        for (int64_t at = 0; at < queries; ++at) {
          sanitized::decode_kernels.merge(a, at, to.get());
          int64_t row = at / heads, kv = at % heads / group;
          double sum = 0, first = 0;
          for (int64_t j = 0; j < n; ++j) {
            if (seen && !seen[row * n + j]) continue;
            const float* key = &k[((row * a.n_kv + kv) * n + j) * a.head_dim];
            double score = 0;
            for (int64_t c = 0; c < a.head_dim; ++c) score += q[at * a.head_dim + c] * key[c];
            sum += std::exp2(score * a.scale);
            first += std::exp2(score * a.scale) * v[((row * a.n_kv + kv) * n + j) * a.head_dim];
          }
          if (sum > 0) near("decoded", to[0], first / sum);
        }
      }
    }
  }
}

void performer() {
  for (int64_t n : {1, 5, 64, 130}) {
    for (int64_t features : {1, 7, 40}) {
      Performer a{};
      a.batch = 2, a.n_heads = 4, a.n_kv = 2, a.n = n, a.head_dim = 5, a.n_features = features;
      a.wide = round_up(a.head_dim, sanitized::performer_kernels.panel);
      a.scale = 0.4f, a.eps = 1e-3f;
      auto omega = zeros(features * a.wide);
      for (int64_t f = 0; f < features; ++f) {
        for (int64_t c = 0; c < a.head_dim; ++c) omega[f * a.wide + c] = 0.1f * float((f + c) % 7) - 0.3f;
      }
      int64_t queries = a.batch * a.n_heads * n, keys = a.batch * a.n_kv * n;
      auto q = numbers(queries * a.head_dim), k = numbers(keys * a.head_dim), v = numbers(keys * a.head_dim);
      auto dz = numbers(queries * a.head_dim);
      auto keep = std::make_unique<bool[]>(a.batch * n);
      for (int64_t i = 0; i < a.batch * n; ++i) keep[i] = i % 4 != 2;
      auto z = zeros(queries * a.wide), total = zeros(queries);
      auto dq = zeros(queries * a.wide), dk = zeros(queries * a.wide), dv = zeros(queries * a.wide);
      a.omega = omega.get();
      a.q = rows(q.get(), a.n_heads, n, a.head_dim), a.k = rows(k.get(), a.n_kv, n, a.head_dim);
      a.v = rows(v.get(), a.n_kv, n, a.head_dim), a.dz = rows(dz.get(), a.n_heads, n, a.head_dim);
      a.z = z.get(), a.total = total.get(), a.dq = dq.get(), a.dk = dk.get(), a.dv = dv.get();
      for (const bool* seen : {static_cast<const bool*>(nullptr), static_cast<const bool*>(keep.get())}) {
        a.keep = seen;
        for (int64_t task = 0; task < a.batch * a.n_heads; ++task) sanitized::performer_kernels.forward(a, task);
        for (int64_t task = 0; task < a.batch * a.n_heads; ++task) sanitized::performer_kernels.backward(a, task);
        // The first query sees the first key alone.
        if (!seen) near("first of a text", z[0], v[0]);
      }
    }
  }
}

void attend() {
  const int64_t panel = sanitized::attend_kernels.panel;
  for (int64_t n : {1, 3, 64, 65, 200, 300}) {
    for (int64_t window : {int64_t(4), int64_t(1000)}) {
      for (int64_t block : {0, 16}) {
        Attend a{};
        a.batch = 2, a.n_heads = 4, a.n_kv = 2, a.n_q = n, a.n_k = n, a.head_dim = 5, a.scale = 0.4f;
        a.tile = block ? block : 64, a.block = block;
        int64_t tiles = (n + a.tile - 1) / a.tile, wide = round_up(a.head_dim, panel);
        auto lo = std::make_unique<int32_t[]>(n), hi = std::make_unique<int32_t[]>(n);
        for (int64_t i = 0; i < n; ++i) lo[i] = block ? 0 : int32_t(std::max<int64_t>(0, i + 1 - window)), hi[i] = int32_t(i + 1);
        a.lo = lo.get(), a.hi = hi.get(), a.limits_batch = 0, a.first = block ? 0 : 1;
        const int64_t n_blocks = block ? (n + block - 1) / block : 0;
        a.n_groups = 2, a.n_choices = block ? std::min<int64_t>(3, n_blocks) : 0;
        auto choices = std::make_unique<int32_t[]>(a.batch * a.n_groups * n * a.n_choices);
        for (int64_t i = 0; i < a.batch * a.n_groups * n; ++i) {
          for (int64_t c = 0; c < a.n_choices; ++c) {
            // The query's own block first, then those before it, none where there is none.
            choices[i * a.n_choices + c] = int32_t(std::max<int64_t>(-1, i % n / block - c));
          }
        }
        a.choices = block ? choices.get() : nullptr;
        int64_t queries = a.batch * a.n_heads * n, keys = a.batch * a.n_kv * n;
        auto q = numbers(queries * a.head_dim), k = numbers(keys * a.head_dim), v = numbers(keys * a.head_dim);
        auto dz = numbers(queries * a.head_dim);
        a.q = rows(q.get(), a.n_heads, n, a.head_dim), a.k = rows(k.get(), a.n_kv, n, a.head_dim);
        a.v = rows(v.get(), a.n_kv, n, a.head_dim), a.dz = rows(dz.get(), a.n_heads, n, a.head_dim);
        int64_t all = a.batch * a.n_kv * tiles;
        int64_t side = all * a.head_dim * round_up(a.tile, panel), flat = all * a.tile * wide;
        auto k_side = zeros(side), v_side = zeros(side), k_flat = zeros(flat), v_flat = zeros(flat);
        a.k_side = k_side.get(), a.v_side = v_side.get(), a.k_flat = k_flat.get(), a.v_flat = v_flat.get();
        auto z = zeros(queries * wide), lse = zeros(queries), dq = zeros(queries * wide);
        auto dk = zeros(flat), dv = zeros(flat);
        a.z = z.get(), a.lse = lse.get(), a.dq = dq.get(), a.dk = dk.get(), a.dv = dv.get();
        int64_t size = block ? kChunkOfChoices : kChunk, chunks = (n + size - 1) / size;
        for (int64_t task = 0; task < all; ++task) sanitized::attend_kernels.pack(a, task);
        for (int64_t task = 0; task < a.batch * a.n_heads * chunks; ++task) sanitized::attend_kernels.forward(a, task);
        for (int64_t task = 0; task < a.batch * a.n_kv; ++task) sanitized::attend_kernels.backward(a, task);
        near("first of a text", z[0], v[0]);
        if (n > 1) {
          // The second query sees both keys.
          double weight[2], sum = 0;
          for (int64_t j = 0; j < 2; ++j) {
            double score = 0;
            for (int64_t c = 0; c < a.head_dim; ++c) score += q[a.head_dim + c] * k[j * a.head_dim + c];
            sum += weight[j] = std::exp(score * a.scale);
          }
          near("second of a text", z[wide], (weight[0] * v[0] + weight[1] * v[a.head_dim]) / sum);
        }
      }
    }
  }
}

}  // namespace

int main(int n, char**) {
  vocabulary();
  decode();
  performer();
  attend();
  // With an argument a buffer is one number too short, which has to be found: that the sanitizers are at work.
  if (n > 1) {
    auto logits = numbers(63);
    double out[4];
    sanitized::vocabulary_kernels.row({logits.get(), nullptr, 64, -1, out});
  }
  std::printf("%d wrong\n", n_wrong);
  return n_wrong > 0;
}
