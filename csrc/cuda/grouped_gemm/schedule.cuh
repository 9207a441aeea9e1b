// Which tile a block works on: offsets are read on the device, so the host knows neither the number
// of tiles nor their experts.
#pragma once

#include <cstdint>

#include "cuda/grouped_gemm/tile.cuh"

namespace moe_ops::cuda::generic {

// Row tiles of one expert that are swept together over all columns: the rows of 16 tiles stay in L2
// while each weight is read once for all of them.
constexpr int kSweep = 16;

struct TileWork {
  int expert;       // num_experts: the tail, rows without an expert
  int row, end;     // first row of the tile, end of the expert's rows
  int column_tile;  // of kTileN columns
};

// Tiles are numbered expert by expert, the tail last; expert e has ceil(rows / kTileM) * column
// tiles of them. A warp looks at 32 experts at once, one a lane, and calls go upwards. Between
// calls only the place is kept: registers belong to the sums.
template <int kTileM>
class Schedule {
 public:
  // Finds a tile; all lanes of a warp pass the same number. Returns false past the last tile.
  __device__ bool find(int64_t tile, const int32_t* offsets, int num_experts, int num_rows,
                       bool with_tail, int column_tiles, TileWork& work) {
    constexpr unsigned kAll = 0xffffffffu;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int num_groups = num_experts + (with_tail ? 1 : 0);
    for (; first_ < num_groups; first_ += 32) {
      const int group = first_ + lane;
      RowRange range{0, 0};
      if (group < num_experts) {
        range = expert_rows(offsets, group, num_rows);
      } else if (group < num_groups) {
        range = {min(max(offsets[num_experts], 0), num_rows), num_rows};
      }
      const int count = (range.end - range.begin + kTileM - 1) / kTileM;
      int64_t last = int64_t{count} * column_tiles;  // of the groups up to this lane's
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int64_t other = __shfl_up_sync(kAll, last, step);
        if (lane >= step) last += other;
      }
      const unsigned later = __ballot_sync(kAll, tile - base_ < last);
      if (later == 0) {
        base_ += __shfl_sync(kAll, last, 31);
        continue;
      }
      const int found = __ffs(later) - 1;
      const int tiles = __shfl_sync(kAll, count, found);
      int64_t i = tile - base_ - __shfl_sync(kAll, last, found) + int64_t{tiles} * column_tiles;
      const int sweep = static_cast<int>(i / (int64_t{kSweep} * column_tiles));
      i -= int64_t{kSweep} * column_tiles * sweep;
      const int height = min(kSweep, tiles - sweep * kSweep);
      work.expert = first_ + found;
      work.column_tile = static_cast<int>(i / height);
      work.row = __shfl_sync(kAll, range.begin, found) +
                 (sweep * kSweep + static_cast<int>(i % height)) * kTileM;
      work.end = __shfl_sync(kAll, range.end, found);
      return true;
    }
    return false;
  }

 private:
  int first_ = 0;     // group of lane 0
  int64_t base_ = 0;  // tiles of all groups before it
};

}  // namespace moe_ops::cuda::generic
