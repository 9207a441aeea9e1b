#include "cuda/moe_ffn/sm90_up.cuh"

namespace moe_ops::cuda::sm90 {

Status up_pair_fp16_joint(const FfnUpParams& p, Stream stream) {
  return launch_up<Up<UpPair, cutlass::half_t, false>>(p, stream);
}

}  // namespace moe_ops::cuda::sm90
