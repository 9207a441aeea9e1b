#include "cuda/moe_ffn/sm90_up.cuh"

namespace moe_ops::cuda::sm90 {

Status up_low_bf16_joint(const FfnUpParams& p, Stream stream) {
  return launch_up<Up<UpLow, cutlass::bfloat16_t, false>>(p, stream);
}

}  // namespace moe_ops::cuda::sm90
