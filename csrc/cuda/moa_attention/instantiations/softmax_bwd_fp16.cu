#include "cuda/moa_attention/backward_launch.cuh"
#include "cuda/moa_attention/generic.h"

namespace moe_ops::cuda::attention {

Status softmax_bwd_fp16(const MoaAttentionBwdParams& b, Stream stream) {
  return generic_backward<fp16, AttentionKind::kSoftmax>(b, stream);
}

Status delta_fp16(const BackwardLaunch& launch, Stream stream) {
  return launch_delta<fp16>(launch, stream);
}

}  // namespace moe_ops::cuda::attention
