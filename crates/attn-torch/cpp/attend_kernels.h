// What attend.cpp, compiled for any processor, and attend_kernels.cpp, compiled once for each set of instructions,
// share. Plain types alone: see rows.h.
#pragma once

#include "rows.h"

namespace attn {

// Softmax attention in which each query sees a few stretches of keys.
struct Attend {
  int64_t batch, n_heads, n_kv, n_q, n_k, head_dim;
  float scale;

  // Query i sees the keys from lo[i] up to but without hi[i], and of those before hi[i] the first `first`; if there are
  // choices, then `first` is 0, and it sees of these the keys of its chosen blocks alone. Keys are taken `tile` at a
  // time; it divides `block`.
  const int32_t *lo, *hi;  // [1 or batch, n_q]
  int64_t limits_batch;    // from one example's limits to the next's, 0 where they are shared
  int64_t first;
  const int32_t* choices;  // [batch, n_groups, n_q, n_choices], each block once, -1 for none; or null
  int64_t n_groups, n_choices, block, tile;

  Rows q, k, v;

  // Keys and values as products read them, filled by `pack`: tiles on their side, `[batch, n_kv, tiles, head_dim, tile
  // rounded up]`, and as they are, `[batch, n_kv, tiles * tile, head_dim rounded up]`, zeros in what rounding adds. Forward
  // reads `k_side` and `v_flat`, backward all.
  float *k_side, *v_side, *k_flat, *v_flat;

  // `[batch, n_heads, n_q, head_dim rounded up]`, and the logarithms to base 2 of the sums of exponentials, without the
  // last axis: of forward.
  float *z, *lse;

  // Gradients: given, and found; `dq` as z, `dk` and `dv` as `v_flat`. The last three begin as zeros.
  Rows dz;
  float *dq, *dk, *dv;

  // To choose blocks by what they weigh for the heads of a group, from scores of `k` and `lse`: see `choose`.
  int64_t reach, per_block, n_blocks, n_initial, n_local;
  const int32_t* own;  // [n_q]: the block of the query itself
  const int32_t* end;  // [1 or batch, n_q], by limits_batch: blocks that there are for it
  int32_t* chosen;     // [batch, n_kv, n_q, n_choices]
};

struct AttendKernels {
  // Sizes are rounded up to a multiple of this.
  int64_t panel;
  // Tile `task % tiles` of head `task / tiles` among the `batch * n_kv`.
  void (*pack)(const Attend&, int64_t task);
  // Chunk `task % chunks` of head `task / chunks` among the `batch * n_heads`.
  void (*forward)(const Attend&, int64_t task);
  // Key/value head `task` of the `batch * n_kv`, with all queries that read it.
  void (*backward)(const Attend&, int64_t task);
  // As `forward`, for a chunk of the queries of a key/value head.
  void (*choose)(const Attend&, int64_t task);
};

// Queries that are taken together: their sums stay in the cache. Blocks that few chose are met by few of a small chunk.
constexpr int64_t kChunkOfChoices = 1024, kChunk = 256;

}  // namespace attn
