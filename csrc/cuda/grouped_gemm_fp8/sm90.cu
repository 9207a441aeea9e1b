// Which of the sm_90a kernels serves a call.
#include <algorithm>
#include <cstdlib>

#include "cuda/check.h"
#include "cuda/grouped_gemm_fp8/sm90.h"
#include "cuda/grouped_gemm_fp8/sm90_operands.h"
#include "cuda/runtime.h"
#include "moe_ops/batch_invariant.h"

namespace moe_ops::cuda::sm90::fp8 {

namespace {

template <TileShape shape>
Status run_either(const GroupedGemmFp8Params& p, Stream stream) {
  return p.a.index != nullptr ? run<shape, true>(p, stream) : run<shape, false>(p, stream);
}

}  // namespace

std::string_view forced_tile() {
  const char* s = std::getenv("MOE_OPS_GEMM_TILE");
  return s != nullptr ? s : "";
}

TileShape tile_of(const GroupedGemmFp8Params& p) {
  const std::string_view forced = forced_tile();
  if (forced == "2x128x256") return TileShape::k2x128x256;
  if (forced == "128x256") return TileShape::k128x256;
  if (forced == "64x128") return TileShape::k64x128;
  if (batch_invariant()) return TileShape::k2x128x256;
  const int64_t rows = p.num_rows / std::min(p.num_experts, p.num_rows);
  return rows >= 256 ? TileShape::k2x128x256 : rows > 64 ? TileShape::k128x256 : TileShape::k64x128;
}

bool supports(const GroupedGemmFp8Params& p) {
  if (device_info().capability != 90 || forced_tile() == "generic") return false;
  if (p.num_experts < 1 || p.in_features < 16 || p.in_features % 16 != 0) return false;
  if (p.out_features % 8 != 0) return false;
  // Places of scales are counted in 32 bits.
  if (p.a.limit * p.a.scale_stride > INT32_MAX || p.num_experts * p.b.scale_stride_e > INT32_MAX)
    return false;
  // Rows are stored 16 bytes at a time, fp32 ones 8.
  const bool storable = p.out.type == DType::kFloat32
                            ? aligned_to(p.out.data, 8) && p.out.stride % 2 == 0
                            : aligned_to(p.out.data, 16) && p.out.stride % 8 == 0;
  return storable && tensor_map_possible(operand_a(p)) && tensor_map_possible(operand_b(p));
}

Status grouped_gemm_fp8(const GroupedGemmFp8Params& p, Stream stream) {
  switch (tile_of(p)) {
    case TileShape::k2x128x256:
      return run_either<TileShape::k2x128x256>(p, stream);
    case TileShape::k128x256:
      return run_either<TileShape::k128x256>(p, stream);
    case TileShape::k64x128:
      return run_either<TileShape::k64x128>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace moe_ops::cuda::sm90::fp8
