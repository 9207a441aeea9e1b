// The tiles that there are kernels for; choose.h says which one a product gets. Plain C++: no CUDA
// type.
#pragma once

#include <array>
#include <string_view>

namespace moe_ops::cuda {

// Letters say how the operands lie, as in BLAS: A [rows, K] times B [N, K] or [K, N], and the
// weight gradient A [rows, M] times B [rows, N]. Gather: the rows of that operand come through an
// index.
enum class Product { kNT, kNN, kTN, kGatherNT, kGatherNN, kGatherTN, kTNGather, kGatherTNGather };

constexpr std::array<std::string_view, 8> kProductNames = {
    "nt", "nn", "tn", "gather_nt", "gather_nn", "gather_tn", "tn_gather", "gather_tn_gather"};

constexpr bool is_wgrad(Product p) { return p == Product::kTN || p >= Product::kGatherTN; }
constexpr bool gathers(Product p) { return p >= Product::kGatherNT; }
constexpr bool gathers_b(Product p) {
  return p == Product::kTNGather || p == Product::kGatherTNGather;
}

// Tile of the output. 128x256: two consumer warpgroups share it, two blocks share B. 128x128 and
// 64x128: ping-pong. 64x64: one consumer, long stages, for few rows an expert.
enum class TileShape { k128x256, k128x128, k64x128, k64x64 };

struct GemmConfig {
  TileShape shape;
  int m, n, k;
  int cluster;  // row tiles that share B
  bool pingpong;
  double mma_rate;  // share of the peak rate on long sums, an assumption until measured
};

constexpr std::array<GemmConfig, 4> kGemmConfigs = {{
    {TileShape::k128x256, 128, 256, 64, 2, false, 0.80},
    {TileShape::k128x128, 128, 128, 64, 1, true, 0.72},
    {TileShape::k64x128, 64, 128, 64, 1, true, 0.60},
    {TileShape::k64x64, 64, 64, 128, 1, false, 0.40},
}};

constexpr std::string_view name(TileShape s) {
  constexpr std::string_view kNames[] = {"128x256", "128x128", "64x128", "64x64"};
  return kNames[static_cast<int>(s)];
}

// Has the product a kernel of this shape? (instantiations/)
constexpr bool has_kernel(Product p, TileShape s) {
  if (s == TileShape::k128x256)
    return !gathers(p) || p == Product::kGatherTN || p == Product::kTNGather;
  return s == TileShape::k128x128 || !is_wgrad(p);
}

// Returns the configuration of a product's kernel with a tile; gathered operands cannot be
// multicast.
constexpr GemmConfig config_of(Product p, TileShape s) {
  GemmConfig c = kGemmConfigs[static_cast<int>(s)];
  if (c.cluster > 1 && gathers_b(p)) {
    c.cluster = 1;
    c.mma_rate = 0.75;
  }
  return c;
}

}  // namespace moe_ops::cuda
