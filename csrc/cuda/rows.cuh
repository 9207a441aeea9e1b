// Kernels that work on whole rows: how rows are split over warps, and the indices that lead to
// them.
#pragma once

#include "cuda/reduce.cuh"
#include "cuda/row_blocks.h"
#include "cuda/vec.cuh"
#include "moe_ops/common.h"

namespace moe_ops::cuda {

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x % kWarp); }

// Returns the row of this warp; the same in all its lanes.
__device__ __forceinline__ int64_t warp_row() {
  return static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarp;
}

// Returns the stretch of this block.
__device__ __forceinline__ int64_t row_stretch() {
  return static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y;
}

// Returns the first access of this lane; its next ones are kWarp further each.
template <int Stretch>
__device__ __forceinline__ int64_t lane_access() {
  return row_stretch() * (kWarp * Stretch) + lane_id();
}

struct RowGrid {
  dim3 grid;
  unsigned block = kRowWarps * kWarp;
};

// accesses: of one row.
inline RowGrid row_grid(int64_t rows, int64_t accesses, int stretch) {
  const RowBlocks b = row_blocks(rows, accesses, kWarp * stretch);
  return {dim3(b.x, b.y, b.z)};
}

__device__ __forceinline__ int64_t index_at(const IndexMap& map, int64_t i) {
  return map.is_64 ? static_cast<const int64_t*>(map.data)[i]
                   : static_cast<const int32_t*>(map.data)[i];
}

// Returns the number of rows that have an expert: expert_offsets[E], clamped to [0, num_rows].
__device__ __forceinline__ int64_t valid_rows(const int32_t* expert_offsets, int64_t num_experts,
                                              int64_t num_rows) {
  const int64_t n = expert_offsets[num_experts];
  return n < 0 ? 0 : n < num_rows ? n : num_rows;
}

}  // namespace moe_ops::cuda
