// float64, fused multiply-adds; for tests and for those who need it, not for speed.
#include "cuda/grouped_gemm/generic.h"
#include "cuda/grouped_gemm/wgrad_kernel.cuh"

namespace moe_ops::cuda::generic {

template <bool kAKMajor, bool kBKMajor>
using Config = TileConfig<double, 64, 64, 16, 2, 2, 3, kAKMajor, kBKMajor>;

Status grouped_gemm_fp64(const GroupedGemmParams& p, Stream stream) {
  return p.b.stride_k == 1 ? launch_grouped_gemm<Config<true, true>, 2>(p, stream)
                           : launch_grouped_gemm<Config<true, false>, 2>(p, stream);
}

Status grouped_wgrad_fp64(const GroupedWgradParams& p, Stream stream) {
  return launch_grouped_wgrad<Config<false, false>, 2>(p, stream);
}

}  // namespace moe_ops::cuda::generic
