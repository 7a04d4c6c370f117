// Causal linear attention by positive random features in f32: Choromanski et al. 2020, "Rethinking Attention with
// Performers", <https://arxiv.org/abs/2009.14794>, with the prefix sums of its section 2.5 taken chunk by chunk.
//
//   phi(x) = exp(u - max u) + eps,   u = omega x,   log factor of a key: l = max u - scale |k|^2 / 2
//   z_i = Σ_{j <= i} e_ij phi(q_i).phi(k_j) v_j / Σ_{j <= i} e_ij phi(q_i).phi(k_j),   e_ij = exp(l_j - m_i)
//
// m_i, the largest l up to i, cancels and takes no gradient. Sums over earlier chunks are kept relative to m at the end of the
// chunk before. Features are laid out with the tokens of a chunk side by side.
#include "performer_kernels.h"
#include "vectors.h"

namespace attn {
namespace ATTN_ISA {
namespace {

// Tokens of a chunk: a few panels, as what they are mapped to shall stay in the cache.
constexpr int64_t kTokens = 32;
static_assert(kTokens % kPanel == 0, "");
// The log factor of keys that are not seen: below every other, and a number.
constexpr float kHidden = -1e30f;

INLINE vec exp_of(vec x) { return exp2_of(x * kLog2E); }
INLINE float exp_of(float x) { return exp_of(all(x))[0]; }

// c[i] = factor[i * factor_step] c[i] + Σ_k a[i * a_row + k * step] b[k], rows of `width` columns; without factors c is
// written alone.
INLINE void multiply(int64_t rows, const float* a, int64_t a_row, int64_t step, const float* b, int64_t n, int64_t width,
                     float* c, const float* factor = nullptr, int64_t factor_step = 0) {
  for (int64_t at = 0; at < rows; at += kRows) {
    with_rows(least(rows - at, kRows), [&](auto m) {
      constexpr int M = decltype(m)::value;
      const float* from[M];
      float *to[M], by[M];
      for (int i = 0; i < M; ++i) {
        from[i] = a + (at + i) * a_row;
        to[i] = c + (at + i) * width;
        if (factor) by[i] = factor[(at + i) * factor_step];
      }
      add_rows<M>(from, step, b, n, width, to, factor ? by : nullptr);
    });
  }
}

// Tokens `from` to `from + n` of a head.
struct Piece {
  int64_t b, h, from, n;
};

// [kTokens, wide], zeros in what is added.
INLINE void flat(const Performer& a, const Rows& x, const Piece& piece, float* to) {
  memset(to, 0, kTokens * a.wide * sizeof(float));
  for (int64_t i = 0; i < piece.n; ++i) {
    memcpy(to + i * a.wide, row(x, piece.b, piece.h, piece.from + i), a.head_dim * sizeof(float));
  }
}

// [kTokens, wide] -> [head_dim, kTokens].
INLINE void turn(const Performer& a, const float* x, float* to) {
  for (int64_t i = 0; i < kTokens; ++i) {
    for (int64_t c = 0; c < a.head_dim; ++c) to[c * kTokens + i] = x[i * a.wide + c];
  }
}

// x[c] *= factor, by lanes.
INLINE void scale_lanes(float* x, const float* factor, int64_t rows) {
  for (int64_t lane = 0; lane < kTokens; lane += kWidth) {
    vec by = load(factor + lane);
    for (int64_t c = 0; c < rows; ++c) store(x + c * kTokens + lane, load(x + c * kTokens + lane) * by);
  }
}

// The features of tokens, [head_dim, kTokens] -> [n_features, kTokens], and the log factors, if wanted.
INLINE void features(const Performer& a, const float* x, float* phi, float* log_factor) {
  multiply(a.n_features, a.omega, a.wide, 1, x, a.head_dim, kTokens, phi);
  for (int64_t lane = 0; lane < kTokens; lane += kWidth) {
    vec top = load(phi + lane);
    for (int64_t r = 1; r < a.n_features; ++r) {
      vec u = load(phi + r * kTokens + lane);
      top = u > top ? u : top;
    }
    for (int64_t r = 0; r < a.n_features; ++r) {
      float* at = phi + r * kTokens + lane;
      store(at, exp_of(load(at) - top) + a.eps);
    }
    if (!log_factor) continue;
    vec square = {};
    for (int64_t c = 0; c < a.head_dim; ++c) {
      vec at = load(x + c * kTokens + lane);
      square += at * at;
    }
    store(log_factor + lane, top - square * (a.scale / 2));
  }
}

// From the gradient of features that of u, in place. `sums` and `by` hold a part of it: sums[r] by[lane]. Leaves Σ_r phi
// times its gradient in `log_factor`, which is the gradient of the log factor, if wanted.
INLINE void features_back(const Performer& a, const float* phi, const float* sums, const float* by, float* d, float* log_factor) {
  float largest_phi = 1.0f + a.eps;
  for (int64_t lane = 0; lane < kTokens; lane += kWidth) {
    vec whole = {}, ties = {}, pull = {}, factor = load(by + lane);
    for (int64_t r = 0; r < a.n_features; ++r) {
      float* at = d + r * kTokens + lane;
      vec x = load(at) + sums[r] * factor, f = load(phi + r * kTokens + lane);
      whole += x;
      pull += x * f;
      ties += f >= largest_phi ? all(1.0f) : vec{};
      store(at, x * (f - a.eps));
    }
    // The largest u stands in the factor, which the log factor or the division gives back, but for what eps adds.
    vec share = whole * a.eps / ties;
    for (int64_t r = 0; r < a.n_features; ++r) {
      float* at = d + r * kTokens + lane;
      store(at, load(at) + (load(phi + r * kTokens + lane) >= largest_phi ? share : vec{}));
    }
    if (log_factor) store(log_factor + lane, pull);
  }
}

// The numbers of the lanes from `first` on.
INLINE ivec lanes(int64_t first) {
  ivec x = {};
  for (int64_t at = 0; at < kWidth; ++at) x[at] = static_cast<int32_t>(first + at);
  return x;
}

// Hides keys, and writes the largest log factor up to each token, from `before` on.
INLINE void scan(const Performer& a, const Piece& piece, float before, float* log_factor, float* largest) {
  for (int64_t i = 0; i < kTokens; ++i) {
    if (i >= piece.n) {
      log_factor[i] = kNothing;
    } else if (a.keep && !a.keep[piece.b * a.n + piece.from + i]) {
      log_factor[i] = kHidden;
    }
    if (log_factor[i] > before) before = log_factor[i];
    largest[i] = before;
  }
}

// to[i] = exp(sign (x[i] - than)).
INLINE void relative(const float* x, float than, float sign, float* to) {
  for (int64_t lane = 0; lane < kTokens; lane += kWidth) store(to + lane, exp_of((load(x + lane) - than) * sign));
}

// w[i][j] = (w[i][j] + add[i]) e_ij where j <= i, 0 elsewhere.
INLINE void weigh(float* w, int64_t n, const float* log_factor, const float* largest, const float* add) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t lane = 0; lane < kTokens; lane += kWidth) {
      float* at = w + i * kTokens + lane;
      vec x = (load(at) + (add ? add[i] : 0.0f)) * exp_of(load(log_factor + lane) - largest[i]);
      store(at, lanes(lane) <= static_cast<int32_t>(i) ? x : vec{});
    }
  }
}

