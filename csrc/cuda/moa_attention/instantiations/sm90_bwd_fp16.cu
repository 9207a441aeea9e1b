#include "cuda/moa_attention/sm90_backward.cuh"

namespace moe_ops::cuda::attention::sm90 {

Status softmax_bwd_fp16(const BackwardLaunch& launch, Stream stream) {
  return run_band<DType::kFloat16, AttentionKind::kSoftmax>(launch, stream);
}

Status stick_bwd_fp16(const BackwardLaunch& launch, Stream stream) {
  return run_band<DType::kFloat16, AttentionKind::kStickBreaking>(launch, stream);
}

}  // namespace moe_ops::cuda::attention::sm90
