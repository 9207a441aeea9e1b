// Configuration of the attention kernels by sizes: plain C++, so that a test can read it. Bits do
// not depend on the card.
#pragma once

#include <algorithm>
#include <cstdint>

#include "moe_ops/common.h"

namespace moe_ops::cuda::attention {

// Tiles of the generic kernels: rows of queries, keys, and columns of a result that a block keeps
// in registers. Backward kernels have as many keys as rows, 16 a warp.
struct TileSizes {
  int rows, keys, columns;
};

constexpr TileSizes forward_tile(DType type, int64_t head_size, bool few_rows) {
  if (type == DType::kFloat64) return {16, 16, 32};
  if (type == DType::kFloat32) return few_rows ? TileSizes{16, 32, 32} : TileSizes{32, 32, 32};
  if (few_rows) return {16, 64, 128};
  return head_size <= 64 ? TileSizes{64, 64, 64} : TileSizes{64, 64, 128};
}

// Returns the tile sizes of backward, which keeps four tiles of the head size in shared memory.
// These sizes stay below the 99 KiB of a block on compute capability 8.6, but for fp64 and more
// than 176 columns.
constexpr TileSizes backward_tile(DType type, int64_t head_size) {
  if (type == DType::kFloat64) return {16, 16, 32};
  if (type == DType::kFloat32) {
    return head_size <= 128 ? TileSizes{32, 32, 32} : TileSizes{16, 16, 32};
  }
  return head_size <= 128 ? TileSizes{64, 64, 64} : TileSizes{32, 32, 64};
}

// Returns whether blocks have 16 rows because a head has no more: one token against a cache.
constexpr bool has_few_rows(int64_t rows) { return rows <= 16; }

// Parts that the keys of a block of rows are split into, so that few heads with few rows are work
// for a whole card. Each part costs d + 2 numbers a row, written and read once.
inline int64_t key_splits(int64_t blocks, int64_t num_keys) {
  constexpr int64_t kBlocks = 264;  // two for each of 132 SMs
  constexpr int64_t kLeastKeys = 256;
  if (blocks <= 0 || blocks >= kBlocks) return 1;
  return std::clamp<int64_t>(num_keys / kLeastKeys, 1, ceil_div(kBlocks, blocks));
}

// Backward of stick-breaking keeps two numbers a row for each tile of keys: rows are taken in
// bands, so that there are about kTilesKept of them a row of all rows. Bands are pairs of tiles.
constexpr int64_t kTilesKept = 32;

inline int64_t band_row_tiles(int64_t row_tiles, int64_t key_tiles) {
  const int64_t bands =
      std::clamp<int64_t>(ceil_div(key_tiles, kTilesKept), 1, std::max<int64_t>(row_tiles, 1));
  return std::max<int64_t>(2, round_up<int64_t>(ceil_div(row_tiles, bands), 2));
}

}  // namespace moe_ops::cuda::attention
