// The two sides of the ring of stages in shared memory: a producer that fills it (TMA, or cp.async
// for gathered rows) and consumer warpgroups that multiply from it (wgmma).
//
// Stage s is full when full[s] has counted its bytes (and, with gathered rows, 128 threads), empty
// when every consumer warp that used it has arrived at empty[s] of every block of the cluster: with
// multicast the neighbor's producer writes here, too.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include <cute/arch/copy_sm90_tma.hpp>
#include <cutlass/pipeline/sm90_pipeline.hpp>

#include "cuda/grouped_gemm/sm90_scheduler.cuh"

namespace moe_ops::cuda::sm90 {

template <class Config>
using PipelineState = cutlass::PipelineState<Traits<Config>::kStages>;

template <class Config>
__device__ inline void init_barriers(typename Traits<Config>::SharedStorage& smem) {
  using T = Traits<Config>;
  for (int s = 0; s < T::kStages; ++s) {
    smem.full[s].init(1 + (T::kGather ? kWarpgroup : 0));
    smem.empty[s].init(T::kTileGroups * (kWarpgroup / kWarp) * T::kCluster);
  }
  for (int g = 0; g < 2; ++g) smem.mma_order[g].init(kWarpgroup / kWarp);
  cutlass::arch::fence_barrier_init();
}

// ---- Order of the consumers of a ping-pong kernel ----

// Waits until consumer warpgroup `consumer`, 0 or 1, may issue the MMAs of tile `tile` of the
// block's list; the two warpgroups alternate tiles. A full barrier distinguishes only a phase from
// the next one, so a warpgroup may test it only after the other one has seen all earlier phases. A
// wait on a new barrier passes at once if the parity is 1: warpgroup 0 begins. The parity is
// computed, as a variable for it would be kept on the stack.
template <class Config>
__device__ inline void await_mma_order(typename Traits<Config>::SharedStorage& smem, int consumer,
                                       int tile) {
  smem.mma_order[consumer].wait((tile / 2 + 1 + consumer) % 2);
}

// Lets the other warpgroup issue its MMAs. Each warp calls it after it has issued the MMAs of its
// tile.
template <class Config>
__device__ inline void pass_mma_order(typename Traits<Config>::SharedStorage& smem, int consumer) {
  if (threadIdx.x % kWarp == 0) smem.mma_order[1 - consumer].arrive();
}

// ---- Producer ----

// Boxes of A along M that hold rows of the group.
template <class Config>
__device__ inline int boxes_a(const Tile& tile) {
  using T = Traits<Config>;
  static_assert(Config::kMajorA == Major::kK);
  const int rows = min(T::kM, tile.row_end - tile.row0);
  return max(0, (rows + T::kLinesA - 1) / T::kLinesA);
}

// Loads A for this block, and half of B for both blocks of a cluster that share it; one thread
// calls.
template <class Config>
__device__ inline void load_a(const CUtensorMap* map, uint64_t* full,
                              typename Config::Element* smem, const Tile& tile, int k_tile,
                              int boxes) {
  using T = Traits<Config>;
  constexpr auto kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
  const int k = tile.k0 + k_tile * T::kK;
  if constexpr (Config::kMajorA == Major::kK) {
#pragma unroll
    for (int box = 0; box < T::kM / T::kLinesA; ++box) {
      if (box < boxes) {
#pragma unroll
        for (int s = 0; s < T::kK / T::kSpan; ++s)
          cute::SM90_TMA_LOAD_2D::copy(map, full, kHint,
                                       smem + (s * T::kM + box * T::kLinesA) * T::kSpan,
                                       k + s * T::kSpan, tile.row0 + box * T::kLinesA);
      }
    }
  } else {
#pragma unroll
    for (int s = 0; s < T::kM / T::kSpan; ++s)
      cute::SM90_TMA_LOAD_2D::copy(map, full, kHint, smem + s * T::kK * T::kSpan,
                                   tile.row0 + s * T::kSpan, k);
  }
}

template <class Config, Major major = Config::kMajorB>
__device__ inline void load_b(const CUtensorMap* map, uint64_t* full,
                              typename Config::Element* smem, const Tile& tile, int k_tile,
                              int split_offset, int cluster_rank) {
  using T = Traits<Config>;
  constexpr auto kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
  const int k = tile.k0 + k_tile * T::kK;
  const int expert = Config::kRaggedK ? 0 : tile.expert;
  // The blocks that get this block's boxes; which of them it loads.
  const uint16_t blocks = tile.shares_b ? (1 << T::kCluster) - 1 : 1 << cluster_rank;
  const auto loads = [&](int box, int boxes) {
    return T::kCluster == 1 || !tile.shares_b || box / (boxes / T::kCluster) == cluster_rank;
  };
  auto copy = [&](int line, int c0, int c1) {
    auto* to = smem + line * T::kSpan;
    if constexpr (T::kCluster == 1) {
      cute::SM90_TMA_LOAD_3D::copy(map, full, kHint, to, c0, c1, expert);
    } else {
      cute::SM90_TMA_LOAD_MULTICAST_3D::copy(map, full, blocks, kHint, to, c0, c1, expert);
    }
  };
  static_assert(major != Major::kEither);
  if constexpr (major == Major::kK) {
    constexpr int kLines = T::lines_b(Major::kK);
    constexpr int kBoxes = T::kN / kLines;  // boxes along N
#pragma unroll
    for (int s = 0; s < T::kK / T::kSpan; ++s) {
#pragma unroll
      for (int box = 0; box < kBoxes; ++box) {
        const int col = tile.col0 + box * (Config::kSplitB ? split_offset : kLines);
        if (loads(box, kBoxes)) copy(s * T::kN + box * kLines, k + s * T::kSpan, col);
      }
    }
  } else {
    constexpr int kBoxes = T::kN / T::kSpan;
    constexpr int kHalf = kBoxes / 2;  // kSplitB: boxes of a half
    static_assert(kBoxes % T::kCluster == 0);
#pragma unroll
    for (int box = 0; box < kBoxes; ++box) {
      const int col =
          Config::kSplitB ? box / kHalf * split_offset + box % kHalf * T::kSpan : box * T::kSpan;
      if (loads(box, kBoxes)) copy(box * T::kK, tile.col0 + col, k);
    }
  }
}

// Calls fn with the way B lies as a constant; p.b_along_n says it where the config leaves it open.
template <class Config, class Params, class Fn>
__device__ __forceinline__ void with_major_b(const Params& p, const Fn& fn) {
  if constexpr (Config::kMajorB != Major::kEither) {
    fn(std::integral_constant<Major, Config::kMajorB>{});
  } else if (p.b_along_n) {
    fn(std::integral_constant<Major, Major::kMN>{});
  } else {
    fn(std::integral_constant<Major, Major::kK>{});
  }
}

// Runs the TMA producer in one warp; lane 0 waits and issues.
template <class Config, class Params>
__device__ inline void produce_tma(const Params& p, typename Traits<Config>::SharedStorage& smem,
                                   int first, int step, int cluster_rank) {
  using T = Traits<Config>;
  auto write = cutlass::PipelineState<T::kStages>{0, 1, 0};
  const bool leader = threadIdx.x % kWarp == 0;
  Scheduler<Config> scheduler(p.problem, smem);
  Tile tile;
  for (int index = first; scheduler.get(index, cluster_rank, tile); index += step) {
    if (leader) {
      int boxes = 0, bytes = T::kStageBytes;
      if constexpr (Config::kMajorA == Major::kK) {
        boxes = boxes_a<Config>(tile);
        bytes = T::kStageBytesB + boxes * (T::kStageBytesA / T::kM * T::kLinesA);
      }
#pragma unroll 1
      for (int kt = 0; kt < tile.k_tiles; ++kt, ++write) {
        const int s = write.index();
        smem.empty[s].wait(write.phase());
        smem.full[s].arrive_and_expect_tx(bytes);
        auto* full = reinterpret_cast<uint64_t*>(&smem.full[s]);
        load_a<Config>(&p.map_a, full, smem.a + s * T::kM * T::kK, tile, kt, boxes);
        load_b<Config>(&p.map_b, full, smem.b + s * T::kN * T::kK, tile, kt, p.split_offset,
                       cluster_rank);
      }
    }
    __syncwarp();
  }
  // A block must not leave while its neighbor may still arrive at its barriers.
  if (T::kCluster > 1 && leader) {
    for (int i = 0; i < T::kStages; ++i, ++write) smem.empty[write.index()].wait(write.phase());
  }
}

// ---- Consumer ----

// Returns the boxes of the consumer's warp (sm90_store_boxes.cuh).
template <class Config>
__device__ inline unsigned char* warp_boxes(typename Traits<Config>::SharedStorage& smem) {
  constexpr int kWarpBytes = 2 * kStoreBoxBytes;
  return Config::kStoreBoxes
             ? smem.boxes + (static_cast<int>(threadIdx.x) - kWarpgroup) / kWarp * kWarpBytes
             : nullptr;
}

// Delays the second warpgroup before the block's first tile. Warpgroups that share tiles go through
// the ring independently: the second one begins a stage late, so that from then on each has
// products while the other is in its epilogue.
template <class Config>
__device__ inline void begin_later(typename Traits<Config>::SharedStorage& smem, const Tile& tile,
                                   int consumer) {
  if (Traits<Config>::kTileGroups > 1 && consumer > 0 && tile.k_tiles > 1) smem.full[1].wait(0);
}

// Releases a stage to the producers of all blocks of the cluster; one lane per warp arrives.
template <class Config>
__device__ inline void release(typename Traits<Config>::SharedStorage& smem, int stage) {
  using T = Traits<Config>;
  if constexpr (T::kCluster == 1) {
    if (threadIdx.x % kWarp == 0) smem.empty[stage].arrive();
  } else {
    const int lane = threadIdx.x % kWarp;
    smem.empty[stage].arrive(lane, lane < T::kCluster);
  }
}

// Clears rows of the next expert in an expert's last stage (ragged K). They are overwritten by
// zeros, in A and in B, since 0 * NaN is NaN; gathered operands have zeros there already. All
// threads that share the tile take part.
template <class Config>
__device__ inline void clear_rows(typename Traits<Config>::SharedStorage& smem, int stage,
                                  int valid, int thread, int barrier) {
  using T = Traits<Config>;
  constexpr int kThreads = T::kTileGroups * kWarpgroup;
  constexpr int kLine = kSwizzleBytes / sizeof(uint4);
  constexpr int kBlocksA = T::kM / T::kSpan, kBlocksB = T::kN / T::kSpan;
  const int pieces = (T::kK - valid) * kLine;
  for (int block = T::kGatherA ? kBlocksA : 0;
       block < (T::kGatherB ? kBlocksA : kBlocksA + kBlocksB); ++block) {
    auto* lines = reinterpret_cast<uint4*>(
        block < kBlocksA ? smem.a + (stage * T::kM + block * T::kSpan) * T::kK
                         : smem.b + (stage * T::kN + (block - kBlocksA) * T::kSpan) * T::kK);
    for (int i = thread; i < pieces; i += kThreads)
      lines[valid * kLine + i] = make_uint4(0, 0, 0, 0);
  }
  cutlass::arch::fence_view_async_shared();
  cutlass::arch::NamedBarrier::sync(kThreads, barrier);
}

// Computes acc = sum over the stages of `tile`; `read` advances by tile.k_tiles (> 0). `thread`
// counts the threads that share the tile. One product stays in flight while the next stage is
// awaited. issued() is called when the last product has been started.
template <class Config, Major major_a = Config::kMajorA, Major major_b = Config::kMajorB,
          class Accumulators, class Issued>
__device__ inline void multiply(typename Traits<Config>::SharedStorage& smem, const Tile& tile,
                                PipelineState<Config>& read, Accumulators& acc, int thread,
                                int barrier, const Issued& issued) {
  using namespace cute;
  using T = Traits<Config>;
  static_assert(major_b != Major::kEither);
  using LayoutA = typename T::template Layout<major_a, T::kM>;
  using LayoutB = typename T::template Layout<major_b, T::kN>;
  Tensor sA = make_tensor(make_smem_ptr(smem.a), LayoutA{});  // (M, K, stage)
  Tensor sB = make_tensor(make_smem_ptr(smem.b), LayoutB{});  // (N, K, stage)
  typename T::template Mma<major_a, major_b> mma;
  // Descriptors are uniform over a warpgroup.
  const int group = __shfl_sync(~0u, thread / kWarpgroup, 0);
  auto slice = mma.get_slice(group * kWarpgroup);
  Tensor tA = slice.make_fragment_A(slice.partition_A(sA));  // (mma, m, k, stage)
  Tensor tB = slice.make_fragment_B(slice.partition_B(sB));  // (mma, n, k, stage)

  // A warpgroup without rows of the group leaves the tensor cores to the other one.
  if constexpr (!Config::kRaggedK) {
    if (tile.row0 + 64 * group >= tile.row_end) {
      clear(acc);
#pragma unroll 1
      for (int kt = 0; kt < tile.k_tiles; ++kt, ++read) {
        smem.full[read.index()].wait(read.phase());
        release<Config>(smem, read.index());
      }
      issued();
      return;
    }
  }

  mma.accumulate_ = GMMA::ScaleOut::Zero;
  PipelineState<Config> done = read;
#pragma unroll 1
  for (int kt = 0; kt < tile.k_tiles; ++kt) {
    const int s = read.index();
    smem.full[s].wait(read.phase());
    // cp.async writes through the generic proxy, wgmma reads through the asynchronous one.
    if constexpr (T::kGather) cutlass::arch::fence_view_async_shared();
    if constexpr (Config::kRaggedK && !(T::kGatherA && T::kGatherB)) {
      const int valid = tile.k_size - kt * T::kK;
      if (valid < T::kK) clear_rows<Config>(smem, s, valid, thread, barrier);
    }
    warpgroup_fence_operand(acc);
    warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < size<2>(tA); ++k) {
      gemm(mma, tA(_, _, k, s), tB(_, _, k, s), acc);
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
    warpgroup_wait<1>();
    warpgroup_fence_operand(acc);
    if (kt > 0) {
      release<Config>(smem, done.index());
      ++done;
    }
    ++read;
  }
  issued();
  warpgroup_wait<0>();
  warpgroup_fence_operand(acc);
  release<Config>(smem, done.index());
}

}  // namespace moe_ops::cuda::sm90
