#include "cuda/moe_ffn/sm90_up.cuh"

namespace moe_ops::cuda::sm90 {

Status up_low_fp16_split(const FfnUpParams& p, Stream stream) {
  return launch_up<Up<UpLow, cutlass::half_t, true>>(p, stream);
}

}  // namespace moe_ops::cuda::sm90
