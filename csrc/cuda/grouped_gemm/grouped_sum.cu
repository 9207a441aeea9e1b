// out[e] = sum over the rows r of e of scale(r) * rows[r].
//
// A block sums 32 columns of one expert: each of its 8 warps every eighth row, then the 8 partial
// sums in order. Neither depends on the grid, so neither do the bits.
#include "cuda/check.h"
#include "cuda/grouped_gemm/mma.cuh"

namespace moe_ops::cuda {

namespace {

using namespace generic;

constexpr int kColumns = 32, kSlices = 8;

template <class Element, class OutElement>
__global__ void __launch_bounds__(kColumns* kSlices)
    grouped_sum_kernel(const __grid_constant__ GroupedSumParams p, int column_blocks) {
  using Acc = typename Element::Acc;
  __shared__ Acc partial[kSlices][kColumns];
  const int lane = static_cast<int>(threadIdx.x) % kColumns;
  const int slice = static_cast<int>(threadIdx.x) / kColumns;
  const int e = static_cast<int>(blockIdx.x / static_cast<unsigned>(column_blocks));
  const int col = static_cast<int>(blockIdx.x % static_cast<unsigned>(column_blocks)) * kColumns + lane;
  const bool there = col < p.features;
  const RowRange range = expert_rows(p.expert_offsets, e, static_cast<int>(p.num_rows));
  Acc sum = 0;
#pragma unroll 4
  for (int r = range.begin + slice; r < range.end; r += kSlices) {
    const auto* row = row_pointer<typename Element::Bits>(p.rows, r);
    const Acc scale = row_factor<Acc>(p.scale, r);
    if (row != nullptr && there) sum = fma(scale, Element::widen(row[col]), sum);
  }
  partial[slice][lane] = sum;
  __syncthreads();
  if (slice != 0 || !there) return;
#pragma unroll
  for (int i = 1; i < kSlices; ++i) sum += partial[i][lane];
  static_cast<typename OutElement::Bits*>(p.out)[int64_t{e} * p.features + col] =
      OutElement::narrow(sum);
}

template <class Element>
Status run(const GroupedSumParams& p, Stream stream) {
  const int64_t column_blocks = ceil_div<int64_t>(p.features, kColumns);
  const auto grid = static_cast<unsigned>(p.num_experts * column_blocks);
  const int columns = static_cast<int>(column_blocks);
  using Wide = std::conditional_t<std::is_same_v<Element, Float64>, Float64, Float32>;
  if (p.out_type == Element::kType) {
    grouped_sum_kernel<Element, Element><<<grid, kColumns * kSlices, 0, stream>>>(p, columns);
  } else {
    grouped_sum_kernel<Element, Wide><<<grid, kColumns * kSlices, 0, stream>>>(p, columns);
  }
  return launched();
}

}  // namespace

Status grouped_sum(const GroupedSumParams& p, Stream stream) {
  if (p.features == 0) return cudaSuccess;
  if (p.num_experts * ceil_div<int64_t>(p.features, kColumns) >= int64_t{1} << 31) {
    return cudaErrorInvalidValue;
  }
  switch (p.rows.type) {
    case DType::kBFloat16:
      return run<BFloat16>(p, stream);
    case DType::kFloat16:
      return run<Float16>(p, stream);
    case DType::kFloat32:
      return run<Float32>(p, stream);
    case DType::kFloat64:
      return run<Float64>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace moe_ops::cuda
