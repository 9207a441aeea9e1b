#include "cuda/moa_attention/forward_kernel.cuh"
#include "cuda/moa_attention/generic.h"

namespace moe_ops::cuda::attention {

Status forward_bf16(const MoaAttentionParams& p, Stream stream) {
  return generic_forward<bf16>(p, stream);
}

}  // namespace moe_ops::cuda::attention
