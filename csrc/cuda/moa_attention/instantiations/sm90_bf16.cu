#include "cuda/moa_attention/sm90_forward.cuh"

namespace moe_ops::cuda::attention::sm90 {

Status softmax_bf16(const MoaAttentionParams& p, Stream stream) {
  return run<DType::kBFloat16, AttentionKind::kSoftmax>(p, stream);
}

Status stick_bf16(const MoaAttentionParams& p, Stream stream) {
  return run<DType::kBFloat16, AttentionKind::kStickBreaking>(p, stream);
}

}  // namespace moe_ops::cuda::attention::sm90
