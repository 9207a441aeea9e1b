#include "cuda/moa_attention/backward_launch.cuh"
#include "cuda/moa_attention/generic.h"

namespace moe_ops::cuda::attention {

Status softmax_bwd_bf16(const MoaAttentionBwdParams& b, Stream stream) {
  return generic_backward<bf16, AttentionKind::kSoftmax>(b, stream);
}

Status delta_bf16(const BackwardLaunch& launch, Stream stream) {
  return launch_delta<bf16>(launch, stream);
}

}  // namespace moe_ops::cuda::attention
