#include "cuda/moa_attention/backward_launch.cuh"
#include "cuda/moa_attention/generic.h"

namespace moe_ops::cuda::attention {

Status softmax_bwd_bf16(const MoaAttentionBwdParams& b, Stream stream) {
  return generic_backward<bf16, AttentionKind::kSoftmax>(b, stream);
}

Status delta_bf16(const BackwardLaunch& launch, Stream stream) {
  return launch_delta<bf16>(launch, stream);
}

Status stick_bwd_bf16(const MoaAttentionBwdParams& b, Stream stream) {
  return generic_backward<bf16, AttentionKind::kStickBreaking>(b, stream);
}

Status sticks_bf16(const BackwardLaunch& launch, int64_t blocks, Stream stream) {
  return launch_sticks<bf16, 64>(launch, blocks, stream);
}

}  // namespace moe_ops::cuda::attention
