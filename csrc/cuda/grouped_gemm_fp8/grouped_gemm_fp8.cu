// Which kernel serves a product.
#include <limits>

#include "cuda/check.h"
#include "cuda/grouped_gemm_fp8/generic.h"
#include "cuda/grouped_gemm_fp8/sm90.h"
#include "cuda/grouped_gemm_fp8/wgrad.h"

namespace moe_ops::cuda {

namespace {

// Returns whether n fits the kernels, which count rows and features in 32 bits, up to a tile past
// the last one.
bool countable(int64_t n) { return n <= std::numeric_limits<int32_t>::max() - 1024; }

}  // namespace

Status grouped_gemm_fp8(const GroupedGemmFp8Params& p, Stream stream) {
  if (p.num_rows == 0 || p.out_features == 0) return cudaSuccess;
  if (!countable(p.num_rows) || !countable(p.out_features) || !countable(p.in_features) ||
      !countable(p.num_experts)) {
    return cudaErrorInvalidValue;
  }
  return sm90::fp8::supports(p) ? sm90::fp8::grouped_gemm_fp8(p, stream)
                                : generic::grouped_gemm_fp8(p, stream);
}

Status grouped_gemm_fp8_wgrad(const GroupedGemmFp8WgradParams& p, Stream stream) {
  if (p.out_features == 0 || p.in_features == 0) return cudaSuccess;
  if (!countable(p.num_groups * kFp8Block) || !countable(p.out_features) ||
      !countable(p.in_features) || !countable(p.num_experts)) {
    return cudaErrorInvalidValue;
  }
  return sm90::fp8::supports(p) ? sm90::fp8::grouped_gemm_fp8_wgrad(p, stream)
                                : generic::grouped_gemm_fp8_wgrad(p, stream);
}

}  // namespace moe_ops::cuda
