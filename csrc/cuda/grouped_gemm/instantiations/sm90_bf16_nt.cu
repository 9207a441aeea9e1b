#include "cuda/grouped_gemm/sm90_launch.cuh"

namespace moe_ops::cuda::sm90 {

template Status run<DType::kBFloat16, Product::kNT, TileShape::k128x128>(const GroupedGemmParams&,
                                                                         Stream);
template Status run<DType::kBFloat16, Product::kNT, TileShape::k128x256>(const GroupedGemmParams&,
                                                                         Stream);
template Status run<DType::kBFloat16, Product::kNT, TileShape::k64x128>(const GroupedGemmParams&,
                                                                        Stream);
template Status run<DType::kBFloat16, Product::kNT, TileShape::k64x64>(const GroupedGemmParams&,
                                                                       Stream);
template Status run<DType::kBFloat16, Product::kGatherNT, TileShape::k128x128>(
    const GroupedGemmParams&, Stream);
template Status run<DType::kBFloat16, Product::kGatherNT, TileShape::k64x128>(
    const GroupedGemmParams&, Stream);
template Status run<DType::kBFloat16, Product::kGatherNT, TileShape::k64x64>(
    const GroupedGemmParams&, Stream);

}  // namespace moe_ops::cuda::sm90
