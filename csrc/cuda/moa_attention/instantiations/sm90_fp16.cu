#include "cuda/moa_attention/sm90_forward.cuh"

namespace moe_ops::cuda::attention::sm90 {

Status softmax_fp16(const MoaAttentionParams& p, Stream stream) {
  return run<DType::kFloat16, AttentionKind::kSoftmax>(p, stream);
}

Status stick_fp16(const MoaAttentionParams& p, Stream stream) {
  return run<DType::kFloat16, AttentionKind::kStickBreaking>(p, stream);
}

}  // namespace moe_ops::cuda::attention::sm90
