// The kernel: one producer warpgroup, one or two consumer warpgroups, as many blocks as SMs. Each
// block walks its list of tiles (sm90_scheduler.cuh); producer and consumers do so independently
// and meet only at the stages of the ring (sm90_mainloop.cuh, sm90_gather.cuh).
//
// To make a kernel: a config (sm90_config.cuh), an epilogue (sm90_epilogue.cuh), two tensor maps
// (tensor_map.h; operand_map_a/b below choose the boxes), launch<Config, Epilogue>(). Contract of
// the parts:
// - B is one tensor [E, N, K] (kMajorB = kK: dense along K; kMN: along N; kEither: b_along_n says
//   which). A is [rows, K], by TMA or gathered; with kRaggedK A is [rows, M] and B is [rows, N].
// - TMA reads rows past the end of a group: they belong to another expert and stay in rows of the
//   tile that are not stored. With kRaggedK they would enter the sum and are cleared.
// - The rows past the last expert are tiles of expert E with k_tiles = 0: acc is zero.
// - Tail columns: TMA fills columns and k past the tensor with zeros; the epilogue checks n.
#pragma once

#include <algorithm>

#include "cuda/grouped_gemm/sm90_epilogue.cuh"
#include "cuda/grouped_gemm/sm90_gather.cuh"
#include "cuda/grouped_gemm/sm90_mainloop.cuh"
#include "cuda/launch.h"
#include "cuda/runtime.h"
#include "moe_ops/common.h"

namespace moe_ops::cuda::sm90 {

template <class Config, class Epilogue>
struct KernelParams {
  CUtensorMap map_a;
  CUtensorMap map_b;
  Problem problem;
  int split_offset;   // kSplitB: rows of B between the two halves
  bool b_along_n;     // kMajorB = kEither: B is dense along N, else along K
  GatherRows gather;  // of A
  GatherRows gather_b;
  typename Epilogue::Params epilogue;
};

// Registers: 65536 a block. Two consumer warpgroups at 232 and a producer at 40 take 64512.
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;

template <class Config, class Epilogue>
__global__ void __launch_bounds__(Traits<Config>::kThreads, 1)
    sm90_grouped_gemm_kernel(const __grid_constant__ KernelParams<Config, Epilogue> p) {
  using T = Traits<Config>;
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& smem = *reinterpret_cast<typename T::SharedStorage*>(shared_bytes);
  // Registers of each consumer for the producer: where it gathers, and they store through boxes.
  constexpr int kMoved = T::kGather && Config::kStoreBoxes ? 8 : 0;

  const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  const int cluster_rank = static_cast<int>(blockIdx.x) % T::kCluster;
  const int first = blockIdx.x / T::kCluster, step = gridDim.x / T::kCluster;

  if (threadIdx.x == 0) {
    if constexpr (!T::kGatherA) cute::prefetch_tma_descriptor(&p.map_a);
    if constexpr (!T::kGatherB) cute::prefetch_tma_descriptor(&p.map_b);
    init_barriers<Config>(smem);
  }
  order_experts<Config>(p.problem, smem);
  if constexpr (T::kCluster > 1) {
    cute::cluster_sync();
  } else {
    __syncthreads();
  }

  if (group == 0) {
    if constexpr (T::kConsumers > 1)
      cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters + 2 * kMoved>();
    if constexpr (T::kGather && Config::kRaggedK) {
      produce_gather_lines<Config>(p, smem, first, step, cluster_rank);
    } else if constexpr (T::kGather) {
      produce_gather<Config>(p, smem, first, step, cluster_rank);
    } else {
      if (threadIdx.x < kWarp) produce_tma<Config>(p, smem, first, step, cluster_rank);
    }
    return;
  }

  if constexpr (T::kConsumers > 1)
    cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters - kMoved>();
  const int consumer = group - 1;
  const int thread = static_cast<int>(threadIdx.x) - kWarpgroup * (T::kPingpong ? group : 1);
  PipelineState<Config> read;
  Scheduler<Config> scheduler(p.problem, smem);
  Tile tile;
  int count = 0;
  for (int index = first; scheduler.get(index, cluster_rank, tile); index += step, ++count) {
    if (T::kPingpong && count % 2 != consumer) {
      read.advance(tile.k_tiles);
      continue;
    }
    auto acc = cute::partition_fragment_C(typename T::TiledMma{},
                                          cute::Shape<cute::Int<T::kM>, cute::Int<T::kN>>{});
    if constexpr (T::kPingpong) await_mma_order<Config>(smem, consumer, count);
    const auto issued = [&] {
      if constexpr (T::kPingpong) pass_mma_order<Config>(smem, consumer);
    };
    if (index == first) begin_later<Config>(smem, tile, consumer);
    if (tile.k_tiles > 0) {
      with_major_b<Config>(p, [&](auto major) {
        multiply<Config, Config::kMajorA, major.value>(smem, tile, read, acc, thread,
                                                       T::kPingpong ? consumer : 0, issued);
      });
    } else {
      cute::clear(acc);
      issued();
    }
    Epilogue::template store<Config>(p.epilogue, p.problem, tile, acc, thread,
                                     warp_boxes<Config>(smem));
  }
  if constexpr (Config::kStoreBoxes) StoreBoxes::finish();
}

// ---- Host ----

// Boxes of the operands' tensor maps (tensor_map.h): elements along the dense side, then lines.
template <class Config, Major major_b = Config::kMajorB>
struct Boxes {
  using T = Traits<Config>;
  static constexpr int kA[2] = {T::kSpan, T::kLinesA};
  static constexpr int kB[3] = {T::kSpan, T::lines_b(major_b), 1};
};

// Returns the number of blocks: at most one per SM, and no more than there can be tiles.
template <class Config>
unsigned grid_blocks(const Problem& p, int num_sms) {
  using T = Traits<Config>;
  constexpr int64_t kClusterM = T::kM * T::kCluster;
  constexpr int64_t kColumns = Config::kSplitB ? T::kN / 2 : T::kN;
  const int64_t nt = ceil_div<int64_t>(p.n, kColumns);
  // Every expert and the rows after the last one may end in a partly filled tile.
  const int64_t mt = Config::kRaggedK
                         ? p.num_experts * ceil_div<int64_t>(p.m, kClusterM)
                         : p.rows / kClusterM + std::min<int64_t>(p.num_experts + 1, p.rows);
  const int64_t clusters = std::max<int64_t>(1, num_sms / T::kCluster);
  return static_cast<unsigned>(std::min(clusters, mt * nt)) * T::kCluster;
}

template <class Config, class Epilogue>
Status launch(const KernelParams<Config, Epilogue>& params, Stream stream) {
  using T = Traits<Config>;
  const unsigned blocks = grid_blocks<Config>(params.problem, usable_sms());
  if (blocks == 0) return cudaSuccess;
  const Launch at{blocks, T::kThreads, stream, T::kSharedBytes, T::kCluster};
  return launch_kernel<sm90_grouped_gemm_kernel<Config, Epilogue>>(at, params);
}

}  // namespace moe_ops::cuda::sm90
