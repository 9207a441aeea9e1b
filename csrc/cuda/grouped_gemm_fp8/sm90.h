// The TMA + wgmma kernels for sm_90a. Torch and CuTe stay out of this header.
#pragma once

#include <string_view>

#include "moe_ops/grouped_gemm_fp8.h"

namespace moe_ops::cuda::sm90::fp8 {

// Tiles of the output. 128x256: two warpgroups share it. 2x128x256: two blocks besides, which share
// every tile of B. 64x128, for few rows an expert: each warpgroup has a tile of its own
// (ping-pong).
enum class TileShape { k2x128x256, k128x256, k64x128 };

// Returns whether these kernels support a call: an sm_90 GPU, rows that start on 16 bytes (K and
// strides multiples of 16), O a multiple of 8. Other calls use the generic kernel.
bool supports(const GroupedGemmFp8Params& p);

Status grouped_gemm_fp8(const GroupedGemmFp8Params& p, Stream stream);

// Returns MOE_OPS_GEMM_TILE: 2x128x256, 128x256 or 64x128 selects that tile, generic disables these
// kernels. For tests and benchmarks.
std::string_view forced_tile();

// Returns the tile of a product, by the mean number of rows per expert: up to 64, the small tile
// reads the same weights and multiplies fewer rows that are not there. From 256 on, sharing B saves
// a third of what a tile reads from L2, more than the rows that fill up a pair of tiles cost
// (NOTES.md). In the batch-invariant mode the tile for many rows.
TileShape tile_of(const GroupedGemmFp8Params& p);

// Runs one kernel; kGather: rows of A are gathered (instantiations/).
template <TileShape shape, bool kGather>
Status run(const GroupedGemmFp8Params& p, Stream stream);

}  // namespace moe_ops::cuda::sm90::fp8
