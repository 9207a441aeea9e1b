// Which of the sm_90a kernels serves a call.
#include <cuda_runtime_api.h>

#include <cstdlib>

#include "cuda/grouped_gemm/choose.h"
#include "cuda/grouped_gemm/sm90.h"
#include "cuda/grouped_gemm/sm90_operands.h"
#include "cuda/grouped_gemm/sm90_scaled_wgrad.h"
#include "cuda/runtime.h"
#include "moe_ops/batch_invariant.h"

namespace moe_ops::cuda::sm90 {

namespace {

bool half_type(DType t) { return t == DType::kBFloat16 || t == DType::kFloat16; }

// Returns MOE_OPS_GEMM_TILE: 128x256, 128x128, 64x128 or 64x64 selects that tile if the product has
// it, generic disables these kernels. For tests and benchmarks.
std::string_view forced_tile() {
  const char* s = std::getenv("MOE_OPS_GEMM_TILE");
  return s != nullptr ? s : "";
}

TileShape shape_of(const GemmDesc& d) {
  const std::string_view forced = forced_tile();
  for (const GemmConfig& c : kGemmConfigs)
    if (name(c.shape) == forced && has_kernel(d.product, c.shape)) return c.shape;
  return choose_config(d).shape;
}

bool usable() { return device_info().capability == 90 && forced_tile() != "generic"; }

// Returns whether results can be stored: 16 bytes at a time, fp32 rows 8.
bool storable(const void* data, DType type, int64_t stride) {
  return type == DType::kFloat32 ? aligned_to(data, 8) && stride % 2 == 0
                                 : aligned_to(data, 16) && stride % 8 == 0;
}

Product product_of(const GroupedGemmParams& p) {
  const bool nt = p.b.stride_k == 1;
  if (p.a.index != nullptr) return nt ? Product::kGatherNT : Product::kGatherNN;
  return nt ? Product::kNT : Product::kNN;
}

Product product_of(const GroupedWgradParams& p) {
  if (p.grad.index != nullptr)
    return p.a.index != nullptr ? Product::kGatherTNGather : Product::kGatherTN;
  return p.a.index != nullptr ? Product::kTNGather : Product::kTN;
}

bool scaled(const GroupedWgradParams& p) {
  return p.grad_scale.data != nullptr || p.a_scale.data != nullptr;
}

template <DType type, Product product>
Status select(TileShape shape, const GroupedGemmParams& p, Stream stream) {
  switch (shape) {
    case TileShape::k128x256:
      if constexpr (has_kernel(product, TileShape::k128x256))
        return run<type, product, TileShape::k128x256>(p, stream);
      break;
    case TileShape::k128x128:
      return run<type, product, TileShape::k128x128>(p, stream);
    case TileShape::k64x128:
      return run<type, product, TileShape::k64x128>(p, stream);
    case TileShape::k64x64:
      return run<type, product, TileShape::k64x64>(p, stream);
  }
  return cudaErrorInvalidValue;
}

template <DType type>
Status select(Product product, TileShape shape, const GroupedGemmParams& p, Stream stream) {
  switch (product) {
    case Product::kNT:
      return select<type, Product::kNT>(shape, p, stream);
    case Product::kNN:
      return select<type, Product::kNN>(shape, p, stream);
    case Product::kGatherNT:
      return select<type, Product::kGatherNT>(shape, p, stream);
    case Product::kGatherNN:
      return select<type, Product::kGatherNN>(shape, p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <DType type, Product product>
Status select(TileShape shape, const GroupedWgradParams& p, Stream stream) {
  if constexpr (has_kernel(product, TileShape::k128x256)) {
    if (shape == TileShape::k128x256)
      return run_wgrad<type, product, TileShape::k128x256>(p, stream);
  }
  return run_wgrad<type, product, TileShape::k128x128>(p, stream);
}

template <DType type>
Status select(Product product, TileShape shape, const GroupedWgradParams& p, Stream stream) {
  switch (product) {
    case Product::kTN:
      return select<type, Product::kTN>(shape, p, stream);
    case Product::kGatherTN:
      return select<type, Product::kGatherTN>(shape, p, stream);
    case Product::kTNGather:
      return select<type, Product::kTNGather>(shape, p, stream);
    case Product::kGatherTNGather:
      return select<type, Product::kGatherTNGather>(shape, p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

bool supports(const GroupedGemmParams& p) {
  if (!usable() || !half_type(p.b.type) || p.a.type != p.b.type) return false;
  if (p.out.type != p.b.type && p.out.type != DType::kFloat32) return false;
  if (p.bias.data != nullptr && p.bias.type != p.b.type) return false;
  if (p.num_experts < 1 || p.in_features < 8 || p.in_features % 8 != 0 || p.out_features % 8 != 0)
    return false;
  if (p.b.quant.bits != 0 || (p.b.stride_k != 1 && p.b.stride_o != 1)) return false;
  return tensor_map_possible(operand_a(p)) && tensor_map_possible(operand_b(p)) &&
         storable(p.out.data, p.out.type, p.out.stride);
}

bool supports(const GroupedWgradParams& p) {
  if (!usable() || !half_type(p.a.type) || p.grad.type != p.a.type) return false;
  if (p.out_type != p.a.type && p.out_type != DType::kFloat32) return false;
  if (scaled(p) && product_of(p) != Product::kGatherTNGather) return false;
  if (p.grad_scale.data != nullptr && p.a_scale.data != nullptr) return false;
  if (p.out_features % 8 != 0 || p.in_features % 8 != 0) return false;
  return tensor_map_possible(operand_a(p)) && tensor_map_possible(operand_b(p)) &&
         storable(p.out, p.out_type, p.in_features);
}

Status grouped_gemm(const GroupedGemmParams& p, Stream stream) {
  GemmDesc d;
  d.product = product_of(p);
  d.rows = p.num_rows;
  d.num_experts = p.num_experts;
  d.n = p.out_features;
  d.k = p.in_features;
  d.num_sms = usable_sms();
  d.invariant = batch_invariant();
  const TileShape shape = shape_of(d);
  return p.b.type == DType::kBFloat16 ? select<DType::kBFloat16>(d.product, shape, p, stream)
                                      : select<DType::kFloat16>(d.product, shape, p, stream);
}

Status grouped_gemm_wgrad(const GroupedWgradParams& p, Stream stream) {
  if (scaled(p)) {
    return p.a.type == DType::kBFloat16 ? run_scaled_wgrad<DType::kBFloat16>(p, stream)
                                        : run_scaled_wgrad<DType::kFloat16>(p, stream);
  }
  GemmDesc d;
  d.product = product_of(p);
  d.rows = p.num_rows;
  d.num_experts = p.num_experts;
  d.m = p.out_features;
  d.n = p.in_features;
  d.num_sms = usable_sms();
  const TileShape shape = shape_of(d);
  return p.a.type == DType::kBFloat16 ? select<DType::kBFloat16>(d.product, shape, p, stream)
                                      : select<DType::kFloat16>(d.product, shape, p, stream);
}

}  // namespace moe_ops::cuda::sm90
