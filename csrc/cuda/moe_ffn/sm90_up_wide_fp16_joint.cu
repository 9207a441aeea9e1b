#include "cuda/moe_ffn/sm90_up.cuh"

namespace moe_ops::cuda::sm90 {

Status up_wide_fp16_joint(const FfnUpParams& p, Stream stream) {
  return launch_up<Up<UpWide, cutlass::half_t, false>>(p, stream);
}

}  // namespace moe_ops::cuda::sm90
