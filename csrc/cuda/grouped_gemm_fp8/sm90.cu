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

bool aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// By the rows that an expert has on average. Up to 64, the small tile reads the same weights and
// multiplies fewer rows that are not there. From 256 on, sharing B saves a quarter of what a tile
// reads from L2, more than the rows that fill up a pair of tiles cost (NOTES.md). In the
// batch-invariant mode the tile for many rows.
TileShape shape_of(const GroupedGemmFp8Params& p) {
  const std::string_view forced = forced_tile();
  if (forced == "2x128x128") return TileShape::k2x128x128;
  if (forced == "128x128") return TileShape::k128x128;
  if (forced == "64x128") return TileShape::k64x128;
  if (batch_invariant()) return TileShape::k2x128x128;
  const int64_t rows = p.num_rows / std::min(p.num_experts, p.num_rows);
  return rows >= 256 ? TileShape::k2x128x128 : rows > 64 ? TileShape::k128x128 : TileShape::k64x128;
}

template <TileShape shape>
Status run_either(const GroupedGemmFp8Params& p, Stream stream) {
  return p.a.index != nullptr ? run<shape, true>(p, stream) : run<shape, false>(p, stream);
}

}  // namespace

std::string_view forced_tile() {
  const char* s = std::getenv("MOE_OPS_GEMM_TILE");
  return s != nullptr ? s : "";
}

bool supports(const GroupedGemmFp8Params& p) {
  if (device_info().capability != 90 || forced_tile() == "generic") return false;
  if (p.num_experts < 1 || p.in_features < 16 || p.in_features % 16 != 0) return false;
  if (p.out_features % 8 != 0) return false;
  // Rows are stored 16 bytes at a time, fp32 ones 8.
  const bool storable = p.out.type == DType::kFloat32
                            ? aligned(p.out.data, 8) && p.out.stride % 2 == 0
                            : aligned(p.out.data, 16) && p.out.stride % 8 == 0;
  return storable && tensor_map_possible(operand_a(p)) && tensor_map_possible(operand_b(p));
}

Status grouped_gemm_fp8(const GroupedGemmFp8Params& p, Stream stream) {
  switch (shape_of(p)) {
    case TileShape::k2x128x128:
      return run_either<TileShape::k2x128x128>(p, stream);
    case TileShape::k128x128:
      return run_either<TileShape::k128x128>(p, stream);
    case TileShape::k64x128:
      return run_either<TileShape::k64x128>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace moe_ops::cuda::sm90::fp8
