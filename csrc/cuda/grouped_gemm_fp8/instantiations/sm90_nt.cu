#include "cuda/grouped_gemm_fp8/sm90_kernel.cuh"

namespace moe_ops::cuda::sm90::fp8 {

template Status run<TileShape::k64x128, false>(const GroupedGemmFp8Params&, Stream);
template Status run<TileShape::k128x256, false>(const GroupedGemmFp8Params&, Stream);
template Status run<TileShape::k2x128x256, false>(const GroupedGemmFp8Params&, Stream);
template Status run<TileShape::k64x128, true>(const GroupedGemmFp8Params&, Stream);
template Status run<TileShape::k128x256, true>(const GroupedGemmFp8Params&, Stream);
template Status run<TileShape::k2x128x256, true>(const GroupedGemmFp8Params&, Stream);

}  // namespace moe_ops::cuda::sm90::fp8
