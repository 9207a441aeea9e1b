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

// Ragged M: the row tiles of an expert are counted from expert_offsets. A lane holds four experts,
// a warp 128; a scan gives the tiles before each lane.
template <class Config>
class RowsScheduler {
  using T = Traits<Config>;
  static constexpr int kExpertsPerLane = 4;
  static constexpr int kChunk = kExpertsPerLane * kWarp;
  static constexpr int kClusterM = T::kM * T::kCluster;
  static constexpr int kColumns = Config::kSplitB ? T::kN / 2 : T::kN;
  static constexpr int kRaster = Config::kRasterM / T::kCluster;

 public:
  __device__ explicit RowsScheduler(const Problem& p)
      : p_(p), nt_((p.n + kColumns - 1) / kColumns) {
    load_chunk();
  }

  // The tile number `index` of the list; indices of successive calls must rise. False: no more.
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
    int mt = row_tiles(begin, end);
#pragma unroll 1
    while (local >= mt * nt_) {
      local -= mt * nt_;
      ++expert;
      begin = end;
      end = clamp_offset(p_, expert + 1, begin);
      mt = row_tiles(begin, end);
    }
    const RasterPosition at = raster_position<kRaster>(local, mt, nt_);
    tile.expert = expert;
    tile.row0 = begin + at.m * kClusterM + cluster_rank * T::kM;
    tile.row_end = end;
    tile.col0 = at.n * kColumns;
    tile.k0 = 0;
    tile.k_size = p_.k;
    tile.k_tiles = expert < p_.num_experts ? (p_.k + T::kK - 1) / T::kK : 0;
    return true;
  }

 private:
  __device__ static int row_tiles(int begin, int end) {
    return (end - begin + kClusterM - 1) / kClusterM;
  }

  __device__ void load_chunk() {
    const int lane = threadIdx.x % kWarp;
    const int expert = base_ + kExpertsPerLane * lane;
    sum_ = 0;
    int begin = clamp_offset(p_, expert, 0);
#pragma unroll
    for (int i = 1; i <= kExpertsPerLane; ++i) {
      const int end = clamp_offset(p_, expert + i, begin);
      sum_ += row_tiles(begin, end) * nt_;
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

// Ragged K: every expert has the same tiles; what differs is the length of the sum.
template <class Config>
class ExpertsScheduler {
  using T = Traits<Config>;
  static constexpr int kClusterM = T::kM * T::kCluster;
  static constexpr int kRaster = Config::kRasterM / T::kCluster;

 public:
  __device__ explicit ExpertsScheduler(const Problem& p)
      : p_(p), mt_((p.m + kClusterM - 1) / kClusterM), nt_((p.n + T::kN - 1) / T::kN) {}

  __device__ bool get(int index, int cluster_rank, Tile& tile) {
    const int expert = index / (mt_ * nt_);
    if (expert >= p_.num_experts) return false;
    const RasterPosition at = raster_position<kRaster>(index - expert * mt_ * nt_, mt_, nt_);
    tile.expert = expert;
    tile.row0 = at.m * kClusterM + cluster_rank * T::kM;
    tile.row_end = p_.m;
    tile.col0 = at.n * T::kN;
    const int begin = clamp_offset(p_, expert, 0);
    tile.k0 =
        Config::kFp8Groups ? static_cast<int>(fp8_first_group(begin, expert) * kFp8Block) : begin;
    tile.k_size = clamp_offset(p_, expert + 1, begin) - begin;
    tile.k_tiles = (tile.k_size + T::kK - 1) / T::kK;
    return true;
  }

 private:
  const Problem& p_;
  int mt_, nt_;
};

template <class Config>
using Scheduler =
    cute::conditional_t<Config::kRaggedK, ExpertsScheduler<Config>, RowsScheduler<Config>>;

}  // namespace moe_ops::cuda::sm90
