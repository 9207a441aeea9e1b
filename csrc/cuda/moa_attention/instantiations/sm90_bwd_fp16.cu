#include "cuda/moa_attention/sm90_backward.cuh"

namespace moe_ops::cuda::attention::sm90 {

Status softmax_bwd_fp16(const BackwardLaunch& launch, const Chain& chain, Stream stream) {
  return run_band<DType::kFloat16, AttentionKind::kSoftmax>(launch, chain, stream);
}

Status stick_bwd_fp16(const BackwardLaunch& launch, const Chain& chain, Stream stream) {
  return run_band<DType::kFloat16, AttentionKind::kStickBreaking>(launch, chain, stream);
}

}  // namespace moe_ops::cuda::attention::sm90
