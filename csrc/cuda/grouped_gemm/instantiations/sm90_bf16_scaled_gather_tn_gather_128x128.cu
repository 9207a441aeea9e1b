#include "cuda/grouped_gemm/sm90_scaled_wgrad.cuh"

namespace moe_ops::cuda::sm90 {

template Status run_scaled_wgrad<DType::kBFloat16>(const GroupedWgradParams&, Stream);

}  // namespace moe_ops::cuda::sm90
