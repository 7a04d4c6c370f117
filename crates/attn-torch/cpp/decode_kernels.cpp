// Single queries: keys and values are read once, for all the queries of a group, as they lie.
#include "decode_kernels.h"
#include "vectors.h"

#include <cmath>

namespace attn {
namespace ATTN_ISA {
namespace {

// Keys whose scores are made before their values are added: both are then near.
constexpr int64_t kBlock = 64;
// Floats of a line of the cache.
constexpr int64_t kLine = 16;

// Rows that are asked for a few lines at a time, so that they come while something is computed.
struct Ahead {
  const float* at;  // a row of k, and once there are no more, of v
  const float* v;   // null once it is
  int64_t k_row, v_row, n, d;
  int64_t n_left, c;  // rows of this side, and where in the row

  // No division: at eight queries of a key it would cost as much as their products.
  inline __attribute__((always_inline)) void lines(int64_t count) {
    for (; count > 0 && n_left > 0; --count) {
      __builtin_prefetch(at + c, 0, 2);
      c += kLine;
      if (c < d) continue;
      c = 0;
      at += v ? k_row : v_row;
      if (--n_left == 0 && v) at = v, v = nullptr, n_left = n;
    }
  }
};

// The sums of N vectors, in the lanes of one: by halves, lanes that belong together side by side.
template <int N>
struct Sums {
  INLINE vec of(const vec* x) {
    // Lane i of the halves' sums holds a part of vector i mod N / 2.
    vec a = Sums<N / 2>::of(x), b = Sums<N / 2>::of(x + N / 2);
    ivec low, high;
    for (int i = 0; i < kWidth; ++i) {
      int from = (i / N) * N + (i % (N / 2)), side = (i % N) / (N / 2) * static_cast<int>(kWidth);
      low[i] = from + side;
      high[i] = from + N / 2 + side;
    }
    return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
  }
};

template <>
struct Sums<1> {
  INLINE vec of(const vec* x) { return x[0]; }
};

// q · k of kWidth keys.
INLINE vec scores_of(const float* q, const float* k, int64_t row, int64_t d) {
  vec s[kWidth];
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) s[i] = vec{};
  for (int64_t c = 0; c < d; c += kWidth) {
    vec x = load(q + c);
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) s[i] += x * load(k + i * row + c);
  }
  return Sums<kWidth>::of(s);
}

INLINE float score_of(const float* q, const float* k, int64_t d) {
  vec s = {};
  for (int64_t c = 0; c < d; c += kWidth) s += load(q + c) * load(k + c);
  return sum(s);
}

// z[i] = factor[i] z[i] + Σ_j p[i][j] v[j] for all queries.
INLINE void add_values(const Decode& a, const float* p, const float* v, int64_t n, float* z, const float* factor) {
  for (int64_t c = 0; c < a.head_dim; c += kPanel) {
    // As even as can be: eight queries are four and four.
    int64_t n_parts = (a.group + kRows - 1) / kRows, size = (a.group + n_parts - 1) / n_parts;
    for (int64_t from = 0; from < a.group; from += size) {
      with_rows(least(size, a.group - from), [&](auto rows) __attribute__((always_inline)) {
        constexpr int M = decltype(rows)::value;
        const float* weights[M];
        float* to[M];
        for (int i = 0; i < M; ++i) weights[i] = p + (from + i) * kBlock, to[i] = z + (from + i) * a.head_dim + c;
        product<M>(weights, 1, v + c, a.v.row, n, to, factor + from);
      });
    }
  }
}

void stretch(const Decode& a, int64_t task) {
  int64_t part = task % a.n_stretches, head = task / a.n_stretches % a.n_kv, batch = task / a.n_stretches / a.n_kv;
  int64_t begin = part * a.stretch, end = least(begin + a.stretch, a.n), d = a.head_dim;
  const bool* keep = a.keep ? a.keep + batch * a.n : nullptr;
  // Where the queries of this group put what they find: a stretch's numbers, then the next query's.
  int64_t first = (batch * a.n_kv + head) * a.group;
  Buffer weights(a.group * kBlock), z(a.group * d), of_query(3 * a.group);
  float *most_of = of_query.at, *total = most_of + a.group, *factor = total + a.group;
  for (int64_t i = 0; i < a.group; ++i) most_of[i] = kNothing, total[i] = 0;
  memset(z.at, 0, sizeof(float) * static_cast<size_t>(a.group * d));
  for (int64_t from = begin; from < end; from += kBlock) {
    int64_t n = least(kBlock, end - from);
    const float *k = row(a.k, batch, head, from), *v = row(a.v, batch, head, from);
    int64_t n_next = least(kBlock, a.n - from - n), n_steps = a.group * ((n + kWidth - 1) / kWidth);
    // A code is keys and values both, and comes once.
    const float* next_v = k == v ? nullptr : v + n * a.v.row;
    Ahead next{k + n * a.k.row, next_v, a.k.row, a.v.row, n_next, d, n_next, 0};
    int64_t lines = (2 * n_next * ((d + kLine - 1) / kLine) + n_steps - 1) / n_steps;
    for (int64_t i = 0; i < a.group; ++i) {
      const float* q = row(a.q, batch, head * a.group + i, 0);
      float* w = weights.at + i * kBlock;
      int64_t j = 0;
      for (; j + kWidth <= n; j += kWidth) {
        next.lines(lines);
        store(w + j, scores_of(q, k + j * a.k.row, a.k.row, d) * a.scale);
      }
      for (; j < n; ++j) w[j] = score_of(q, k + j * a.k.row, d) * a.scale;
      if (keep)
        for (j = 0; j < n; ++j) w[j] = keep[from + j] ? w[j] : kNothing;
      for (j = n; j % kWidth; ++j) w[j] = kNothing;
      vec found = all(most_of[i]);
      for (j = 0; j < n; j += kWidth) {
        vec here = load(w + j);
        found = here > found ? here : found;
      }
      float before = most_of[i], now = largest(found);
      most_of[i] = now;
      // Nothing seen so far: nothing to scale. What is no number weighs as itself, and so ends in z.
      float from_most = now == kNothing ? 0 : now;
      factor[i] = before == kNothing ? (total[i] == 0 ? 0 : 1) : std::exp2(before - now);
      vec sums = {};
      for (j = 0; j < n; j += kWidth) {
        vec score = load(w + j), x = exp2_of(score - from_most);
        x = score == score ? x : score;
        store(w + j, x);
        sums += x;
      }
      total[i] = factor[i] * total[i] + sum(sums);
    }
    add_values(a, weights.at, v, n, z.at, factor);
  }
  for (int64_t i = 0; i < a.group; ++i) {
    int64_t at = (first + i) * a.n_stretches + part;
    a.most[at] = most_of[i], a.total[at] = total[i];
    memcpy(a.z + at * d, z.at + i * d, sizeof(float) * static_cast<size_t>(d));
  }
}

void merge(const Decode& a, int64_t at, float* to) {
  const float *most_of = a.most + at * a.n_stretches, *totals = a.total + at * a.n_stretches, *z = a.z + at * a.n_stretches * a.head_dim;
  float found = kNothing, total = 0;
  for (int64_t s = 0; s < a.n_stretches; ++s) found = most_of[s] > found ? most_of[s] : found;
  memset(to, 0, sizeof(float) * static_cast<size_t>(a.head_dim));
  for (int64_t s = 0; s < a.n_stretches; ++s) {
    if (totals[s] == 0) continue;
    float factor = most_of[s] == kNothing ? 1 : std::exp2(most_of[s] - found);
    total += factor * totals[s];
    for (int64_t c = 0; c < a.head_dim; ++c) to[c] += factor * z[s * a.head_dim + c];
  }
  // A query that sees nothing finds nothing.
  float share = total == 0 ? 0 : 1 / total;
  for (int64_t c = 0; c < a.head_dim; ++c) to[c] *= share;
}

}  // namespace

extern const DecodeKernels decode_kernels;
const DecodeKernels decode_kernels = {kPanel, stretch, merge};

}  // namespace ATTN_ISA
}  // namespace attn
