#include "cuda/grouped_gemm/sm90_launch.cuh"
#include "cuda/grouped_gemm/sm90_scaled_wgrad.cuh"

namespace moe_ops::cuda::sm90 {

template Status run_wgrad<DType::kBFloat16, Product::kTN, TileShape::k128x128>(
    const GroupedWgradParams&, Stream);
template Status run_wgrad<DType::kBFloat16, Product::kTN, TileShape::k128x256>(
    const GroupedWgradParams&, Stream);
template Status run_wgrad<DType::kBFloat16, Product::kTNGather, TileShape::k128x128>(
    const GroupedWgradParams&, Stream);
template Status run_wgrad<DType::kBFloat16, Product::kTNGather, TileShape::k128x256>(
    const GroupedWgradParams&, Stream);
template Status run_wgrad<DType::kBFloat16, Product::kGatherTN, TileShape::k128x128>(
    const GroupedWgradParams&, Stream);
template Status run_wgrad<DType::kBFloat16, Product::kGatherTN, TileShape::k128x256>(
    const GroupedWgradParams&, Stream);
template Status run_wgrad<DType::kBFloat16, Product::kGatherTNGather, TileShape::k128x128>(
    const GroupedWgradParams&, Stream);
template Status run_scaled_wgrad<DType::kBFloat16>(const GroupedWgradParams&, Stream);

}  // namespace moe_ops::cuda::sm90
