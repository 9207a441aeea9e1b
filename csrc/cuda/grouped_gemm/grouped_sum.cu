// out[e] = sum over the rows r of e of scale(r) * rows[r].
//
// A block sums 32 columns of one expert: each of its 8 warps every eighth row, then the 8 partial
// sums in order. Neither depends on the grid, so neither do the bits.
#include <limits>

#include "cuda/check.h"
#include "cuda/dispatch.h"
#include "cuda/row_experts.cuh"
#include "cuda/vec.cuh"

namespace moe_ops::cuda {

namespace {

constexpr int kColumns = 32, kSlices = 8;

template <class S, class Out>
__global__ void __launch_bounds__(kColumns* kSlices)
    grouped_sum_kernel(const __grid_constant__ GroupedSumParams p, int column_blocks) {
  using Acc = Accumulate<S>;
  __shared__ Acc partial[kSlices][kColumns];
  const int lane = static_cast<int>(threadIdx.x) % kColumns;
  const int slice = static_cast<int>(threadIdx.x) / kColumns;
  const int e = static_cast<int>(blockIdx.x / static_cast<unsigned>(column_blocks));
  const int col =
      static_cast<int>(blockIdx.x % static_cast<unsigned>(column_blocks)) * kColumns + lane;
  const bool there = col < p.features;
  const RowRange range = expert_rows(p.expert_offsets, e, static_cast<int>(p.num_rows));
  Acc sum = 0;
#pragma unroll 4
  for (int r = range.begin + slice; r < range.end; r += kSlices) {
    const auto* row = row_pointer<S>(p.rows, r);
    const Acc scale = row_factor<Acc>(p.scale, r);
    if (row != nullptr && there) sum = fma(scale, widen(row[col]), sum);
  }
  partial[slice][lane] = sum;
  __syncthreads();
  if (slice != 0 || !there) return;
#pragma unroll
  for (int i = 1; i < kSlices; ++i) sum += partial[i][lane];
  static_cast<Out*>(p.out)[int64_t{e} * p.features + col] = narrow<Out>(sum);
}

}  // namespace

Status grouped_sum(const GroupedSumParams& p, Stream stream) {
  const int64_t columns = ceil_div<int64_t>(p.features, kColumns);
  if (columns == 0) return cudaSuccess;
  if (p.num_experts * columns > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidValue;
  const auto grid = static_cast<unsigned>(p.num_experts * columns);
  return with_type(p.rows.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    if (p.out_type == p.rows.type) {
      grouped_sum_kernel<S, S>
          <<<grid, kColumns * kSlices, 0, stream>>>(p, static_cast<int>(columns));
    } else {
      grouped_sum_kernel<S, Accumulate<S>>
          <<<grid, kColumns * kSlices, 0, stream>>>(p, static_cast<int>(columns));
    }
    return launched();
  });
}

}  // namespace moe_ops::cuda
