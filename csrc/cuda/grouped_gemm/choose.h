// Which tile a product gets. Plain C++: no CUDA type, testable on any machine. Not for kernels:
// they would all be compiled again for a number of the model.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>

#include "cuda/grouped_gemm/config.h"
#include "moe_ops/common.h"

namespace moe_ops::cuda {

struct GemmDesc {
  Product product = Product::kNT;
  int64_t rows = 0;  // of all experts
  int64_t num_experts = 0;
  int64_t m = 0;  // weight gradients: rows of an expert's output; else unused
  int64_t n = 0;
  int64_t k = 0;  // weight gradients: unused
  int num_sms = 132;
  bool invariant = false;  // batch_invariant.h
};

// Cycles that the whole product takes with a tile, by a model of three parts: tiles come in waves
// of one an SM; a tile takes as long as its products or its operands from L2, whichever is longer,
// and a start and an end that only ping-pong hides; all together no less than the weights from
// DRAM.
inline double estimate_cycles(const GemmDesc& d, const GemmConfig& c) {
  // Dense bf16 multiply-adds a cycle and SM: 4 tensor cores of 512. H100 SXM's 989.4 TFLOP/s are
  // 132 SMs x 2048 x 2 operations x 1.83 GHz.
  constexpr double kMmaPerCycle = 2048;
  constexpr double kL2Bytes = 26;    // a cycle an SM, 132 SMs at about 6 TB/s and 1.755 GHz
  constexpr double kDramBytes = 14;  // a cycle an SM, 3.35 TB/s
  constexpr double kFill = 1500;     // first stage of a tile: latency of offsets and of TMA
  constexpr double kElement = 2;
  const bool wgrad = is_wgrad(d.product);
  const int64_t experts = wgrad ? d.num_experts : std::min(d.num_experts, d.rows);
  if (experts == 0) return 0;
  const int64_t rows = ceil_div(d.rows, experts);  // of an expert, if they are balanced
  const int64_t mt = ceil_div<int64_t>(wgrad ? d.m : rows, c.m);
  const int64_t nt = ceil_div<int64_t>(d.n, c.n);
  const double k = static_cast<double>(wgrad ? rows : d.k);
  // A row tile without a partner is split by columns (sm90_scheduler.cuh).
  const int64_t of_expert =
      mt / c.cluster * nt + (mt % c.cluster > 0 ? ceil_div<int64_t>(nt, c.cluster) : 0);
  const int64_t waves = ceil_div<int64_t>(experts * of_expert, d.num_sms / c.cluster);
  const double mma = c.m * c.n * k / (kMmaPerCycle * c.mma_rate);
  // Boxes of A without rows of the expert are not loaded.
  const int64_t lines = wgrad ? c.m : std::min<int64_t>(c.m, round_up<int64_t>(rows, 16));
  const int64_t shared_by = std::min<int64_t>(mt, c.cluster);
  const double load = (lines + c.n / shared_by) * k * kElement / kL2Bytes;
  const double store = c.m * c.n * kElement / kL2Bytes;
  const double ends = c.pingpong ? 0 : kFill + store;
  const double tiles = waves * (std::max(mma, load) + ends) + kFill + store;
  const double operands =
      wgrad ? d.rows * static_cast<double>(d.m + d.n) : experts * d.n * k + d.rows * (k + d.n);
  const double result = wgrad ? experts * static_cast<double>(d.m) * d.n : 0;
  return std::max(tiles, (operands + result) * kElement / (kDramBytes * d.num_sms) + kFill);
}

// Returns the tile for many rows, whatever their number, for batch-invariant mode, since wgmmas of
// different shapes may sum in different orders. Few rows wait for DRAM about as long.
inline GemmConfig invariant_config(const GemmDesc& d) {
  for (const GemmConfig& tile : kGemmConfigs) {
    const GemmConfig c = config_of(d.product, tile.shape);
    if (has_kernel(d.product, c.shape) && d.num_sms >= c.cluster) return c;
  }
  return kGemmConfigs.back();
}

// Returns the tile that the model finds fastest; on equal terms the smaller one, which wastes less
// on experts with fewer rows than the mean.
inline GemmConfig choose_config(const GemmDesc& d) {
  // A gradient of weights sums over the batch in any case.
  if (d.invariant && !is_wgrad(d.product)) return invariant_config(d);
  GemmConfig best = kGemmConfigs[1];
  double best_cycles = -1;
  for (auto tile = kGemmConfigs.rbegin(); tile != kGemmConfigs.rend(); ++tile) {
    const GemmConfig c = config_of(d.product, tile->shape);
    if (!has_kernel(d.product, c.shape) || d.num_sms < c.cluster) continue;
    const double cycles = estimate_cycles(d, c);
    if (best_cycles < 0 || cycles < 0.97 * best_cycles) {
      best = c;
      best_cycles = cycles;
    }
  }
  return best;
}

inline std::string to_string(const GemmDesc& d) {
  char text[160];
  std::snprintf(text, sizeof(text), "%s rows %lld experts %lld m %lld n %lld k %lld on %d SMs",
                kProductNames[static_cast<int>(d.product)].data(), static_cast<long long>(d.rows),
                static_cast<long long>(d.num_experts), static_cast<long long>(d.m),
                static_cast<long long>(d.n), static_cast<long long>(d.k), d.num_sms);
  return text;
}

inline std::string to_string(const GemmConfig& c) {
  char text[96];
  std::snprintf(text, sizeof(text), "%dx%dx%d %s cluster %d", c.m, c.n, c.k,
                c.pingpong ? "ping-pong" : "cooperative", c.cluster);
  return text;
}

}  // namespace moe_ops::cuda
