// Attention to stretches of keys in f32, as of Dao et al. 2022, "FlashAttention", <https://arxiv.org/abs/2205.14135>,
// with queries gathered by the tile of keys that they see.
#include "attend_kernels.h"
#include "vectors.h"

namespace attn {
namespace ATTN_ISA {
namespace {

// Queries whose part of the gradients of a tile of keys is summed at once.
constexpr int64_t kGathered = 48;

INLINE int64_t n_tiles(const Attend& a) { return (a.n_k + a.tile - 1) / a.tile; }

// Where tile `t` of key/value head `head` (of all examples') begins, on its side and flat.
INLINE int64_t side_at(const Attend& a, int64_t head, int64_t t) {
  return (head * n_tiles(a) + t) * a.head_dim * round_up(a.tile, kPanel);
}
INLINE int64_t flat_at(const Attend& a, int64_t head, int64_t t) {
  return (head * n_tiles(a) + t) * a.tile * round_up(a.head_dim, kPanel);
}

// The queries of one head that a task takes, `n` from `from` on.
struct Chunk {
  int64_t b, h, from, n;
};

INLINE Chunk chunk_of(const Attend& a, int64_t n_heads, int64_t task) {
  int64_t size = a.choices ? kChunkOfChoices : kChunk, chunks = (a.n_q + size - 1) / size;
  int64_t head = task / chunks, from = task % chunks * size;
  return {head / n_heads, head % n_heads, from, least(size, a.n_q - from)};
}

// What a query sees of a tile: the keys below `first`, and those from `lo` up to `hi`.
struct Span {
  int64_t first, lo, hi;
  int64_t begin() const { return first > 0 ? 0 : lo; }
};

// Of each tile, which queries of a chunk see something of it.
struct Seen {
  const Attend& a;
  const Chunk chunk;
  Buffer starts, list;

  Seen(const Attend& a, Chunk chunk) : a(a), chunk(chunk), starts(n_tiles(a) + 2), list(count()) {
    // Filling a tile's list moves its start, kept one place further on until then, to where the next one's belongs.
    int32_t* start = starts.ints() + 1;
    for (int64_t i = 0; i < chunk.n; ++i) {
      each_tile(i, [&](int64_t t) { list.ints()[start[t]++] = static_cast<int32_t>(i); });
    }
  }

  int64_t count() {
    int64_t tiles = n_tiles(a);
    int32_t* start = starts.ints();
    memset(start, 0, (tiles + 2) * sizeof(int32_t));
    for (int64_t i = 0; i < chunk.n; ++i) each_tile(i, [&](int64_t t) { ++start[t + 2]; });
    for (int64_t t = 1; t <= tiles; ++t) start[t + 1] += start[t];
    return start[tiles + 1];
  }

  // Counted within the chunk.
  const int32_t* begin(int64_t t) const { return list.ints() + starts.ints()[t]; }
  int64_t size(int64_t t) const { return starts.ints()[t + 1] - starts.ints()[t]; }

  int64_t lo(int64_t i) const { return most(a.lo[chunk.b * a.limits_batch + chunk.from + i], 0); }
  int64_t hi(int64_t i) const { return least(a.hi[chunk.b * a.limits_batch + chunk.from + i], a.n_k); }

  template <class F>
  void each_tile(int64_t i, F&& f) const {
    int64_t low = lo(i), high = hi(i), t = 0;
    if (a.choices) {
      int64_t group = chunk.b * a.n_groups + chunk.h / (a.n_heads / a.n_groups);
      const int32_t* chosen = a.choices + (group * a.n_q + chunk.from + i) * a.n_choices;
      for (int64_t c = 0; c < a.n_choices; ++c) {
        if (chosen[c] < 0) continue;
        int64_t begin = most(low, chosen[c] * a.block), end = least(high, (chosen[c] + 1) * a.block);
        if (begin < end) {
          for (t = begin / a.tile; t * a.tile < end; ++t) f(t);
        }
      }
      return;
    }
    for (int64_t end = least(a.first, high); t * a.tile < end; ++t) f(t);
    if (low < high) {
      for (t = most(t, low / a.tile); t * a.tile < high; ++t) f(t);
    }
  }

