#include "cuda/grouped_gemm/sm90_launch.cuh"

namespace moe_ops::cuda::sm90 {

template Status run_wgrad<DType::kBFloat16, Product::kTNGather, TileShape::k128x128>(
    const GroupedWgradParams&, Stream);

}  // namespace moe_ops::cuda::sm90
