// Which kernel serves a product.
#include <limits>

#include "cuda/check.h"
#include "cuda/grouped_gemm/generic.h"
#include "cuda/grouped_gemm/sm90.h"
#include "moe_ops/grouped_gemm.h"

namespace moe_ops::cuda {

namespace {

// Returns whether n fits the kernels, which count rows and features in 32 bits, up to a tile past
// the last one.
bool countable(int64_t n) { return n <= std::numeric_limits<int32_t>::max() - 1024; }

}  // namespace

Status grouped_gemm(const GroupedGemmParams& p, Stream stream) {
  if (p.num_rows == 0 || p.out_features == 0) return cudaSuccess;
  if (!countable(p.num_rows) || !countable(p.out_features) || !countable(p.in_features) ||
      !countable(p.num_experts)) {
    return cudaErrorInvalidValue;
  }
  if (sm90::supports(p)) return sm90::grouped_gemm(p, stream);
  switch (p.b.type) {
    case DType::kBFloat16:
      return generic::grouped_gemm_bf16(p, stream);
    case DType::kFloat16:
      return generic::grouped_gemm_fp16(p, stream);
    case DType::kFloat32:
      return generic::grouped_gemm_fp32(p, stream);
    case DType::kFloat64:
      return generic::grouped_gemm_fp64(p, stream);
  }
  return cudaErrorInvalidValue;
}

Status grouped_gemm_wgrad(const GroupedWgradParams& p, Stream stream) {
  if (p.out_features == 0 || p.in_features == 0) return cudaSuccess;
  if (!countable(p.num_rows) || !countable(p.out_features) || !countable(p.in_features) ||
      !countable(p.num_experts)) {
    return cudaErrorInvalidValue;
  }
  if (sm90::supports(p)) return sm90::grouped_gemm_wgrad(p, stream);
  switch (p.a.type) {
    case DType::kBFloat16:
      return generic::grouped_wgrad_bf16(p, stream);
    case DType::kFloat16:
      return generic::grouped_wgrad_fp16(p, stream);
    case DType::kFloat32:
      return generic::grouped_wgrad_fp32(p, stream);
    case DType::kFloat64:
      return generic::grouped_wgrad_fp64(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace moe_ops::cuda