// sums[r] = factor sums[r] + Σ_lane phi[r][lane] by[lane].
INLINE void add_up(const Performer& a, const float* phi, const float* by, float factor, float* sums) {
  for (int64_t r = 0; r < a.n_features; ++r) {
    vec total = {};
    for (int64_t lane = 0; lane < kTokens; lane += kWidth) total += load(phi + r * kTokens + lane) * load(by + lane);
    sums[r] = factor * sums[r] + sum(total);
  }
}

// Sums over the keys so far: Σ phi(k) v, [n_features, wide], and Σ phi(k), relative to the largest log factor.
struct Sums {
  explicit Sums(const Performer& a) : values(a.n_features * a.wide), ones(a.n_features) {
    memset(values.at, 0, a.n_features * a.wide * sizeof(float));
    memset(ones.at, 0, a.n_features * sizeof(float));
  }
  // Adds rows of `x`, [kTokens, wide], and numbers `y`, by the features `phi`, after scaling what is there.
  void add(const Performer& a, const float* phi, const float* x, const float* y, float factor) {
    multiply(a.n_features, phi, kTokens, 1, x, kTokens, a.wide, values.at, &factor, 0);
    add_up(a, phi, y, factor, ones.at);
  }
  Buffer values, ones;
};

INLINE void scale_rows(const Performer& a, float* x, const float* factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t c = 0; c < a.wide; c += kWidth) store(x + i * a.wide + c, load(x + i * a.wide + c) * factor[i]);
  }
}

