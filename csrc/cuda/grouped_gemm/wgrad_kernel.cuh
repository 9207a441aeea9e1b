// out[e] = sum over the rows r of e of scale(r) * grad[r]^T a[r] for any strides and alignments.
//
// A product whose k runs over rows: a tile of out [kTileM of O, kTileN of K] adds kTileK rows at a
// step, in order. Both operands are [row][feature] in shared memory; ldmatrix transposes them. A
// thread a row finds out where the rows of a step lie, one step before their copies start, and
// loads their indices a step earlier still.
#pragma once

#include "cuda/grouped_gemm/gemm_kernel.cuh"

namespace moe_ops::cuda::generic {

struct WgradLaunch {
  GroupedWgradParams p;
  int tiles_o, tiles_k;
  bool grad_aligned, a_aligned;
  bool out_pairs, out_vectors;  // as in GemmLaunch
};

template <class Config, class Out>
__device__ void store_wgrad(const WgradLaunch& launch, int e, int o0, int k0,
                            const Product<Config>& sums) {
  using Sums = Product<Config>;
  const GroupedWgradParams& p = launch.p;
  const int O = static_cast<int>(p.out_features), K = static_cast<int>(p.in_features);
#pragma unroll
  for (int i = 0; i < Sums::kRows; ++i) {
    const int o = o0 + sums.row(i);
    auto* out = static_cast<Out*>(p.out) + (int64_t{e} * O + o) * K;
    const auto value = [&](int j, int h) { return sums.value(i, j, h); };
    if constexpr (kQuadsOfVectors<Config, Out>) {
      if (launch.out_vectors) {
        store_vectors<Config>(out, o < O, k0, K, p.accumulate, sums, value);
        continue;
      }
    }
    if (o < O) store_pairs(out, k0, K, launch.out_pairs, p.accumulate, sums, value);
  }
}

struct WgradWork {
  int expert, o0, k0;
  RowRange rows;
};

// kScaled: rows have factors.
template <class Config, int kBlocksPerSm, bool kScaled>
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
  static_assert(!Config::kAKMajor && !Config::kBKMajor && 2 * kRows <= Config::kThreads);
  extern __shared__ __align__(128) unsigned char shared[];
  auto* stages = reinterpret_cast<S*>(shared);
  // Sources of a step: the rows of grad, then those of a. [kStages][2 * kRows]
  auto* sources = reinterpret_cast<const S**>(stages + kStages * kStageSize);
  auto* factors = reinterpret_cast<Acc*>(sources + kStages * 2 * kRows);  // [kStages][kRows]

  const GroupedWgradParams& p = launch.p;
  const auto* grad = static_cast<const S*>(p.grad.data);
  const auto* a = static_cast<const S*>(p.a.data);
  const int O = static_cast<int>(p.out_features), K = static_cast<int>(p.in_features);
  const int64_t tiles_of_expert = int64_t{launch.tiles_o} * launch.tiles_k;
  const int64_t num_tiles = p.num_experts * tiles_of_expert;

  int64_t tile = blockIdx.x;
  WgradWork work{};  // whose operands are loaded
  // The next tile with something to do, from `tile` on; false: there is none any more.
  const auto find = [&](WgradWork& found) {
    for (; tile < num_tiles; tile += gridDim.x) {
      const int e = static_cast<int>(tile / tiles_of_expert);
      const int64_t i = tile % tiles_of_expert;
      found = {e, static_cast<int>(i % launch.tiles_o) * Config::kTileM,
               static_cast<int>(i / launch.tiles_o) * Config::kTileN,
               expert_rows(p.expert_offsets, e, static_cast<int>(p.num_rows))};
      if (!p.accumulate || found.rows.begin < found.rows.end) return true;
    }
    return false;
  };
  const auto num_steps = [&](const WgradWork& of) {
    return (of.rows.end - of.rows.begin + kRows - 1) / kRows;
  };

