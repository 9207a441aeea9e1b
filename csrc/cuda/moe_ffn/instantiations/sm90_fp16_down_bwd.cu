#include "cuda/moe_ffn/sm90_down_bwd.cuh"

namespace moe_ops::cuda::sm90 {

template Status run_down_bwd<DType::kFloat16, FfnTile::kLow>(const FfnDownBwdParams&, Stream);
template Status run_down_bwd<DType::kFloat16, FfnTile::kHigh>(const FfnDownBwdParams&, Stream);

}  // namespace moe_ops::cuda::sm90
