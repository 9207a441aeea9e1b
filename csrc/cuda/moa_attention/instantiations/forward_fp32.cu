#include "cuda/moa_attention/forward_kernel.cuh"
#include "cuda/moa_attention/generic.h"

namespace moe_ops::cuda::attention {

Status forward_fp32(const MoaAttentionParams& p, Stream stream) {
  return generic_forward<float>(p, stream);
}

}  // namespace moe_ops::cuda::attention
