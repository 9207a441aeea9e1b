// Launch parameters of backward kernels, and the workspace they share.
#pragma once

#include <algorithm>

#include "cuda/moa_attention/config.h"
#include "moe_ops/moa_attention.h"

namespace moe_ops::cuda::attention {

struct BackwardLaunch {
  MoaAttentionBwdParams b;
  int chunks;            // of the columns of a result
  int key_tiles;         // ceil(S_kv / keys of a tile)
  int band, band_tiles;  // first tile of rows of the band, and their number
  bool first_band, last_band;
  bool q_aligned, k_aligned, v_aligned, grad_aligned;
  void* delta;          // softmax: [B, S, K, n] <grad_out, out> - grad_state
  void* log_rest;       // stick-breaking: [B n][key_tiles][rows of a band] at right edges
  void* before;         // the same: sums to the left
  int* first_tile;      // [B n][tiles of a band]: keys before this tile get nothing
  void *sum_k, *sum_v;  // [B, S_kv, n, d] sums of bands so far
};

// State that orders the blocks of the sm_90a kernels that add to the same tile of 64 rows.
struct Chain {
  static constexpr int kWarps = 8;  // that have a part of grad_q each
  int* next_item;                   // of the blocks
  int* ranges;                      // [B n][tiles of a band][2] tiles of 64 keys that matter
  int* parts_done;                  // [B n][tiles of a band][8] blocks that have added
  int* sums_done;                   // [B n][tiles of a band][4] the same of `sums`, by 16 rows
  float* sums;                      // stick-breaking: [B n][tiles of a band][64]
  float* parts;                     // [B n][tiles of a band][8][64 d / 8] sums so far
};

// Parts of the workspace, in order; each starts on 256 bytes.
struct BackwardSpace {
  int64_t delta = 0, log_rest = 0, before = 0, first_tile = 0, sum_k = 0, sum_v = 0, bytes = 0;
  int64_t row_tiles = 0, key_tiles = 0, band_tiles = 0;

  explicit BackwardSpace(const MoaAttentionParams& p) {
    const TileSizes tile = backward_tile(p.type, p.head_size);
    const int64_t heads = p.batch * p.num_heads, rows = p.num_tokens * p.num_slots;
    const int64_t size = dtype_size(accumulate_type(p.type));
    row_tiles = ceil_div<int64_t>(rows, tile.rows);
    key_tiles = ceil_div<int64_t>(p.num_keys, tile.keys);
    band_tiles = std::max<int64_t>(row_tiles, 1);
    if (p.kind == AttentionKind::kSoftmax) {
      take(delta, heads * rows * size);
      return;
    }
    band_tiles = band_row_tiles(row_tiles, key_tiles);
    const int64_t kept = heads * key_tiles * band_tiles * tile.rows * size;
    take(log_rest, kept);
    take(before, kept);
    take(first_tile, heads * band_tiles * static_cast<int64_t>(sizeof(int)));
    if (band_tiles < row_tiles) {
      const int64_t sums = heads * p.num_keys * p.head_size * size;
      take(sum_k, sums);
      take(sum_v, sums);
    }
  }

 protected:
  void take(int64_t& at, int64_t n) {
    at = bytes;
    bytes += round_up<int64_t>(n, 256);
  }
};

// Workspace of the sm_90a kernels.
struct Sm90BackwardSpace : BackwardSpace {
  int64_t next_item = 0, ranges = 0, parts_done = 0, sums_done = 0, sums = 0, parts = 0;

  explicit Sm90BackwardSpace(const MoaAttentionParams& p) : BackwardSpace(p) {
    constexpr int64_t kInt = sizeof(int), kFloat = sizeof(float);
    const int64_t tiles = p.batch * p.num_heads * band_tiles;
    take(next_item, kInt);
    take(ranges, tiles * 2 * kInt);
    take(parts_done, tiles * Chain::kWarps * kInt);
    take(sums_done, tiles * 4 * kInt);
    if (p.kind == AttentionKind::kStickBreaking) take(sums, tiles * 64 * kFloat);
    take(parts, tiles * 64 * p.head_size * kFloat);
  }
  Chain chain(void* workspace) const {
    const auto part = [&](int64_t at) { return static_cast<char*>(workspace) + at; };
    return {reinterpret_cast<int*>(part(next_item)),  reinterpret_cast<int*>(part(ranges)),
            reinterpret_cast<int*>(part(parts_done)), reinterpret_cast<int*>(part(sums_done)),
            reinterpret_cast<float*>(part(sums)),     reinterpret_cast<float*>(part(parts))};
  }
};

// Returns the launch of a call; a band is chosen by take_band.
inline BackwardLaunch backward_launch(const MoaAttentionBwdParams& b, const BackwardSpace& space) {
  const auto part = [&](int64_t at) { return static_cast<char*>(b.fwd.workspace) + at; };
  BackwardLaunch launch{};
  launch.b = b;
  launch.key_tiles = static_cast<int>(space.key_tiles);
  launch.delta = part(space.delta);
  launch.log_rest = part(space.log_rest);
  launch.before = part(space.before);
  launch.first_tile = reinterpret_cast<int*>(part(space.first_tile));
  launch.sum_k = part(space.sum_k);
  launch.sum_v = part(space.sum_v);
  return launch;
}

inline void take_band(BackwardLaunch& launch, const BackwardSpace& space, int64_t band) {
  launch.band = static_cast<int>(band);
  launch.band_tiles = static_cast<int>(space.band_tiles);
  launch.first_band = band == 0;
  launch.last_band = band + space.band_tiles >= space.row_tiles;
}

}  // namespace moe_ops::cuda::attention
