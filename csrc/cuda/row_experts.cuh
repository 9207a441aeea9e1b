// Rows of the permuted order: where they lie, and whose they are.
#pragma once

#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"
#include "moe_ops/grouped_gemm.h"

namespace moe_ops::cuda {

// Returns the entry of row r < end of the permuted order in the map of its rows, or -1. Rows are
// counted in 32 bits, as offsets and maps are; addresses are not.
template <class RowsT>
__device__ int source_index(const RowsT& rows, int r, int end) {
  return r >= end ? -1 : rows.index == nullptr ? r : rows.index[r];
}

// Returns the index of the row with such an entry in its matrix, or -1.
template <class RowsT>
__device__ int indexed_source(const RowsT& rows, int entry) {
  if (rows.index != nullptr && rows.index_divisor != 1 && entry > 0) entry /= rows.index_divisor;
  return entry >= 0 && entry < rows.limit ? entry : -1;
}

template <class T>
__device__ const T* indexed_row(const DeviceRows& rows, int entry) {
  const int source = indexed_source(rows, entry);
  return source < 0 ? nullptr : static_cast<const T*>(rows.data) + source * rows.stride;
}

// Returns the index of row r of the permuted order in its matrix, or -1.
template <class RowsT>
__device__ int source_row(const RowsT& rows, int r) {
  return indexed_source(rows, source_index(rows, r, r + 1));
}

template <class T>
__device__ const T* row_pointer(const DeviceRows& rows, int r) {
  return indexed_row<T>(rows, source_index(rows, r, r + 1));
}

template <class Acc>
__device__ Acc row_factor(const RowScale& scale, int r) {
  if (scale.data == nullptr) return Acc(1);
  const int at = scale.index == nullptr ? r : scale.index[r];
  return at >= 0 && at < scale.limit ? static_cast<const Acc*>(scale.data)[at] : Acc(0);
}

// Rows of one expert, inside [0, num_rows) whatever the offsets hold.
struct RowRange {
  int begin, end;
};
__device__ inline RowRange expert_rows(const int32_t* offsets, int e, int num_rows) {
  const int begin = min(max(offsets[e], 0), num_rows);
  return {begin, min(max(offsets[e + 1], begin), num_rows)};
}

// Returns expert number `ordinal` of those that have rows, or -1. All lanes of a warp take part.
__device__ inline int expert_with_rows(const int32_t* offsets, int num_experts, int num_rows,
                                       int ordinal) {
  constexpr int kEach = 4;  // experts of a lane
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int base = 0; base < num_experts; base += kEach * kWarp) {
    const int first = base + kEach * lane;
    const auto offset = [&](int expert, int low) {
      return min(max(__ldg(offsets + min(expert, num_experts)), low), num_rows);
    };
    int begin = offset(first, 0);
    unsigned has = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int end = offset(first + i + 1, begin);
      has |= static_cast<unsigned>(end > begin) << i;
      begin = end;
    }
    int before = __popc(has);
#pragma unroll
    for (int d = 1; d < kWarp; d *= 2) {
      const int other = __shfl_up_sync(kAllLanes, before, d);
      if (lane >= d) before += other;
    }
    const int total = __shfl_sync(kAllLanes, before, kWarp - 1);
    if (ordinal < total) {
      const int where = __ffs(static_cast<int>(__ballot_sync(kAllLanes, ordinal < before))) - 1;
      unsigned left = __shfl_sync(kAllLanes, has, where);
      int skip = ordinal - __shfl_sync(kAllLanes, before - __popc(has), where);
      for (; skip > 0; --skip) left &= left - 1;
      return base + kEach * where + __ffs(static_cast<int>(left)) - 1;
    }
    ordinal -= total;
  }
  return -1;
}

// Returns the expert of row r < offsets[E].
__device__ inline int64_t expert_of_row(const int32_t* offsets, int64_t num_experts, int64_t r) {
  int64_t low = 0, high = num_experts - 1;  // the first e with r < offsets[e + 1]
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (r < offsets[middle + 1]) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// Returns this lane's part of <bias[e(r)], grad_y[r]>.
template <class S>
__device__ Accumulate<S> bias_dot(const ExpertVectors& bias, const DeviceRows& grad_y,
                                  const int32_t* offsets, int64_t num_experts, int64_t r,
                                  int64_t features, int lane) {
  const S* const grad = row_pointer<S>(grad_y, static_cast<int>(r));
  if (grad == nullptr) return 0;
  const S* const b =
      static_cast<const S*>(bias.data) + expert_of_row(offsets, num_experts, r) * bias.stride_e;
  Accumulate<S> dot = 0;
#pragma unroll 4
  for (int64_t i = lane; i < features; i += kWarp) dot += widen(b[i]) * widen(grad[i]);
  return dot;
}

}  // namespace moe_ops::cuda
