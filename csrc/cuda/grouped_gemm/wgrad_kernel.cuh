// out[e] = sum over the rows r of e of scale(r) * grad[r]^T a[r] for any strides and alignments.
//
// A product whose k runs over rows: a tile of out [kTileM of O, kTileN of K] adds kTileK rows at a
// step, in order. Both operands lie [row][feature] in shared memory; ldmatrix turns them. A row's
// source is looked up one step before its copy starts.
#pragma once

#include "cuda/grouped_gemm/gemm_kernel.cuh"

namespace moe_ops::cuda::generic {

struct WgradLaunch {
  GroupedWgradParams p;
  int tiles_o, tiles_k;
  bool grad_aligned, a_aligned;
  bool out_pairs;
};

template <class Config, class Out>
__device__ void store_wgrad(const WgradLaunch& launch, int e, int o0, int k0,
                            const Product<Config>& sums) {
  using Acc = typename Config::Acc;
  using Sums = Product<Config>;
  const GroupedWgradParams& p = launch.p;
  const int O = static_cast<int>(p.out_features), K = static_cast<int>(p.in_features);
#pragma unroll
  for (int i = 0; i < Sums::kRows; ++i) {
    const int o = o0 + sums.row(i);
    if (o >= O) continue;
    auto* out = static_cast<Out*>(p.out) + (int64_t{e} * O + o) * K;
#pragma unroll
    for (int j = 0; j < Sums::kPairs; ++j) {
      const int k = k0 + sums.col(j);
      Acc v[2] = {sums.value(i, j, 0), sums.value(i, j, 1)};
      if (p.accumulate) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          if (k + h < K) v[h] += widen(out[k + h]);
        }
      }
      store_pair(out, k, K, launch.out_pairs, v[0], v[1]);
    }
  }
}

template <class Config, int kBlocksPerSm>
__global__ void __launch_bounds__(Config::kThreads, kBlocksPerSm)
    grouped_wgrad_kernel(const __grid_constant__ WgradLaunch launch) {
  using S = typename Config::Element;
  using Acc = typename Config::Acc;
  using TileA = typename Config::TileA;  // of grad
  using TileB = typename Config::TileB;  // of a
  using CopyA = TileCopy<S, TileA, Config::kThreads>;
  using CopyB = TileCopy<S, TileB, Config::kThreads>;
  constexpr int kStages = Config::kStages;
  constexpr int kStageSize = TileA::kSize + TileB::kSize;
  constexpr int kRows = Config::kTileK;
  static_assert(!Config::kAKMajor && !Config::kBKMajor && kRows <= Config::kThreads);
  extern __shared__ __align__(128) unsigned char shared[];
  auto* stages = reinterpret_cast<S*>(shared);
  auto* factors = reinterpret_cast<Acc*>(stages + kStages * kStageSize);  // [kStages][kRows]

  const GroupedWgradParams& p = launch.p;
  const auto* grad = static_cast<const S*>(p.grad.data);
  const auto* a = static_cast<const S*>(p.a.data);
  const bool scaled = p.grad_scale.data != nullptr || p.a_scale.data != nullptr;
  const int O = static_cast<int>(p.out_features), K = static_cast<int>(p.in_features);
  const int64_t tiles_of_expert = int64_t{launch.tiles_o} * launch.tiles_k;
  const int64_t num_tiles = p.num_experts * tiles_of_expert;

  Product<Config> sums;
  for (int64_t tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
    const int e = static_cast<int>(tile / tiles_of_expert);
    const int64_t i = tile % tiles_of_expert;
    const int o0 = static_cast<int>(i % launch.tiles_o) * Config::kTileM;
    const int k0 = static_cast<int>(i / launch.tiles_o) * Config::kTileN;
    const RowRange range = expert_rows(p.expert_offsets, e, static_cast<int>(p.num_rows));
    if (p.accumulate && range.begin == range.end) continue;
    const int steps = (range.end - range.begin + kRows - 1) / kRows;

    const S* grad_rows[CopyA::kPasses];
    const S* a_rows[CopyB::kPasses];
    const auto look_up = [&](int step) {
      const int r0 = range.begin + step * kRows;
#pragma unroll
      for (int pass = 0; pass < CopyA::kPasses; ++pass) {
        const int r = r0 + CopyA::row(pass);
        grad_rows[pass] = r < range.end ? row_pointer<S>(p.grad, r) : nullptr;
      }
#pragma unroll
      for (int pass = 0; pass < CopyB::kPasses; ++pass) {
        const int r = r0 + CopyB::row(pass);
        a_rows[pass] = r < range.end ? row_pointer<S>(p.a, r) : nullptr;
      }
    };
    const auto load = [&](int step) {
      S* stage = stages + step % kStages * kStageSize;
      CopyA::template run<Config::kAligned>(
          stage, [&](int pass) { return grad_rows[pass]; }, o0, O, launch.grad_aligned, grad);
      CopyB::template run<Config::kAligned>(
          stage + TileA::kSize, [&](int pass) { return a_rows[pass]; }, k0, K, launch.a_aligned, a);
      if (scaled && threadIdx.x < kRows) {
        const int r = range.begin + step * kRows + static_cast<int>(threadIdx.x);
        factors[step % kStages * kRows + threadIdx.x] =
            r < range.end ? row_factor<Acc>(p.grad_scale, r) * row_factor<Acc>(p.a_scale, r)
                          : Acc(0);
      }
      look_up(step + 1);
    };

    sums.clear();
    look_up(0);
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) {
      if (step < steps) load(step);
      commit_copies();
    }
    for (int step = 0; step < steps; ++step) {
      wait_copies<kStages - 2>();
      __syncthreads();
      if (step + kStages - 1 < steps) load(step + kStages - 1);
      commit_copies();
      const S* stage = stages + step % kStages * kStageSize;
      sums.multiply(stage, stage + TileA::kSize,
                    scaled ? factors + step % kStages * kRows : nullptr);
    }
    __syncthreads();

    if (p.out_type == p.a.type) {
      store_wgrad<Config, S>(launch, e, o0, k0, sums);
    } else {
      store_wgrad<Config, Accumulate<S>>(launch, e, o0, k0, sums);
    }
  }
}

template <class Config, int kBlocksPerSm>
Status launch_grouped_wgrad(const GroupedWgradParams& p, Stream stream) {
  WgradLaunch launch;
  launch.p = p;
  launch.tiles_o = static_cast<int>(ceil_div<int64_t>(p.out_features, Config::kTileM));
  launch.tiles_k = static_cast<int>(ceil_div<int64_t>(p.in_features, Config::kTileN));
  launch.grad_aligned = rows_aligned(p.grad);
  launch.a_aligned = rows_aligned(p.a);
  launch.out_pairs = aligned_to(p.out, 2 * dtype_size(p.out_type)) && p.in_features % 2 == 0;
  constexpr int kShared =
      Config::kStages * (Config::TileA::kSize + Config::TileB::kSize) *
          static_cast<int>(sizeof(typename Config::Element)) +
      Config::kStages * Config::kTileK * static_cast<int>(sizeof(typename Config::Acc));
  return launch_tiles<grouped_wgrad_kernel<Config, kBlocksPerSm>>(
      launch, p.num_experts * launch.tiles_o * int64_t{launch.tiles_k}, Config::kThreads, kShared,
      kBlocksPerSm, stream);
}

}  // namespace moe_ops::cuda::generic