void forward(const Performer& a, int64_t task) {
  int64_t b = task / a.n_heads, h = task % a.n_heads, kv = h / (a.n_heads / a.n_kv);
  float *z = a.z + task * a.n * a.wide, *totals = a.total + task * a.n;
  Buffer rows(kTokens * a.wide), turned(a.head_dim * kTokens), q(a.n_features * kTokens), k(a.n_features * kTokens);
  Buffer v(kTokens * a.wide), out(kTokens * a.wide), w(kTokens * kTokens);
  Sums sums(a);
  float log_factor[kTokens], largest[kTokens], before[kTokens], after[kTokens], far[kTokens], start = kHidden;
  for (int64_t from = 0; from < a.n; from += kTokens) {
    Piece piece = {b, h, from, least(kTokens, a.n - from)}, keys = {b, kv, from, piece.n};
    flat(a, a.q, piece, rows.at);
    turn(a, rows.at, turned.at);
    features(a, turned.at, q.at, nullptr);
    flat(a, a.k, keys, rows.at);
    turn(a, rows.at, turned.at);
    features(a, turned.at, k.at, log_factor);
    flat(a, a.v, keys, v.at);
    scan(a, piece, start, log_factor, largest);
    float end = largest[kTokens - 1];
    relative(largest, start, -1, before);
    relative(log_factor, end, 1, after);

    multiply(piece.n, q.at, 1, kTokens, k.at, a.n_features, kTokens, w.at);
    weigh(w.at, piece.n, log_factor, largest, nullptr);
    multiply(piece.n, q.at, 1, kTokens, sums.values.at, a.n_features, a.wide, out.at);
    multiply(piece.n, w.at, kTokens, 1, v.at, kTokens, a.wide, out.at, before, 1);
    for (int64_t lane = 0; lane < kTokens; lane += kWidth) {
      vec total = {};
      for (int64_t r = 0; r < a.n_features; ++r) total += load(q.at + r * kTokens + lane) * sums.ones.at[r];
      store(far + lane, total * load(before + lane));
    }
    for (int64_t i = 0; i < piece.n; ++i) {
      vec near = {};
      for (int64_t lane = 0; lane < kTokens; lane += kWidth) near += load(w.at + i * kTokens + lane);
      float total = far[i] + sum(near);
      totals[from + i] = total;
      vec over = all(total == 0 ? 1.0f : 1 / total);
      for (int64_t c = 0; c < a.wide; c += kWidth) store(z + (from + i) * a.wide + c, load(out.at + i * a.wide + c) * over);
    }
    scale_rows(a, v.at, after, piece.n);
    sums.add(a, k.at, v.at, after, exp_of(start - end));
    start = end;
  }
}

// The gradients of a chunk's sums: of Σ e phi phi v, [kTokens, wide], and of Σ e phi phi.
void of_sums(const Performer& a, int64_t task, const Piece& piece, float* g, float* t) {
  const float* z = a.z + task * a.n * a.wide;
  flat(a, a.dz, piece, g);
  for (int64_t i = 0; i < kTokens; ++i) {
    float total = i < piece.n ? a.total[task * a.n + piece.from + i] : 0;
    float over = total == 0 ? 0.0f : 1 / total;
    vec dot = {};
    for (int64_t c = 0; c < a.wide; c += kWidth) {
      vec x = load(g + i * a.wide + c) * over;
      if (i < piece.n) dot += x * load(z + (piece.from + i) * a.wide + c);
      store(g + i * a.wide + c, x);
    }
    t[i] = -sum(dot);
  }
}

