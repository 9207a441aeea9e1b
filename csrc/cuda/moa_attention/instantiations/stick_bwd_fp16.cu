#include "cuda/moa_attention/backward_launch.cuh"
#include "cuda/moa_attention/generic.h"

namespace moe_ops::cuda::attention {

Status stick_bwd_fp16(const MoaAttentionBwdParams& b, Stream stream) {
  return generic_backward<fp16, AttentionKind::kStickBreaking>(b, stream);
}

}  // namespace moe_ops::cuda::attention
