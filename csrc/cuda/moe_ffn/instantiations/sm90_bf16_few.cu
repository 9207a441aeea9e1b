#include "cuda/moe_ffn/sm90_few.cuh"

namespace moe_ops::cuda::sm90 {

template Status run_few<DType::kBFloat16, 32>(const FewProduct&, Stream);
template Status run_few<DType::kBFloat16, 64>(const FewProduct&, Stream);

}  // namespace moe_ops::cuda::sm90