void backward(const Performer& a, int64_t task) {
  int64_t b = task / a.n_heads, h = task % a.n_heads, kv = h / (a.n_heads / a.n_kv), chunks = (a.n + kTokens - 1) / kTokens;
  Buffer rows(kTokens * a.wide), turned(a.head_dim * kTokens), q(a.n_features * kTokens), k(a.n_features * kTokens);
  Buffer d(a.n_features * kTokens), v(kTokens * a.wide), g(kTokens * a.wide), w(kTokens * kTokens), pull(kTokens * kTokens);
  Buffer log_factors(chunks * kTokens), largests(chunks * kTokens);
  float t[kTokens], before[kTokens], after[kTokens], by[kTokens], of_log[kTokens];
  const float one = 1;
  auto map = [&](const Rows& x, const Piece& piece, float* phi, float* log_factor) {
    flat(a, x, piece, rows.at);
    turn(a, rows.at, turned.at);
    features(a, turned.at, phi, log_factor);
  };

  // Forwards, with the sums before each chunk: queries.
  {
    Sums sums(a);
    float start = kHidden;
    for (int64_t from = 0; from < a.n; from += kTokens) {
      Piece piece = {b, h, from, least(kTokens, a.n - from)}, keys = {b, kv, from, piece.n};
      float *log_factor = log_factors.at + from, *largest = largests.at + from;
      map(a.q, piece, q.at, nullptr);
      map(a.k, keys, k.at, log_factor);
      flat(a, a.v, keys, v.at);
      scan(a, piece, start, log_factor, largest);
      float end = largest[kTokens - 1];
      relative(largest, start, -1, before);
      relative(log_factor, end, 1, after);
      of_sums(a, task, piece, g.at, t);
      turn(a, g.at, turned.at);
      // pull[j][i] = (g_i.v_j + t_i) e_ij
      multiply(piece.n, v.at, a.wide, 1, turned.at, a.head_dim, kTokens, pull.at);
      for (int64_t lane = 0; lane < kTokens; lane += kWidth) {
        for (int64_t j = 0; j < piece.n; ++j) {
          float* at = pull.at + j * kTokens + lane;
          vec x = (load(at) + load(t + lane)) * exp_of(log_factor[j] - load(largest + lane));
          store(at, lanes(lane) >= static_cast<int32_t>(j) ? x : vec{});
        }
        store(by + lane, load(t + lane) * load(before + lane));
      }
      scale_lanes(turned.at, before, a.head_dim);
      multiply(a.n_features, sums.values.at, a.wide, 1, turned.at, a.head_dim, kTokens, d.at);
      multiply(a.n_features, k.at, kTokens, 1, pull.at, piece.n, kTokens, d.at, &one, 0);
      features_back(a, q.at, sums.ones.at, by, d.at, nullptr);
      multiply(piece.n, d.at, 1, kTokens, a.omega, a.n_features, a.wide, a.dq + (task * a.n + from) * a.wide);
      scale_rows(a, v.at, after, piece.n);
      sums.add(a, k.at, v.at, after, exp_of(start - end));
      start = end;
    }
  }

  // Backwards, with the sums over the queries behind each chunk, relative to the largest log factor at its end: keys, values.
  Sums later(a);
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    int64_t from = chunk * kTokens;
    Piece piece = {b, h, from, least(kTokens, a.n - from)}, keys = {b, kv, from, piece.n};
    const float *log_factor = log_factors.at + from, *largest = largests.at + from;
    float *dk = a.dk + (task * a.n + from) * a.wide, *dv = a.dv + (task * a.n + from) * a.wide;
    float start = chunk == 0 ? kHidden : largest[-1], end = largest[kTokens - 1];
    map(a.q, piece, q.at, nullptr);
    map(a.k, keys, k.at, nullptr);
    flat(a, a.v, keys, v.at);
    of_sums(a, task, piece, g.at, t);
    relative(log_factor, end, 1, after);
    relative(largest, start, -1, before);

    multiply(piece.n, q.at, 1, kTokens, k.at, a.n_features, kTokens, w.at);
    weigh(w.at, piece.n, log_factor, largest, nullptr);
    multiply(piece.n, k.at, 1, kTokens, later.values.at, a.n_features, a.wide, dv);
    multiply(piece.n, w.at, 1, kTokens, g.at, piece.n, a.wide, dv, after, 1);

    turn(a, v.at, turned.at);
    multiply(piece.n, g.at, a.wide, 1, turned.at, a.head_dim, kTokens, pull.at);
    weigh(pull.at, piece.n, log_factor, largest, t);
    scale_lanes(turned.at, after, a.head_dim);
    multiply(a.n_features, later.values.at, a.wide, 1, turned.at, a.head_dim, kTokens, d.at);
    multiply(a.n_features, q.at, kTokens, 1, pull.at, piece.n, kTokens, d.at, &one, 0);
    features_back(a, k.at, later.ones.at, after, d.at, of_log);
    multiply(piece.n, d.at, 1, kTokens, a.omega, a.n_features, a.wide, dk);
    for (int64_t j = 0; j < piece.n; ++j) {
      const float* key = row(a.k, keys.b, keys.h, from + j);
      for (int64_t c = 0; c < a.head_dim; ++c) dk[j * a.wide + c] -= of_log[j] * a.scale * key[c];
    }

    scale_rows(a, g.at, before, kTokens);
    for (int64_t i = 0; i < kTokens; ++i) t[i] *= before[i];
    later.add(a, q.at, g.at, t, exp_of(start - end));
  }
}

}  // namespace

extern const PerformerKernels performer_kernels;
const PerformerKernels performer_kernels = {kPanel, forward, backward};

}  // namespace ATTN_ISA
}  // namespace attn
