#include "cuda/moa_attention/backward_launch.cuh"
#include "cuda/moa_attention/generic.h"

namespace moe_ops::cuda::attention {

Status softmax_bwd_fp16(const MoaAttentionBwdParams& b, Stream stream) {
  return generic_backward<fp16, AttentionKind::kSoftmax>(b, stream);
}

Status delta_fp16(const BackwardLaunch& launch, Stream stream) {
  return launch_delta<fp16>(launch, stream);
}

Status stick_bwd_fp16(const MoaAttentionBwdParams& b, Stream stream) {
  return generic_backward<fp16, AttentionKind::kStickBreaking>(b, stream);
}

Status sticks_fp16(const BackwardLaunch& launch, int64_t blocks, Stream stream) {
  return launch_sticks<fp16, 64>(launch, blocks, stream);
}

}  // namespace moe_ops::cuda::attention
