// Which tiles a block computes. Tiles are numbered expert by expert; block b takes b, b + grid, ...
// Every warp of a block walks the same list by itself: no shared memory, no host, any E.
#pragma once

#include "cuda/grouped_gemm/sm90_config.cuh"
#include "moe_ops/quantize_fp8.h"

namespace moe_ops::cuda::sm90 {

__device__ inline int clamp_offset(const Problem& p, int expert, int low) {
  // Entry E + 1 would be the end of the rows that belong to no expert. Offsets that fall or point
  // past the rows give wrong tiles but no access out of bounds.
  const int tail = p.zero_tail ? p.rows : 0;
  const int v = expert <= p.num_experts ? __ldg(p.expert_offsets + expert) : tail;
  return min(max(v, low), p.rows);
}

// Position of tile `index` among mt x nt tiles: `raster` row tiles, then the next column, so that
// the blocks of a wave share rows of A and columns of B.
struct RasterPosition {
  int m, n;
};
template <int raster>
__device__ inline RasterPosition raster_position(int index, int mt, int nt) {
  const int band = index / (raster * nt);
  const int first = band * raster;
  const int height = min(raster, mt - first);
  const int rest = index - first * nt;
  return {first + rest % height, rest / height};
}

// Order in which clusters take the row tiles of a group: first as many side by side as a cluster
// has blocks, which share B, column by column; then a last one without a partner, by as many
// columns at once as there are blocks, each with its own B. So no block multiplies rows that are
// not there, however few an expert has.
template <class Config>
class GroupTiles {
  using T = Traits<Config>;
  static constexpr int kRaster = Config::kRasterM / T::kCluster;

 public:
  __device__ GroupTiles(int rows, int column_tiles) : nt_(column_tiles) {
    // Shifts and masks, as nothing is negative.
    const unsigned row_tiles = (static_cast<unsigned>(rows) + T::kM - 1) / T::kM;
    mt_ = static_cast<int>(row_tiles / T::kCluster);
    single_ = static_cast<int>(row_tiles % T::kCluster);
  }

  // Returns the number of tiles of a cluster.
  __device__ int count() const {
    const unsigned together = (static_cast<unsigned>(nt_) + T::kCluster - 1) / T::kCluster;
    return mt_ * nt_ + single_ * static_cast<int>(together);
  }

  // Fills in rows and columns of a block's part of tile `index`. Rows of the group end at
  // tile.row_end and begin at `begin`; a column tile has `columns`.
  __device__ void place(int index, int cluster_rank, int begin, int columns, Tile& tile) const {
    tile.shares_b = T::kCluster == 1 || index < mt_ * nt_;
    if (tile.shares_b) {
      const RasterPosition at = raster_position<kRaster>(index, mt_, nt_);
      tile.row0 = begin + (at.m * T::kCluster + cluster_rank) * T::kM;
      tile.col0 = at.n * columns;
      return;
    }
    const int column = (index - mt_ * nt_) * T::kCluster + cluster_rank;
    tile.row0 = begin + mt_ * T::kCluster * T::kM;
    tile.col0 = min(column, nt_ - 1) * columns;
    // A block without a column goes along, as the ring of its neighbor waits for it.
    if (column >= nt_) tile.row_end = tile.row0;
  }

 private:
  int nt_, mt_;
  int single_;  // a row tile without a partner: 0 or 1, as clusters are of two at most
};

// Ragged M: the row tiles of an expert are counted from expert_offsets. A lane holds four experts,
// a warp 128; a scan gives the tiles before each lane.
template <class Config>
class RowsScheduler {
  using T = Traits<Config>;
  static constexpr int kExpertsPerLane = 4;
  static constexpr int kChunk = kExpertsPerLane * kWarp;
  static constexpr int kColumns = Config::kSplitB ? T::kN / 2 : T::kN;

 public:
  __device__ RowsScheduler(const Problem& p, const typename T::SharedStorage&)
      : p_(p), nt_((p.n + kColumns - 1) / kColumns) {
    load_chunk();
  }