  Span span(int64_t i, int64_t t) const {
    int64_t start = t * a.tile, end = least(hi(i) - start, a.tile);
    return {most(least(a.first - start, end), 0), most(lo(i) - start, 0), end};
  }
};

// A few queries and what they see of a tile.
template <int M>
struct Group {
  int64_t query[M];  // within the chunk
  Span span[M];
  // The keys that any of them sees, and the panels that these are in.
  int64_t begin, end, first, last;

  Group(const Seen& seen, int64_t t, const int32_t* queries) : begin(seen.a.tile), end(0) {
    for (int i = 0; i < M; ++i) {
      query[i] = queries[i];
      span[i] = seen.span(query[i], t);
      begin = least(begin, span[i].begin());
      end = most(end, span[i].hi);
    }
    first = begin / kPanel * kPanel;
    last = round_up(end, kPanel);
  }

  // Puts `value` where query i sees no key.
  void hide(int i, float* x, float value) const {
    for (int64_t k = most(first, span[i].first); k < least(span[i].lo, last); ++k) x[k] = value;
    for (int64_t k = span[i].hi; k < last; ++k) x[k] = value;
  }

  // The products of `rows` with the tile `side`, [head_dim, width], in the panels.
  inline __attribute__((always_inline)) void scores(const float* const* rows, const float* side, int64_t width, int64_t d, float* const* to) const {
    for (int64_t p = first; p < last; p += kPanel) {
      float* at[M];
      for (int i = 0; i < M; ++i) at[i] = to[i] + p;
      product<M>(rows, 1, side + p, width, d, at, nullptr);
    }
  }
};

void pack(const Attend& a, int64_t task) {
  int64_t head = task / n_tiles(a), t = task % n_tiles(a);
  int64_t width = round_up(a.tile, kPanel), d = round_up(a.head_dim, kPanel);
  int64_t n = least(a.tile, a.n_k - t * a.tile);
  auto from = [&](const Rows& x, int64_t j) { return row(x, head / a.n_kv, head % a.n_kv, t * a.tile + j); };
  auto side = [&](const Rows& x, float* to) {
    if (!to) return;
    to += side_at(a, head, t);
    memset(to, 0, a.head_dim * width * sizeof(float));
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t c = 0; c < a.head_dim; ++c) to[c * width + j] = from(x, j)[c];
    }
  };
  auto flat = [&](const Rows& x, float* to) {
    if (!to) return;
    to += flat_at(a, head, t);
    memset(to, 0, a.tile * d * sizeof(float));
    for (int64_t j = 0; j < n; ++j) memcpy(to + j * d, from(x, j), a.head_dim * sizeof(float));
  };
  side(a.k, a.k_side);
  side(a.v, a.v_side);
  flat(a.k, a.k_flat);
  flat(a.v, a.v_flat);
}

void forward(const Attend& a, int64_t task) {
  Chunk chunk = chunk_of(a, a.n_heads, task);
  int64_t head = chunk.b * a.n_heads + chunk.h, kv = chunk.b * a.n_kv + chunk.h / (a.n_heads / a.n_kv);
  int64_t width = round_up(a.tile, kPanel), d = round_up(a.head_dim, kPanel);
  float to_base_2 = a.scale * kLog2E;
  float* z = a.z + (head * a.n_q + chunk.from) * d;
  float* lse = a.lse + head * a.n_q + chunk.from;  // the largest score so far, until the end
  memset(z, 0, chunk.n * d * sizeof(float));
  Buffer weights(kRows * width), totals(chunk.n);
  for (int64_t i = 0; i < chunk.n; ++i) {
    lse[i] = kNothing;
    totals.at[i] = 0;
  }

  Seen seen(a, chunk);
  for (int64_t t = 0; t < n_tiles(a); ++t) {
    const float* k = a.k_side + side_at(a, kv, t);
    const float* v = a.v_flat + flat_at(a, kv, t);
    for (int64_t done = 0; done < seen.size(t); done += kRows) {
      with_rows(least(seen.size(t) - done, kRows), [&](auto m) {
        constexpr int M = decltype(m)::value;
        Group<M> group(seen, t, seen.begin(t) + done);
        const float *q[M], *used[M];
        float *w[M], *out[M], share[M];
        for (int i = 0; i < M; ++i) {
          q[i] = row(a.q, chunk.b, chunk.h, chunk.from + group.query[i]);
          w[i] = weights.at + i * width;
          used[i] = w[i] + group.begin;
          out[i] = z + group.query[i] * d;
        }
        group.scores(q, k, width, a.head_dim, w);
        for (int i = 0; i < M; ++i) {
          group.hide(i, w[i], kNothing);
          vec top = all(kNothing);
          for (int64_t p = group.first; p < group.last; p += kWidth) {
            vec x = load(w[i] + p);
            top = x > top ? x : top;
          }
          float &before = lse[group.query[i]], &sum_before = totals.at[group.query[i]];
          float now = largest(top) * to_base_2;
          if (before > now) now = before;
          share[i] = exp2_of(all(before - now))[0];
          vec total = {};
          for (int64_t p = group.first; p < group.last; p += kWidth) {
            vec x = exp2_of(load(w[i] + p) * to_base_2 - now);
            store(w[i] + p, x);
            total += x;
          }
          sum_before = sum_before * share[i] + sum(total);
          before = now;
        }
        add_rows<M>(used, 1, v + group.begin * d, group.end - group.begin, d, out, share);
      });
    }
  }

  for (int64_t i = 0; i < chunk.n; ++i) {
    if (lse[i] == kNothing) continue;  // sees no key: 0
    vec over = all(1 / totals.at[i]);
    for (int64_t c = 0; c < d; c += kWidth) store(z + i * d + c, load(z + i * d + c) * over);
    lse[i] += __builtin_log2f(totals.at[i]);
  }
}

// One chunk of one head: its part of `dq`, and what it adds to `dk` and `dv`.
void backward_of_chunk(const Attend& a, Chunk chunk) {
  int64_t head = chunk.b * a.n_heads + chunk.h, kv = chunk.b * a.n_kv + chunk.h / (a.n_heads / a.n_kv);
  int64_t width = round_up(a.tile, kPanel), d = round_up(a.head_dim, kPanel);
  float to_base_2 = a.scale * kLog2E;
  const float* z = a.z + (head * a.n_q + chunk.from) * d;
  const float* lse = a.lse + head * a.n_q + chunk.from;
  float* dq = a.dq + (head * a.n_q + chunk.from) * d;
  // Of the queries gathered: q and the gradient of z, their weights and the gradient of their scores.
  Buffer qs(kGathered * d), dzs(kGathered * d), weights(kGathered * width), pulls(kGathered * width), drift(chunk.n);
  memset(qs.at, 0, kGathered * d * sizeof(float));
  memset(dzs.at, 0, kGathered * d * sizeof(float));
  for (int64_t i = 0; i < chunk.n; ++i) {
    const float* dz = row(a.dz, chunk.b, chunk.h, chunk.from + i);
    float total = 0;
    for (int64_t c = 0; c < a.head_dim; ++c) total += dz[c] * z[i * d + c];
    drift.at[i] = total;
  }

  Seen seen(a, chunk);
  for (int64_t t = 0; t < n_tiles(a); ++t) {
    int64_t side = side_at(a, kv, t), flat = flat_at(a, kv, t);
    for (int64_t done = 0; done < seen.size(t); done += kGathered) {
      int64_t n = least(seen.size(t) - done, kGathered), begin = a.tile, end = 0;
      memset(weights.at, 0, n * width * sizeof(float));
      memset(pulls.at, 0, n * width * sizeof(float));
      for (int64_t at = 0; at < n; at += kRows) {
        with_rows(least(n - at, kRows), [&](auto m) {
          constexpr int M = decltype(m)::value;
          Group<M> group(seen, t, seen.begin(t) + done + at);
          const float *q[M], *dz[M], *used[M];
          float *w[M], *pull[M], *out[M], ones[M];
          for (int i = 0; i < M; ++i) {
            int64_t query = chunk.from + group.query[i];
            float *q_at = qs.at + (at + i) * d, *dz_at = dzs.at + (at + i) * d;
            memcpy(q_at, row(a.q, chunk.b, chunk.h, query), a.head_dim * sizeof(float));
            memcpy(dz_at, row(a.dz, chunk.b, chunk.h, query), a.head_dim * sizeof(float));
            q[i] = q_at;
            dz[i] = dz_at;
            w[i] = weights.at + (at + i) * width;
            pull[i] = pulls.at + (at + i) * width;
            used[i] = pull[i] + group.begin;
            out[i] = dq + group.query[i] * d;
            ones[i] = 1;
          }
          group.scores(q, a.k_side + side, width, a.head_dim, w);
          group.scores(dz, a.v_side + side, width, a.head_dim, pull);
          for (int i = 0; i < M; ++i) {
            group.hide(i, w[i], kNothing);
            float whole = lse[group.query[i]], own = drift.at[group.query[i]];
            for (int64_t p = group.first; p < group.last; p += kWidth) {
              vec x = exp2_of(load(w[i] + p) * to_base_2 - whole);
              store(w[i] + p, x);
              store(pull[i] + p, x * (load(pull[i] + p) - own) * a.scale);
            }
          }
          add_rows<M>(used, 1, a.k_flat + flat + group.begin * d, group.end - group.begin, d, out, ones);
          begin = least(begin, group.begin);
          end = most(end, group.end);
        });
      }
      for (int64_t key = begin; key < end; key += kRows) {
        with_rows(least(end - key, kRows), [&](auto m) {
          constexpr int M = decltype(m)::value;
          const float *w[M], *pull[M];
          float *dk[M], *dv[M], ones[M];
          for (int i = 0; i < M; ++i) {
            w[i] = weights.at + key + i;
            pull[i] = pulls.at + key + i;
            dk[i] = a.dk + flat + (key + i) * d;
            dv[i] = a.dv + flat + (key + i) * d;
            ones[i] = 1;
          }
          add_rows<M>(pull, width, qs.at, n, d, dk, ones);
          add_rows<M>(w, width, dzs.at, n, d, dv, ones);
        });
      }
    }
  }
}

void backward(const Attend& a, int64_t task) {
  int64_t group = a.n_heads / a.n_kv, size = a.choices ? kChunkOfChoices : kChunk;
  for (int64_t h = task % a.n_kv * group; h < (task % a.n_kv + 1) * group; ++h) {
    for (int64_t from = 0; from < a.n_q; from += size) {
      backward_of_chunk(a, {task / a.n_kv, h, from, least(size, a.n_q - from)});
    }
  }
}

constexpr float kForced = 1e30f;

// The best blocks of one query by `scores`, each block's, in no order; of equal ones the earlier. `best` is for `n` of them.
void best_of(const Attend& a, const float* scores, int64_t own, int64_t end, float* best, int32_t* chosen) {
  int64_t n = 0;
  for (int64_t j = 0; j < end; ++j) {
    int64_t away = own > j ? own - j : j - own;
    float score = j < a.n_initial || away < a.n_local ? kForced : scores[j];
    if (n == a.n_choices && !(score > best[n - 1])) continue;
    int64_t at = n < a.n_choices ? n++ : n - 1;
    for (; at > 0 && score > best[at - 1]; --at) {
      best[at] = best[at - 1];
      chosen[at] = chosen[at - 1];
    }
    best[at] = score;
    chosen[at] = static_cast<int32_t>(j);
  }
  for (; n < a.n_choices; ++n) chosen[n] = -1;
}

void choose(const Attend& a, int64_t task) {
  Chunk chunk = chunk_of(a, a.n_kv, task);
  int64_t kv = chunk.b * a.n_kv + chunk.h, group = a.n_heads / a.n_kv;
  int64_t width = round_up(a.tile, kPanel), before = a.reach - 1, n_scored = a.n_blocks * a.per_block;
  float to_base_2 = a.scale * kLog2E;
  // A row has zeros before the first weight and behind the last.
  int64_t length = before + round_up(most(n_scored, n_tiles(a) * width), kPanel);
  Buffer shared(kRows * length), weights(kRows * width), scores(a.n_blocks), best(a.n_choices);
  for (int64_t done = 0; done < chunk.n; done += kRows) {
    with_rows(least(chunk.n - done, kRows), [&](auto m) {
      constexpr int M = decltype(m)::value;
      memset(shared.at, 0, M * length * sizeof(float));
      int64_t seen[M], n_seen = 0;
      for (int i = 0; i < M; ++i) {
        seen[i] = least(a.hi[chunk.b * a.limits_batch + chunk.from + done + i], a.n_k);
        n_seen = most(n_seen, seen[i]);
      }
      for (int64_t h = chunk.h * group; h < (chunk.h + 1) * group; ++h) {
        const float* q[M];
        float* w[M];
        for (int i = 0; i < M; ++i) {
          q[i] = row(a.q, chunk.b, h, chunk.from + done + i);
          w[i] = weights.at + i * width;
        }
        const float* lse = a.lse + (chunk.b * a.n_heads + h) * a.n_q + chunk.from + done;
        for (int64_t t = 0; t * a.tile < n_seen; ++t) {
          for (int64_t p = 0; p < width && t * a.tile + p < n_seen; p += kPanel) {
            float* to[M];
            for (int i = 0; i < M; ++i) to[i] = w[i] + p;
            product<M>(q, 1, a.k_side + side_at(a, kv, t) + p, width, a.head_dim, to, nullptr);
            for (int i = 0; i < M; ++i) {
              int64_t n = least(least(seen[i] - t * a.tile, a.tile) - p, kPanel);
              float* sums = shared.at + i * length + before + t * a.tile + p;
              for (int64_t half = 0; half < kPanel && half < n; half += kWidth) {
                vec x = exp2_of(load(to[i] + half) * to_base_2 - lse[i]);
                if (n - half >= kWidth) {
                  store(sums + half, load(sums + half) + x);
                } else {
                  for (int64_t k = 0; k < n - half; ++k) sums[half + k] += x[k];
                }
              }
            }
          }
        }
      }
      for (int i = 0; i < M; ++i) {
        int64_t query = chunk.from + done + i, end = a.end[chunk.b * a.limits_batch + query];
        const float* p = shared.at + i * length + before;
        for (int64_t j = 0; j < end; ++j) {
          float total = 0;
          for (int64_t at = j * a.per_block; at < (j + 1) * a.per_block; ++at) {
            for (int64_t back = 0; back < a.reach; ++back) total += p[at - back];
          }
          scores.at[j] = total;
        }
        int32_t* chosen = a.chosen + (kv * a.n_q + query) * a.n_choices;
        best_of(a, scores.at, a.own[query], end, best.at, chosen);
      }
    });
  }
}

}  // namespace

extern const AttendKernels attend_kernels;
const AttendKernels attend_kernels = {kPanel, pack, forward, backward, choose};

}  // namespace ATTN_ISA
}  // namespace attn
