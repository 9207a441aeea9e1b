#include "cuda/moa_attention/backward_launch.cuh"
#include "cuda/moa_attention/generic.h"

namespace moe_ops::cuda::attention {

Status softmax_bwd_fp64(const MoaAttentionBwdParams& b, Stream stream) {
  return generic_backward<double, AttentionKind::kSoftmax>(b, stream);
}

Status stick_bwd_fp64(const MoaAttentionBwdParams& b, Stream stream) {
  return generic_backward<double, AttentionKind::kStickBreaking>(b, stream);
}

}  // namespace moe_ops::cuda::attention
