// The weight gradient for any card: both operands lie along the sum, as those of the product do, so
// a step of 128 columns is one group of scales.
#include "cuda/grouped_gemm_fp8/generic_product.cuh"
#include "cuda/grouped_gemm_fp8/wgrad.h"

namespace moe_ops::cuda::generic {

namespace {

using Config = Fp8TileConfig;

struct Fp8WgradLaunch {
  GroupedGemmFp8WgradParams p;
  int tiles_o, tiles_k;
  bool grad_aligned, a_aligned;  // rows of codes start on 16 bytes
  bool out_pairs;                // two neighbors of a row of out can be stored at once
};

template <class Out>
__device__ void store_wgrad(const Fp8WgradLaunch& launch, int e, int o0, int k0,
                            const Fp8Product& sums) {
  const GroupedGemmFp8WgradParams& p = launch.p;
  const int O = static_cast<int>(p.out_features), K = static_cast<int>(p.in_features);
#pragma unroll
  for (int i = 0; i < Fp8Product::kRows; ++i) {
    const int o = o0 + sums.row(i);
    if (o >= O) continue;
    auto* out = static_cast<Out*>(p.out) + (int64_t{e} * O + o) * K;
    store_pairs(out, k0, K, launch.out_pairs, p.accumulate, sums,
                [&](int j, int h) { return sums.value(i, j, h); });
  }
}

__global__ void __launch_bounds__(Config::kThreads, kFp8BlocksPerSm)
    grouped_gemm_fp8_wgrad_kernel(const __grid_constant__ Fp8WgradLaunch launch) {
  using TileA = Config::TileA;  // of grad
  using TileB = Config::TileB;  // of a
  using CopyA = TileCopy<uint8_t, TileA, Config::kThreads>;
  using CopyB = TileCopy<uint8_t, TileB, Config::kThreads>;
  constexpr int kStages = Config::kStages, kStageSize = TileA::kSize + TileB::kSize;
  constexpr int kRows = Fp8Product::kRows;
  extern __shared__ __align__(128) uint8_t stages[];

  const GroupedGemmFp8WgradParams& p = launch.p;
  const int O = static_cast<int>(p.out_features), K = static_cast<int>(p.in_features);
  const int columns = static_cast<int>(p.num_groups * kFp8Block);
  const int64_t tiles_of_expert = int64_t{launch.tiles_o} * launch.tiles_k;
  const int64_t num_tiles = p.num_experts * tiles_of_expert;

  Fp8Product sums;
  for (int64_t tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
    const int e = static_cast<int>(tile / tiles_of_expert);
    const int64_t i = tile % tiles_of_expert;
    const int o0 = static_cast<int>(i % launch.tiles_o) * Config::kTileM;
    const int k0 = static_cast<int>(i / launch.tiles_o) * Config::kTileN;
    const RowRange range = expert_rows(p.expert_offsets, e, static_cast<int>(p.max_rows()));
    if (p.accumulate && range.begin == range.end) continue;
    const int steps = (range.end - range.begin + Config::kTileK - 1) / Config::kTileK;
    const int64_t first = fp8_first_group(range.begin, e);

    const auto load = [&](int step) {
      uint8_t* stage = stages + step % kStages * kStageSize;
      const int column = static_cast<int>((first + step) * kFp8Block);
      const auto grad_row = [&](int pass) -> const uint8_t* {
        const int o = o0 + CopyA::row(pass);
        return o < O ? p.grad.data + o * p.grad.stride : nullptr;
      };
      CopyA::run<false>(stage, grad_row, column, columns, launch.grad_aligned, p.grad.data);
      const auto a_row = [&](int pass) -> const uint8_t* {
        const int k = k0 + CopyB::row(pass);
        return k < K ? p.a.data + k * p.a.stride : nullptr;
      };
      CopyB::run<false>(stage + TileA::kSize, a_row, column, columns, launch.a_aligned, p.a.data);
    };

    sums.clear();
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) {
      if (step < steps) load(step);
      commit_copies();
    }
    for (int step = 0; step < steps; ++step) {
      const float* const grad_scale = p.grad.scale + (first + step) * p.grad.scale_stride + o0;
      const float* const a_scale = p.a.scale + (first + step) * p.a.scale_stride + k0;
      float of_row[kRows];
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        of_row[j] = o0 + sums.row(j) < O ? __ldg(grad_scale + sums.row(j)) : 0.0f;
      }
      wait_copies<kStages - 2>();
      __syncthreads();
      if (step + kStages - 1 < steps) load(step + kStages - 1);
      commit_copies();
      const uint8_t* stage = stages + step % kStages * kStageSize;
      sums.multiply(stage, stage + TileA::kSize, [&](int r, int j, int h) {
        const int k = sums.col(j) + h;
        return of_row[r] * (k0 + k < K ? __ldg(a_scale + k) : 0.0f);
      });
    }
    __syncthreads();  // The next tile fills the same stages.

    switch (p.out_type) {
      case DType::kBFloat16:
        store_wgrad<bf16>(launch, e, o0, k0, sums);
        break;
      case DType::kFloat16:
        store_wgrad<fp16>(launch, e, o0, k0, sums);
        break;
      default:
        store_wgrad<float>(launch, e, o0, k0, sums);
    }
  }
}

bool rows_start_on_16(const Fp8Columns& c) { return aligned_to(c.data, 16) && c.stride % 16 == 0; }

}  // namespace

Status grouped_gemm_fp8_wgrad(const GroupedGemmFp8WgradParams& p, Stream stream) {
  Fp8WgradLaunch launch;
  launch.p = p;
  launch.tiles_o = static_cast<int>(ceil_div<int64_t>(p.out_features, Config::kTileM));
  launch.tiles_k = static_cast<int>(ceil_div<int64_t>(p.in_features, Config::kTileN));
  launch.grad_aligned = rows_start_on_16(p.grad);
  launch.a_aligned = rows_start_on_16(p.a);
  launch.out_pairs = aligned_to(p.out, 2 * dtype_size(p.out_type)) && p.in_features % 2 == 0;
  constexpr int kShared = Config::kStages * (Config::TileA::kSize + Config::TileB::kSize);
  return launch_tiles<grouped_gemm_fp8_wgrad_kernel>(
      launch, p.num_experts * launch.tiles_o * int64_t{launch.tiles_k}, Config::kThreads, kShared,
      kFp8BlocksPerSm, stream);
}

}  // namespace moe_ops::cuda::generic
