// The tiles that the stages of moe_ffn have kernels for. Plain C++, like
// cuda/grouped_gemm/config.h.
#pragma once

#include "cuda/grouped_gemm/config.h"

namespace moe_ops::cuda {

// Up projection: 64x256 ping-pong, 128x256, and two of the latter that share the weights.
// Backward down projection: 64x128, and two of 128x128 that share the weights, all ping-pong.
enum class FfnTile { kLow, kHigh, kPair };
constexpr std::string_view kFfnTileNames[] = {"low", "high", "pair"};

constexpr std::array<GemmConfig, 3> kFfnUpConfigs = {{
    {TileShape::k64x128, 64, 256, 64, 1, true, 0.66},
    {TileShape::k128x256, 128, 256, 64, 1, false, 0.75},
    {TileShape::k128x256, 128, 256, 64, 2, false, 0.80},
}};

constexpr std::array<GemmConfig, 2> kFfnDownBwdConfigs = {{
    {TileShape::k64x128, 64, 128, 64, 1, true, 0.60},
    {TileShape::k128x128, 128, 128, 64, 2, true, 0.72},
}};

}  // namespace moe_ops::cuda
