#include "cuda/moe_ffn/sm90_down_bwd.cuh"

namespace moe_ops::cuda::sm90 {

Status down_bwd_high_bf16(const FfnDownBwdParams& p, Stream stream) {
  return launch_down_bwd<DownBwd<DownBwdHigh, cutlass::bfloat16_t>>(p, stream);
}

}  // namespace moe_ops::cuda::sm90
