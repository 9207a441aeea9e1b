// Rows: a warp makes kStretch blocks of 128 columns of a row into codes, four columns a lane, all
// loaded before the first is needed.
//
// Columns: a block takes a group of 128 rows by 64 columns. A warp loads 16 of the rows, a lane two
// columns of each; the largest magnitudes of the warps meet in shared memory, and so do the codes,
// four rows a word, from where a warp stores the 128 bytes of a column at once.
#include "cuda/dispatch.h"
#include "cuda/fp8.cuh"
#include "cuda/launch.h"
#include "cuda/row_experts.cuh"
#include "cuda/rows.cuh"
#include "moe_ops/quantize_fp8.h"

namespace moe_ops::cuda {

namespace {

constexpr int kStretch = 4;

template <class S, bool kAligned>
__global__ void quantize_fp8_kernel(const QuantizeFp8Params p) {
  const int64_t row = warp_row(), D = p.row_length, blocks = ceil_div(D, kFp8Block);
  if (row >= p.num_rows) return;
  const int64_t first = row_stretch() * kStretch;
  const S* const x = static_cast<const S*>(p.x.data) + row * p.x.stride;
  float v[kStretch][4];
#pragma unroll
  for (int i = 0; i < kStretch; ++i) {
    const int64_t c = (first + i) * kFp8Block + 4 * lane_id();
#pragma unroll
    for (int j = 0; j < 4; ++j) v[i][j] = 0;
    if constexpr (kAligned) {
      if (c < D) {
        const Wide<S, 4> wide = load_wide<4>(x + c);
#pragma unroll
        for (int j = 0; j < 4; ++j) v[i][j] = wide.v[j];
      }
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (c + j < D) v[i][j] = widen(x[c + j]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kStretch; ++i) {
    if (first + i >= blocks) return;
    const Fp8Lane lane = quantize_fp8_block(v[i]);
    store_codes<kAligned>(p.q + row * D, (first + i) * kFp8Block + 4 * lane_id(), D, lane.codes);
    if (lane_id() == 0) p.scale[row * blocks + first + i] = lane.scale;
  }
}

constexpr int kColumns = 64;
constexpr int kColumnWarps = 8;
constexpr int kWarpRows = static_cast<int>(kFp8Block) / kColumnWarps;
constexpr int kLine = static_cast<int>(kFp8Block) / 4 + 1;  // words; spreads columns over banks
static_assert(kColumns == 2 * kWarp && kWarpRows % 4 == 0 && kWarpRows <= kWarp);

// Returns the rows of group g: those of the last expert whose first group is not after it.
__device__ RowRange rows_of_group(const int32_t* offsets, int num_experts, int num_rows,
                                  int64_t g) {
  int low = 0, high = num_experts - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (fp8_first_group(expert_rows(offsets, middle, num_rows).begin, middle) <= g) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const RowRange rows = expert_rows(offsets, low, num_rows);
  const int64_t begin = rows.begin + (g - fp8_first_group(rows.begin, low)) * kFp8Block;
  if (begin < rows.begin || begin >= rows.end) return {0, 0};
  return {static_cast<int>(begin), static_cast<int>(min(int64_t{rows.end}, begin + kFp8Block))};
}

template <class S, bool kAligned>
__global__ void __launch_bounds__(kColumnWarps* kWarp)
    quantize_fp8_columns_kernel(const QuantizeFp8ColumnsParams p) {
  __shared__ uint32_t most[kColumnWarps][kColumns];
  __shared__ float inverse[kColumns];
  __shared__ uint32_t words[kColumns * kLine];
  const int64_t D = p.row_length, g = blockIdx.x, G = gridDim.x;
  const int lane = lane_id(), warp = static_cast<int>(threadIdx.x) / kWarp;
  const RowRange rows = rows_of_group(p.expert_offsets, static_cast<int>(p.num_experts),
                                      static_cast<int>(p.num_rows), g);
  // Lane i of a warp looks up its row i.
  const int row = rows.begin + warp * kWarpRows + lane;
  int64_t own_source = -1;
  float own_factor = 1.0f;
  if (lane < kWarpRows && row < rows.end) {
    own_source = row;
    if (p.row_to_slot != nullptr) {
      const int slot = p.row_to_slot[row];
      own_source = slot < 0 ? -1 : slot / static_cast<int>(p.top_k);
      if (own_source >= p.num_source_rows) own_source = -1;
      if (own_source >= 0 && p.topk_weights != nullptr) own_factor = p.topk_weights[slot];
    }
  }
  const int count = min(max(rows.end - rows.begin - warp * kWarpRows, 0), kWarpRows);

  for (int64_t d = int64_t{blockIdx.y} * kColumns; d < D; d += int64_t{gridDim.y} * kColumns) {
    const int64_t c = d + 2 * lane;
    float v[kWarpRows][2];
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
      const int64_t source = __shfl_sync(kAllLanes, own_source, i);
      v[i][0] = v[i][1] = 0.0f;
      if (source < 0) continue;
      const S* const x = static_cast<const S*>(p.x.data) + source * p.x.stride + c;
      if constexpr (kAligned) {
        if (c < D) {
          const Wide<S, 2> wide = load_wide<2>(x);
          v[i][0] = wide.v[0];
          v[i][1] = wide.v[1];
        }
      } else {
        if (c < D) v[i][0] = widen(x[0]);
        if (c + 1 < D) v[i][1] = widen(x[1]);
      }
    }
    uint32_t largest[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
      const float factor = __shfl_sync(kAllLanes, own_factor, i);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        v[i][h] = __fmul_rn(v[i][h], factor);
        largest[h] = max(largest[h], __float_as_uint(v[i][h]) & 0x7fffffffu);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) most[warp][2 * lane + h] = largest[h];
    __syncthreads();
    if (threadIdx.x < kColumns) {
      uint32_t all = 0;
#pragma unroll
      for (int w = 0; w < kColumnWarps; ++w) all = max(all, most[w][threadIdx.x]);
      const Fp8Scale s = fp8_scale(all);
      inverse[threadIdx.x] = s.inverse;
      if (d + threadIdx.x < D) p.scale[g * D + d + threadIdx.x] = s.scale;
    }
    __syncthreads();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Fp8Scale s{inverse[2 * lane + h], 0.0f};
#pragma unroll
      for (int i = 0; i < kWarpRows; i += 4) {
        uint32_t word = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (i + j < count) word |= fp8_code(v[i + j][h], s) << (8 * j);
        }
        words[(2 * lane + h) * kLine + (warp * kWarpRows + i) / 4] = word;
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kColumns / kColumnWarps; ++i) {
      const int column = warp * (kColumns / kColumnWarps) + i;
      if (d + column < D) {
        auto* const q = reinterpret_cast<uint32_t*>(p.q + ((d + column) * G + g) * kFp8Block);
        q[lane] = words[column * kLine + lane];
      }
    }
  }
}

}  // namespace

Status quantize_fp8_columns(const QuantizeFp8ColumnsParams& p, Stream stream) {
  const int64_t groups = fp8_groups(p.num_rows, p.num_experts);
  if (groups == 0 || p.row_length == 0) return 0;
  const int64_t tiles = ceil_div<int64_t>(p.row_length, kColumns);
  return with_type(p.x.type, [&](auto tag) -> Status {
    using S = typename decltype(tag)::type;
    if constexpr (sizeof(S) == 8) {
      return cudaErrorInvalidValue;
    } else {
      const bool aligned =
          p.row_length % 2 == 0 && rows_aligned(p.x.data, p.x.stride * sizeof(S), 2 * sizeof(S));
      const Launch at{dim3(static_cast<unsigned>(groups),
                           static_cast<unsigned>(std::min(tiles, kMostStretches))),
                      kColumnWarps * kWarp, stream};
      return aligned ? launch_kernel<quantize_fp8_columns_kernel<S, true>>(at, p)
                     : launch_kernel<quantize_fp8_columns_kernel<S, false>>(at, p);
    }
  });
}

Status quantize_fp8(const QuantizeFp8Params& p, Stream stream) {
  if (p.num_rows == 0 || p.row_length == 0) return 0;
  const RowGrid g = row_grid(p.num_rows, ceil_div(p.row_length, kFp8Block) * kWarp, kStretch);
  return with_type(p.x.type, [&](auto tag) -> Status {
    using S = typename decltype(tag)::type;
    if constexpr (sizeof(S) == 8) {
      return cudaErrorInvalidValue;
    } else {
      const bool aligned = p.row_length % 4 == 0 && rows_aligned(p.q, 0, 4) &&
                           rows_aligned(p.x.data, p.x.stride * sizeof(S), 4 * sizeof(S));
      const Launch at{g.grid, g.block, stream};
      return aligned ? launch_kernel<quantize_fp8_kernel<S, true>>(at, p)
                     : launch_kernel<quantize_fp8_kernel<S, false>>(at, p);
    }
  });
}

}  // namespace moe_ops::cuda
