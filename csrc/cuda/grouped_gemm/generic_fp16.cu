#include "cuda/grouped_gemm/generic_half.cuh"

namespace moe_ops::cuda::generic {

Status grouped_gemm_fp16(const GroupedGemmParams& p, Stream stream) {
  return p.b.stride_k == 1 ? gemm_half<fp16, true>(p, stream) : gemm_half<fp16, false>(p, stream);
}

Status grouped_wgrad_fp16(const GroupedWgradParams& p, Stream stream) {
  return wgrad_half<fp16>(p, stream);
}

}  // namespace moe_ops::cuda::generic