  // Finds tile number `index` of the list; indices of successive calls must increase. Returns false
  // past the last tile.
  __device__ bool get(int index, int cluster_rank, Tile& tile) {
    int total = __shfl_sync(~0u, sum_, kWarp - 1);
    while (index - first_tile_ >= total) {
      base_ += kChunk;
      if (base_ > p_.num_experts) return false;
      first_tile_ += total;
      load_chunk();
      total = __shfl_sync(~0u, sum_, kWarp - 1);
    }
    int local = index - first_tile_;
    const int lane = __ffs(__ballot_sync(~0u, local < sum_)) - 1;
    const int before = __shfl_sync(~0u, sum_, (lane + kWarp - 1) % kWarp);
    local -= lane == 0 ? 0 : before;

    // Read again rather than kept: registers are scarce beside the accumulators.
    int expert = base_ + kExpertsPerLane * lane;
    int begin = clamp_offset(p_, expert, 0), end = clamp_offset(p_, expert + 1, begin);
    int tiles = GroupTiles<Config>(end - begin, nt_).count();
#pragma unroll 1
    while (local >= tiles) {
      local -= tiles;
      ++expert;
      begin = end;
      end = clamp_offset(p_, expert + 1, begin);
      tiles = GroupTiles<Config>(end - begin, nt_).count();
    }
    tile.expert = expert;
    tile.row_end = end;
    GroupTiles<Config>(end - begin, nt_).place(local, cluster_rank, begin, kColumns, tile);
    tile.k0 = 0;
    tile.k_size = p_.k;
    tile.k_tiles = expert < p_.num_experts ? (p_.k + T::kK - 1) / T::kK : 0;
    return true;
  }

 private:
  __device__ void load_chunk() {
    const int lane = threadIdx.x % kWarp;
    const int expert = base_ + kExpertsPerLane * lane;
    sum_ = 0;
    int begin = clamp_offset(p_, expert, 0);
#pragma unroll
    for (int i = 1; i <= kExpertsPerLane; ++i) {
      const int end = clamp_offset(p_, expert + i, begin);
      sum_ += GroupTiles<Config>(end - begin, nt_).count();
      begin = end;
    }
#pragma unroll
    for (int d = 1; d < kWarp; d *= 2) {
      const int other = __shfl_up_sync(~0u, sum_, d);
      if (lane >= d) sum_ += other;
    }
  }

  const Problem& p_;
  int nt_;
  int base_ = 0;        // first expert of the chunk
  int first_tile_ = 0;  // tiles before it
  int sum_;             // tiles of the chunk up to and with this lane
};

// Orders the experts of a ragged-K product by their number of rows, the most first; each thread
// counts those before its own. All threads of a block take part, and a barrier has to follow.
template <class Config>
__device__ inline void order_experts(const Problem& p,
                                     typename Traits<Config>::SharedStorage& smem) {
  if constexpr (Config::kRaggedK) {
    if (p.num_experts > kOrderedExperts) return;
    int* rows = reinterpret_cast<int*>(smem.a);  // the ring is not in use yet
    for (int expert = threadIdx.x; expert < p.num_experts; expert += Traits<Config>::kThreads) {
      const int begin = clamp_offset(p, expert, 0);
      rows[expert] = clamp_offset(p, expert + 1, begin) - begin;
    }
    __syncthreads();
    for (int expert = threadIdx.x; expert < p.num_experts; expert += Traits<Config>::kThreads) {
      const int own = rows[expert];
      int before = 0;
      for (int other = 0; other < p.num_experts; ++other)
        before += rows[other] > own - (other < expert);
      smem.order[before] = static_cast<uint16_t>(expert);
    }
    // TMA writes there next.
    cutlass::arch::fence_view_async_shared();
  }
}

// Ragged K: every expert has the same tiles; what differs is the length of the sum. Long ones come
// first, and every other round is dealt backwards, so that who had the longest gets the shortest.
template <class Config>
class ExpertsScheduler {
  using T = Traits<Config>;

 public:
  __device__ ExpertsScheduler(const Problem& p, const typename T::SharedStorage& smem)
      : p_(p), smem_(smem) {}

  __device__ bool get(int index, int cluster_rank, Tile& tile) {
    const int step = static_cast<int>(gridDim.x) / T::kCluster, round = index / step;
    if (round % 2 == 1) index = (2 * round + 1) * step - 1 - index;
    // Computed again rather than kept, for the sake of a producer of 40 registers.
    const GroupTiles<Config> tiles(p_.m, (p_.n + T::kN - 1) / T::kN);
    const int place = index / tiles.count();
    if (place >= p_.num_experts) return false;
    const int expert = p_.num_experts > kOrderedExperts ? place : smem_.order[place];
    tile.expert = expert;
    tile.row_end = p_.m;
    tiles.place(index - place * tiles.count(), cluster_rank, 0, T::kN, tile);
    const int begin = clamp_offset(p_, expert, 0);
    tile.k0 =
        Config::kFp8Groups ? static_cast<int>(fp8_first_group(begin, expert) * kFp8Block) : begin;
    tile.k_size = clamp_offset(p_, expert + 1, begin) - begin;
    tile.k_tiles = (tile.k_size + T::kK - 1) / T::kK;
    return true;
  }

 private:
  const Problem& p_;
  const typename T::SharedStorage& smem_;
};

template <class Config>
using Scheduler =
    cute::conditional_t<Config::kRaggedK, ExpertsScheduler<Config>, RowsScheduler<Config>>;

}  // namespace moe_ops::cuda::sm90
