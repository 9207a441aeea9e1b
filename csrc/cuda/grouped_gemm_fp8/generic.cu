// The product of rows with the matrices of experts for any card. Blocks take tiles one after the
// other, as in grouped_gemm/gemm_kernel.cuh, whose parts are reused here; generic_product.cuh has
// the arithmetic.
#include "cuda/grouped_gemm_fp8/generic.h"
#include "cuda/grouped_gemm_fp8/generic_product.cuh"

namespace moe_ops::cuda::generic {

namespace {

using Config = Fp8TileConfig;

struct Fp8Launch {
  GroupedGemmFp8Params p;
  int column_tiles;
  bool a_aligned, b_aligned;  // rows start on 16 bytes
  bool out_pairs;             // two neighbors of a row of out can be stored at once
};

__device__ float bias_at(const ExpertVectors& bias, int64_t i) {
  switch (bias.type) {
    case DType::kBFloat16:
      return widen(static_cast<const bf16*>(bias.data)[i]);
    case DType::kFloat16:
      return widen(static_cast<const fp16*>(bias.data)[i]);
    default:
      return static_cast<const float*>(bias.data)[i];
  }
}

template <class Out>
__device__ void store_tile(const Fp8Launch& launch, const TileWork& work, bool tail,
                           const Fp8Product& sums) {
  constexpr int kPairs = Fp8Product::kPairs, kRows = Fp8Product::kRows;
  const GroupedGemmFp8Params& p = launch.p;
  const int O = static_cast<int>(p.out_features), n0 = work.column_tile * Config::kTileN;
  float bias[kPairs][2];
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int col = n0 + sums.col(j) + h;
      bias[j][h] = p.bias.data != nullptr && !tail && col < O
                       ? bias_at(p.bias, work.expert * p.bias.stride_e + col)
                       : 0.0f;
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int r = work.row + sums.row(i);
    if (r >= work.end) continue;
    auto* out = static_cast<Out*>(p.out.data) + r * p.out.stride;
    const float factor = tail ? 0.0f : row_factor<float>(p.factor, r);
    store_pairs(out, n0, O, launch.out_pairs, false, sums,
                [&](int j, int h) { return fmaf(factor, sums.value(i, j, h), bias[j][h]); });
  }
}

__global__ void __launch_bounds__(Config::kThreads, kFp8BlocksPerSm)
    grouped_gemm_fp8_kernel(const __grid_constant__ Fp8Launch launch) {
  using TileA = Config::TileA;
  using TileB = Config::TileB;
  using CopyA = TileCopy<uint8_t, TileA, Config::kThreads>;
  using CopyB = TileCopy<uint8_t, TileB, Config::kThreads>;
  constexpr int kStages = Config::kStages, kStageSize = TileA::kSize + TileB::kSize;
  constexpr int kRows = Fp8Product::kRows;
  extern __shared__ __align__(128) uint8_t stages[];

  const GroupedGemmFp8Params& p = launch.p;
  const int K = static_cast<int>(p.in_features), O = static_cast<int>(p.out_features);
  const int E = static_cast<int>(p.num_experts), N = static_cast<int>(p.num_rows);

  Schedule<Config::kTileM> schedule;
  TileWork work;
  Fp8Product sums;
  for (int64_t tile = blockIdx.x;
       schedule.find(tile, p.expert_offsets, E, N, p.zero_tail, launch.column_tiles, work);
       tile += gridDim.x) {
    const bool tail = work.expert == E;
    const int n0 = work.column_tile * Config::kTileN;
    const int steps = tail ? 0 : (K + Config::kTileK - 1) / Config::kTileK;

    const uint8_t* a_rows[CopyA::kPasses];
#pragma unroll
    for (int pass = 0; pass < CopyA::kPasses; ++pass) {
      const int r = work.row + CopyA::row(pass);
      const int source = !tail && r < work.end ? source_row(p.a, r) : -1;
      a_rows[pass] = source < 0 ? nullptr : p.a.data + source * p.a.stride;
    }
    const float* a_scale[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int r = work.row + sums.row(i);
      const int source = !tail && r < work.end ? source_row(p.a, r) : -1;
      a_scale[i] = source < 0 ? nullptr : p.a.scale + source * p.a.scale_stride;
    }
    const uint8_t* matrix = p.b.data + (tail ? 0 : work.expert * p.b.stride_e);
    const float* b_scale =
        p.b.scale +
        (tail ? 0 : work.expert * p.b.scale_stride_e + work.column_tile * p.b.scale_stride_o);

    const auto load = [&](int step) {
      uint8_t* stage = stages + step % kStages * kStageSize;
      const int k0 = step * Config::kTileK;
      CopyA::run<false>(
          stage, [&](int pass) { return a_rows[pass]; }, k0, K, launch.a_aligned, p.a.data);
      const auto line = [&](int pass) -> const uint8_t* {
        const int n = n0 + CopyB::row(pass);
        return n < O ? matrix + n * p.b.stride_o : nullptr;
      };
      CopyB::run<false>(stage + TileA::kSize, line, k0, K, launch.b_aligned, p.b.data);
    };

    sums.clear();
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) {
      if (step < steps) load(step);
      commit_copies();
    }
    for (int step = 0; step < steps; ++step) {
      float scale[kRows];
      const float b = __ldg(b_scale + step);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        scale[i] = a_scale[i] != nullptr ? __ldg(a_scale[i] + step) * b : 0.0f;
      }
      // Own copies of this step are done; after the barrier everybody's are, and nobody reads the
      // stage of the step before any more.
      wait_copies<kStages - 2>();
      __syncthreads();
      if (step + kStages - 1 < steps) load(step + kStages - 1);
      commit_copies();
      const uint8_t* stage = stages + step % kStages * kStageSize;
      sums.multiply(stage, stage + TileA::kSize, [&](int i, int, int) { return scale[i]; });
    }
    __syncthreads();  // The next tile fills the same stages.

    switch (p.out.type) {
      case DType::kBFloat16:
        store_tile<bf16>(launch, work, tail, sums);
        break;
      case DType::kFloat16:
        store_tile<fp16>(launch, work, tail, sums);
        break;
      default:
        store_tile<float>(launch, work, tail, sums);
    }
  }
}

}  // namespace

Status grouped_gemm_fp8(const GroupedGemmFp8Params& p, Stream stream) {
  Fp8Launch launch;
  launch.p = p;
  launch.column_tiles = static_cast<int>(ceil_div<int64_t>(p.out_features, Config::kTileN));
  launch.a_aligned = aligned_to(p.a.data, 16) && p.a.stride % 16 == 0;
  launch.b_aligned = aligned_to(p.b.data, 16) && p.b.stride_o % 16 == 0 && p.b.stride_e % 16 == 0;
  launch.out_pairs = aligned_to(p.out.data, 2 * dtype_size(p.out.type)) && p.out.stride % 2 == 0;
  // No expert's last tile is shared: each may add one that is not full, and so may the tail.
  const int64_t tiles =
      (ceil_div<int64_t>(p.num_rows, Config::kTileM) + std::min(p.num_experts + 1, p.num_rows)) *
      launch.column_tiles;
  constexpr int kShared = Config::kStages * (Config::TileA::kSize + Config::TileB::kSize);
  return launch_tiles<grouped_gemm_fp8_kernel>(launch, tiles, Config::kThreads, kShared,
                                               kFp8BlocksPerSm, stream);
}

}  // namespace moe_ops::cuda::generic
