// The TMA + wgmma kernels for sm_90a. Torch and CuTe stay out of this header.
#pragma once

#include <string_view>

#include "moe_ops/grouped_gemm_fp8.h"

namespace moe_ops::cuda::sm90::fp8 {

// Tiles of the output. 128x128: two warpgroups share it. 2x128x128: two blocks besides, which share
// every tile of B. 64x128, for few rows an expert: each warpgroup has a tile of its own, in turn.
enum class TileShape { k2x128x128, k128x128, k64x128 };

// Whether these kernels take a call: an sm_90 card, rows that start on 16 bytes (K and strides
// multiples of 16), O a multiple of 8. Other calls go to the generic kernel.
bool supports(const GroupedGemmFp8Params& p);

Status grouped_gemm_fp8(const GroupedGemmFp8Params& p, Stream stream);

// The environment's MOE_OPS_GEMM_TILE, for tests and measurements: 2x128x128, 128x128 or 64x128
// takes that tile, 128x256 that of moe_ffn_fp8's up product, generic none of these kernels.
std::string_view forced_tile();

// One kernel; kGather: rows of A go through an index (instantiations/).
template <TileShape shape, bool kGather>
Status run(const GroupedGemmFp8Params& p, Stream stream);

}  // namespace moe_ops::cuda::sm90::fp8
