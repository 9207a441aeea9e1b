// Tiles of the 16-bit kernels. Large: 8 warps, 64 x 64 sums a warp (128 registers), 4 stages of
// 24 KiB, which is what a block has on sm_86, sm_89 and sm_120 too. Small, for few rows an expert:
// 4 warps, 32 x 32 sums a warp, 3 stages of 16 KiB, 64 columns of k a step, any alignment.
#pragma once

#include "cuda/grouped_gemm/generic.h"
#include "cuda/grouped_gemm/wgrad_kernel.cuh"

namespace moe_ops::cuda::generic {

template <class S, bool kAKMajor, bool kBKMajor>
using LargeTile = TileConfig<S, 128, 256, 32, 2, 4, 4, kAKMajor, kBKMajor, true>;
template <class S, bool kAKMajor, bool kBKMajor>
using SmallTile = TileConfig<S, 64, 64, 64, 2, 2, 3, kAKMajor, kBKMajor>;

template <class S, bool kBKMajor>
Status gemm_half(const GroupedGemmParams& p, Stream stream) {
  return p.num_rows / p.num_experts >= 64 && p.out_features > 128 && rows_aligned(p.a) &&
                 matrices_aligned(p.b)
             ? launch_grouped_gemm<LargeTile<S, true, kBKMajor>, 1>(p, stream)
             : launch_grouped_gemm<SmallTile<S, true, kBKMajor>, 3>(p, stream);
}

template <class S>
Status wgrad_half(const GroupedWgradParams& p, Stream stream) {
  return p.out_features > 64 && p.in_features > 128 && rows_aligned(p.grad) && rows_aligned(p.a)
             ? launch_grouped_wgrad<LargeTile<S, false, false>, 1>(p, stream)
             : launch_grouped_wgrad<SmallTile<S, false, false>, 3>(p, stream);
}

}  // namespace moe_ops::cuda::generic
