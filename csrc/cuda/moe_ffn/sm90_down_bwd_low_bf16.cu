#include "cuda/moe_ffn/sm90_down_bwd.cuh"

namespace moe_ops::cuda::sm90 {

Status down_bwd_low_bf16(const FfnDownBwdParams& p, Stream stream) {
  return launch_down_bwd<DownBwd<DownBwdLow, cutlass::bfloat16_t>>(p, stream);
}

}  // namespace moe_ops::cuda::sm90
