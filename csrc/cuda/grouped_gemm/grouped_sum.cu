// out[e] = sum over the rows r of e of scale(r) * rows[r].
//
// A block sums a stretch of columns of one expert, one access of up to 16 bytes a lane: each of its
// 8 warps every eighth row, then the 8 partial sums in order. Lanes look up the places and factors
// of 32 rows at a time and hand them around. Nothing depends on the grid, so neither do the bits.
#include <limits>

#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/reduce.cuh"
#include "cuda/row_experts.cuh"
#include "cuda/vec.cuh"

namespace moe_ops::cuda {

namespace {

constexpr int kSlices = 8;      // warps
constexpr int kRowsAtOnce = 4;  // loads under way together; divides kWarp
// Blocks per SM that 64 registers per thread allow. By default, ptxas takes 40 on sm_80 and spills
// a pair; with 5 blocks, it spills on sm_90.
constexpr int kBlocksPerSm = 4;

// V: elements an access.
template <class S, class Out, int V>
__global__ void __launch_bounds__(kWarp* kSlices, kBlocksPerSm)
    grouped_sum_kernel(const __grid_constant__ GroupedSumParams p, int column_blocks) {
  using Acc = Accumulate<S>;
  __shared__ Acc partial[kSlices][kWarp * V];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int slice = static_cast<int>(threadIdx.x) / kWarp;
  const int e = static_cast<int>(blockIdx.x / static_cast<unsigned>(column_blocks));
  const int64_t col =
      static_cast<int64_t>(blockIdx.x % static_cast<unsigned>(column_blocks)) * (kWarp * V) +
      lane * V;
  const bool there = col < p.features;
  const RowRange range = expert_rows(p.expert_offsets, e, static_cast<int>(p.num_rows));

  Wide<S, V> sum = {};
  for (int first = range.begin + slice; first < range.end; first += kSlices * kWarp) {
    const int mine = first + kSlices * lane;
    int row = -1;
    Acc factor = 0;
    if (mine < range.end) {
      row = source_row(p.rows, mine);
      factor = row_factor<Acc>(p.scale, mine);
    }
    const int count = min((range.end - first + kSlices - 1) / kSlices, kWarp);
    for (int j = 0; j < count; j += kRowsAtOnce) {
      Wide<S, V> x[kRowsAtOnce] = {};
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        const int source = __shfl_sync(kAllLanes, row, j + i);
        if (source >= 0 && there) {
          x[i] = load_wide<V>(static_cast<const S*>(p.rows.data) + source * p.rows.stride + col);
        }
      }
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        const Acc scale = __shfl_sync(kAllLanes, factor, j + i);
        const bool counts = __shfl_sync(kAllLanes, row, j + i) >= 0;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          if (counts) sum.v[v] = fma(scale, x[i].v[v], sum.v[v]);
        }
      }
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) partial[slice][v * kWarp + lane] = sum.v[v];
  __syncthreads();
  if (slice != 0 || !there) return;
#pragma unroll
  for (int v = 0; v < V; ++v) {
#pragma unroll
    for (int i = 1; i < kSlices; ++i) sum.v[v] += partial[i][v * kWarp + lane];
  }
  Wide<Out, V> rounded;
#pragma unroll
  for (int v = 0; v < V; ++v) rounded.v[v] = sum.v[v];
  store_wide<V>(static_cast<Out*>(p.out) + int64_t{e} * p.features + col, rounded);
}

template <class S, class Out, int V>
Status launch(const GroupedSumParams& p, Stream stream) {
  const int64_t columns = ceil_div<int64_t>(p.features, kWarp * V);
  if (p.num_experts * columns > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidValue;
  const auto grid = static_cast<unsigned>(p.num_experts * columns);
  return launch_kernel<grouped_sum_kernel<S, Out, V>>({grid, kWarp * kSlices, stream}, p,
                                                      static_cast<int>(columns));
}

template <class S, class Out>
Status launch(const GroupedSumParams& p, Stream stream) {
  // An access of the wider of the two types has 16 bytes.
  constexpr int V = sizeof(Out) > sizeof(S) ? kVector<Out> : kVector<S>;
  const bool aligned =
      p.features % V == 0 &&
      rows_aligned(p.rows.data, p.rows.stride * int64_t{sizeof(S)}, V * sizeof(S)) &&
      rows_aligned(p.out, p.features * int64_t{sizeof(Out)}, V * sizeof(Out));
  return aligned ? launch<S, Out, V>(p, stream) : launch<S, Out, 1>(p, stream);
}

}  // namespace

Status grouped_sum(const GroupedSumParams& p, Stream stream) {
  if (p.num_experts * p.features == 0) return cudaSuccess;
  return with_type(p.rows.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    return p.out_type == p.rows.type ? launch<S, S>(p, stream)
                                     : launch<S, Accumulate<S>>(p, stream);
  });
}

}  // namespace moe_ops::cuda