  const int thread = static_cast<int>(threadIdx.x);
  const DeviceRows& rows = thread < kRows ? p.grad : p.a;  // whose row this thread looks up
  const auto entry_of = [&](int step) {
    const int r = work.rows.begin + step * kRows + thread % kRows;
    return thread < 2 * kRows ? source_index(rows, r, work.rows.end) : -1;
  };
  const auto put_source = [&](int step, int entry) {
    if (thread < 2 * kRows) {
      sources[step % kStages * 2 * kRows + thread] = indexed_row<S>(rows, entry);
    }
  };
  int entry = -1;  // of the step whose sources are put next
  const auto copy = [&](int step) {
    S* stage = stages + step % kStages * kStageSize;
    const S** source = sources + step % kStages * 2 * kRows;
    CopyA::template run<Config::kAligned>(
        stage, [&](int pass) { return source[CopyA::row(pass)]; }, work.o0, O, launch.grad_aligned,
        grad);
    CopyB::template run<Config::kAligned>(
        stage + TileA::kSize, [&](int pass) { return source[kRows + CopyB::row(pass)]; }, work.k0,
        K, launch.a_aligned, a);
    if constexpr (kScaled) {
      if (thread < kRows) {
        const int r = work.rows.begin + step * kRows + thread;
        factors[step % kStages * kRows + thread] =
            r < work.rows.end ? row_factor<Acc>(p.grad_scale, r) * row_factor<Acc>(p.a_scale, r)
                              : Acc(0);
      }
    }
  };
  const auto load = [&](int step) {
    copy(step);
    put_source(step + 1, entry);
    entry = entry_of(step + 2);
  };
  const auto begin = [&] {
    const int steps = num_steps(work);
    int first[kStages];
#pragma unroll
    for (int step = 0; step < kStages; ++step) first[step] = entry_of(step);
#pragma unroll
    for (int step = 0; step < kStages; ++step) put_source(step, first[step]);
    entry = entry_of(kStages);
    __syncthreads();
#pragma unroll 1
    for (int step = 0; step < kStages - 1; ++step) {
      if (step < steps) copy(step);
      commit_copies();
    }
  };

  Product<Config> sums;
  bool more = find(work);
  if (more) begin();
  while (more) {
    const WgradWork current = work;
    tile += gridDim.x;
    WgradWork next{};
    more = find(next);  // while the first copies are under way
    sums.clear();
    add_steps<Config>(sums, stages, num_steps(current), load, [&](int step) -> const Acc* {
      return kScaled ? factors + step % kStages * kRows : nullptr;
    });
    if (more) {
      work = next;
      begin();
    }
    if (p.out_type == p.a.type) {
      store_wgrad<Config, S>(launch, current.expert, current.o0, current.k0, sums);
    } else {
      store_wgrad<Config, Accumulate<S>>(launch, current.expert, current.o0, current.k0, sums);
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
  const int64_t out_size = dtype_size(p.out_type);
  launch.out_pairs = aligned_to(p.out, 2 * out_size) && p.in_features % 2 == 0;
  launch.out_vectors = aligned_to(p.out, 16) && p.in_features * out_size % 16 == 0;
  const int64_t tiles = p.num_experts * launch.tiles_o * int64_t{launch.tiles_k};
  constexpr size_t kShared =
      Config::kStages *
      ((Config::TileA::kSize + Config::TileB::kSize) * sizeof(typename Config::Element) +
       2 * Config::kTileK * sizeof(void*) + Config::kTileK * sizeof(typename Config::Acc));
  return p.grad_scale.data != nullptr || p.a_scale.data != nullptr
             ? launch_tiles<grouped_wgrad_kernel<Config, kBlocksPerSm, true>>(
                   launch, tiles, Config::kThreads, kShared, kBlocksPerSm, stream)
             : launch_tiles<grouped_wgrad_kernel<Config, kBlocksPerSm, false>>(
                   launch, tiles, Config::kThreads, kShared, kBlocksPerSm, stream);
}

}  // namespace moe_ops::cuda::generic
