#include "cuda/moe_ffn/sm90_up.cuh"

namespace moe_ops::cuda::sm90 {

Status up_wide_bf16_split(const FfnUpParams& p, Stream stream) {
  return launch_up<Up<UpWide, cutlass::bfloat16_t, true>>(p, stream);
}

}  // namespace moe_ops::cuda::sm90
