// A warp makes kStretch blocks of 128 columns of a row into codes, four columns a lane, all loaded
// before the first is needed.
#include "cuda/dispatch.h"
#include "cuda/fp8.cuh"
#include "cuda/launch.h"
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

}  // namespace

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
