// out[r] = scale(r) * b[e(r)] a[r] + bias[e(r)] for any strides and alignments.
//
// Blocks stay resident and take tiles in turn (schedule.cuh). For each tile:
//   1. resolve the source rows of A through the index, once;
//   2. keep kStages - 1 steps of k in flight (cp.async; plain loads where rows are not aligned);
//   3. multiply on the tensor cores, sums in registers, k in order: the same bits for any grid;
//   4. scale, bias, store, through the output's index.
// The tail is an expert with k = 0 and no bias: its tiles store zeros.
#pragma once

#include "cuda/grouped_gemm/launch.cuh"
#include "cuda/grouped_gemm/mma.cuh"
#include "cuda/grouped_gemm/schedule.cuh"

namespace moe_ops::cuda::generic {

struct GemmLaunch {
  GroupedGemmParams p;
  int column_tiles;
  bool a_aligned, b_aligned;  // rows of A, lines of B start on 16 bytes
  bool out_pairs;             // two neighbours of a row of out can be stored at once
};

// Stores v[0], v[1] at out[col], out[col + 1] as far as col < cols.
template <class S>
__device__ void store_pair(S* out, int col, int cols, bool pairs, Accumulate<S> v0,
                           Accumulate<S> v1) {
  if (pairs && col + 1 < cols) {
    store_wide(out + col, Wide<S, 2>{{v0, v1}});
  } else {
    if (col < cols) out[col] = narrow<S>(v0);
    if (col + 1 < cols) out[col + 1] = narrow<S>(v1);
  }
}

template <class Config, class Out>
__device__ void store_rows(const GemmLaunch& launch, const TileWork& work, bool tail,
                           const Product<Config>& sums) {
  using Acc = typename Config::Acc;
  using Sums = Product<Config>;
  const GroupedGemmParams& p = launch.p;
  const int O = static_cast<int>(p.out_features), n0 = work.column_tile * Config::kTileN;
  Acc bias[Sums::kPairs][2];
#pragma unroll
  for (int j = 0; j < Sums::kPairs; ++j) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int col = n0 + sums.col(j) + h;
      bias[j][h] = 0;
      if (p.bias.data != nullptr && !tail && col < O) {
        bias[j][h] = widen(static_cast<const typename Config::Element*>(
            p.bias.data)[work.expert * p.bias.stride_e + col]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < Sums::kRows; ++i) {
    const int r = work.row + sums.row(i);
    const int target = r < work.end ? source_row(p.out, r) : -1;
    if (target < 0) continue;
    auto* out = static_cast<Out*>(p.out.data) + target * p.out.stride;
    const Acc scale = tail ? Acc(0) : row_factor<Acc>(p.a_scale, r);
#pragma unroll
    for (int j = 0; j < Sums::kPairs; ++j) {
      store_pair(out, n0 + sums.col(j), O, launch.out_pairs,
                 fma(scale, sums.value(i, j, 0), bias[j][0]),
                 fma(scale, sums.value(i, j, 1), bias[j][1]));
    }
  }
}

template <class Config, int kBlocksPerSm>
__global__ void __launch_bounds__(Config::kThreads, kBlocksPerSm)
    grouped_gemm_kernel(const __grid_constant__ GemmLaunch launch) {
  using S = typename Config::Element;
  using TileA = typename Config::TileA;
  using TileB = typename Config::TileB;
  using CopyA = TileCopy<S, TileA, Config::kThreads>;
  using CopyB = TileCopy<S, TileB, Config::kThreads>;
  constexpr int kStages = Config::kStages;
  constexpr int kStageSize = TileA::kSize + TileB::kSize;
  extern __shared__ __align__(128) unsigned char shared[];
  auto* stages = reinterpret_cast<S*>(shared);

  const GroupedGemmParams& p = launch.p;
  const auto* a = static_cast<const S*>(p.a.data);
  const auto* b = static_cast<const S*>(p.b.data);
  const int K = static_cast<int>(p.in_features), O = static_cast<int>(p.out_features);
  const int E = static_cast<int>(p.num_experts), N = static_cast<int>(p.num_rows);

  Schedule<Config::kTileM> schedule;
  TileWork work;
  Product<Config> sums;
  for (int64_t tile = blockIdx.x;
       schedule.find(tile, p.expert_offsets, E, N, p.zero_tail, launch.column_tiles, work);
       tile += gridDim.x) {
    const bool tail = work.expert == E;
    const int n0 = work.column_tile * Config::kTileN;
    const int steps = tail ? 0 : (K + Config::kTileK - 1) / Config::kTileK;

    const S* a_rows[CopyA::kPasses];
#pragma unroll
    for (int pass = 0; pass < CopyA::kPasses; ++pass) {
      const int r = work.row + CopyA::row(pass);
      a_rows[pass] = !tail && r < work.end ? row_pointer<S>(p.a, r) : nullptr;
    }
    const S* matrix = b + (tail ? 0 : work.expert * p.b.stride_e);

    const auto load = [&](int step) {
      S* stage = stages + step % kStages * kStageSize;
      const int k0 = step * Config::kTileK;
      CopyA::template run<Config::kAligned>(
          stage, [&](int pass) { return a_rows[pass]; }, k0, K, launch.a_aligned, a);
      if constexpr (Config::kBKMajor) {
        const auto line = [&](int pass) -> const S* {
          const int n = n0 + CopyB::row(pass);
          return n < O ? matrix + n * p.b.stride_o : nullptr;
        };
        CopyB::template run<Config::kAligned>(stage + TileA::kSize, line, k0, K, launch.b_aligned,
                                              b);
      } else {
        const auto line = [&](int pass) -> const S* {
          const int k = k0 + CopyB::row(pass);
          return k < K ? matrix + k * p.b.stride_k : nullptr;
        };
        CopyB::template run<Config::kAligned>(stage + TileA::kSize, line, n0, O, launch.b_aligned,
                                              b);
      }
    };

    sums.clear();
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) {
      if (step < steps) load(step);
      commit_copies();
    }
    for (int step = 0; step < steps; ++step) {
      // Own copies of this step are done; after the barrier everybody's are, and nobody reads the
      // stage of the step before any more.
      wait_copies<kStages - 2>();
      __syncthreads();
      if (step + kStages - 1 < steps) load(step + kStages - 1);
      commit_copies();
      const S* stage = stages + step % kStages * kStageSize;
      sums.multiply(stage, stage + TileA::kSize, nullptr);
    }
    __syncthreads();  // The next tile fills the same stages.

    if (p.out.type == p.b.type) {
      store_rows<Config, S>(launch, work, tail, sums);
    } else {
      store_rows<Config, Accumulate<S>>(launch, work, tail, sums);
    }
  }
}

inline bool rows_aligned(const DeviceRows& rows) {
  return aligned_to(rows.data, 16) && rows.stride * dtype_size(rows.type) % 16 == 0;
}
inline bool matrices_aligned(const ExpertMatrices& m) {
  const int64_t size = dtype_size(m.type), line = m.stride_k == 1 ? m.stride_o : m.stride_k;
  return aligned_to(m.data, 16) && line * size % 16 == 0 && m.stride_e * size % 16 == 0;
}

template <class Config, int kBlocksPerSm>
Status launch_grouped_gemm(const GroupedGemmParams& p, Stream stream) {
  GemmLaunch launch;
  launch.p = p;
  launch.column_tiles = static_cast<int>(ceil_div<int64_t>(p.out_features, Config::kTileN));
  launch.a_aligned = rows_aligned(p.a);
  launch.b_aligned = matrices_aligned(p.b);
  const int64_t out_size = dtype_size(p.out.type);
  launch.out_pairs = aligned_to(p.out.data, 2 * out_size) && p.out.stride % 2 == 0;
  // No expert's last tile is shared: each may add one that is not full, and so may the tail.
  const int64_t tiles =
      (ceil_div<int64_t>(p.num_rows, Config::kTileM) + std::min(p.num_experts + 1, p.num_rows)) *
      launch.column_tiles;
  constexpr int kShared = Config::kStages * (Config::TileA::kSize + Config::TileB::kSize) *
                          static_cast<int>(sizeof(typename Config::Element));
  return launch_tiles<grouped_gemm_kernel<Config, kBlocksPerSm>>(launch, tiles, Config::kThreads,
                                                                 kShared, kBlocksPerSm, stream);
}

}  // namespace moe_ops::cuda::generic
