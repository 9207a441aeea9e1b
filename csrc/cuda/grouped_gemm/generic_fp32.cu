// float32 on the tf32 tensor cores, three products each (mma.cuh); 32 x 32 sums a warp, twice.
#include "cuda/grouped_gemm/generic.h"
#include "cuda/grouped_gemm/wgrad_kernel.cuh"

namespace moe_ops::cuda::generic {

template <bool kAKMajor, bool kBKMajor>
using Config = TileConfig<float, 64, 64, 32, 2, 2, 3, kAKMajor, kBKMajor>;

Status grouped_gemm_fp32(const GroupedGemmParams& p, Stream stream) {
  return p.b.stride_k == 1 ? launch_grouped_gemm<Config<true, true>, 2>(p, stream)
                           : launch_grouped_gemm<Config<true, false>, 2>(p, stream);
}

Status grouped_wgrad_fp32(const GroupedWgradParams& p, Stream stream) {
  return launch_grouped_wgrad<Config<false, false>, 2>(p, stream);
}

}  // namespace moe_ops::cuda::generic
