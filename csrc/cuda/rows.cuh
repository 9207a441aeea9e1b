// Kernels that work on whole rows: how rows are split over warps, and the indices that lead to
// them.
#pragma once

#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"
#include "moe_ops/common.h"

namespace moe_ops::cuda {

// A block is kRowWarps warps on as many rows, each warp on the same stretch of its row:
// kStretch accesses a lane. gridDim.x runs over rows, gridDim.y over stretches.
constexpr int kRowWarps = 8;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x % kWarp); }

// The row of this warp; the same in all its lanes.
__device__ __forceinline__ int64_t warp_row() {
  return static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarp;
}

// The first access of this lane; its next ones are kWarp further each.
template <int Stretch>
__device__ __forceinline__ int64_t lane_access() {
  return static_cast<int64_t>(blockIdx.y) * (kWarp * Stretch) + lane_id();
}

struct RowGrid {
  dim3 grid;
  unsigned block = kRowWarps * kWarp;
};

// accesses: of one row. Rows come to 2^34 at most, stretches to 2^16 (a row of 128 MiB).
inline RowGrid row_grid(int64_t rows, int64_t accesses, int stretch) {
  return {dim3(static_cast<unsigned>(ceil_div<int64_t>(rows, kRowWarps)),
               static_cast<unsigned>(ceil_div<int64_t>(accesses, int64_t{kWarp} * stretch)))};
}

__device__ __forceinline__ int64_t index_at(const IndexMap& map, int64_t i) {
  return map.is_64 ? static_cast<const int64_t*>(map.data)[i]
                   : static_cast<const int32_t*>(map.data)[i];
}

// Rows that have an expert: expert_offsets[E], held to [0, num_rows].
__device__ __forceinline__ int64_t valid_rows(const int32_t* expert_offsets, int64_t num_experts,
                                              int64_t num_rows) {
  const int64_t n = expert_offsets[num_experts];
  return n < 0 ? 0 : n < num_rows ? n : num_rows;
}

}  // namespace moe_ops::cuda
