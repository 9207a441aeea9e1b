// Producers that gather: operands whose rows lie anywhere, copied with cp.async by the four warps
// of the producer. The swizzle that TMA would apply is written by hand: piece c (16 bytes) of line
// r of a 1024-byte block lies at piece c ^ (r % 8).
#pragma once

#include <cutlass/arch/memory_sm80.h>
#include <cutlass/fast_math.h>

#include "cuda/grouped_gemm/sm90_mainloop.cuh"

namespace moe_ops::cuda::sm90 {

// Rows that kGather copies: row r of the product is row index[r] / divisor of data, zeros if that
// is outside [0, limit).
struct GatherRows {
  const void* data;
  int64_t stride;  // elements
  int limit;
  const int32_t* index;
  cutlass::FastDivmod divisor;  // at least 1
};

// Returns the source row of an entry of the index, or -1.
__device__ inline int source_row(const GatherRows& g, int entry) {
  const int source = g.divisor.divide(entry);
  return entry >= 0 && source < g.limit ? source : -1;
}

constexpr int kPieces = kSwizzleBytes / 16;       // of a line
constexpr int kCopyLines = kWarpgroup / kPieces;  // lines that the producer copies at once
// The place of a thread's piece within a line is the same for all of its lines.
static_assert(kCopyLines % 8 == 0);

// Waits for the thread's own copies, without which it must not exit.
__device__ __forceinline__ void finish_copies() { cutlass::arch::cp_async_wait<0>(); }

// Gathers A for ragged M: a thread's rows do not change over the sum. Thread 0 also loads B.
template <class Config, class Params>
__device__ inline void produce_gather(const Params& p, typename Traits<Config>::SharedStorage& smem,
                                      int first, int step, int cluster_rank) {
  using T = Traits<Config>;
  using Element = typename Config::Element;
  constexpr int kPiece = 16 / static_cast<int>(sizeof(Element));
  constexpr int kRows = T::kM / kCopyLines;
  auto write = cutlass::PipelineState<T::kStages>{0, 1, 0};
  const int piece = threadIdx.x % kPieces;
  const int row = threadIdx.x / kPieces;
  const int place = row * T::kSpan + (piece ^ (row % 8)) * kPiece;
  Scheduler<Config> scheduler(p.problem, smem);
  Tile tile;
  for (int index = first; scheduler.get(index, cluster_rank, tile); index += step) {
    // Rows, not pointers to them: there are 40 registers.
    int source[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int r = tile.row0 + row + i * kCopyLines;
      source[i] = r < tile.row_end && tile.k_tiles > 0
                      ? source_row(p.gather, __ldg(p.gather.index + r))
                      : -1;
    }
#pragma unroll 1
    for (int kt = 0; kt < tile.k_tiles; ++kt, ++write) {
      const int s = write.index();
      smem.empty[s].wait(write.phase());
      auto* full = reinterpret_cast<uint64_t*>(&smem.full[s]);
      if (threadIdx.x == 0) {
        smem.full[s].arrive_and_expect_tx(T::kStageBytesB);
        with_major_b<Config>(p, [&](auto major) {
          load_b<Config, major.value>(&p.map_b, full, smem.b + s * T::kN * T::kK, tile, kt,
                                      p.split_offset, cluster_rank);
        });
      }
      Element* to = smem.a + s * T::kM * T::kK + place;
#pragma unroll
      for (int span = 0; span < T::kK / T::kSpan; ++span) {
        const int k = kt * T::kK + span * T::kSpan + piece * kPiece;
        const auto* from = static_cast<const Element*>(p.gather.data) + k;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const bool copy = k < p.problem.k && source[i] >= 0;
          const void* at = copy ? from + source[i] * p.gather.stride : p.gather.data;
          cutlass::arch::cp_async_zfill<16, cutlass::arch::CacheOperation::Global>(
              to + (span * T::kM + i * kCopyLines) * T::kSpan, at, copy);
        }
      }
      cutlass::arch::cpasync_barrier_arrive_noinc(full);
    }
  }
  finish_copies();
  if (T::kCluster > 1 && threadIdx.x == 0) {
    for (int i = 0; i < T::kStages; ++i, ++write) smem.empty[write.index()].wait(write.phase());
  }
}

// Ragged K: a thread's lines are other rows of the product in every stage. The index of a stage is
// read while the stage before is copied, and not looked at until its own copies: none waits for it.
template <class Config>
struct LineGather {
  using T = Traits<Config>;
  using Element = typename Config::Element;
  static constexpr int kPiece = 16 / static_cast<int>(sizeof(Element));
  static constexpr int kLines = T::kK / kCopyLines;

  const GatherRows& rows;
  int entry[kLines];

  // Reads the index of the stage that begins with row k of the product; `end` is the end of the
  // expert's rows.
  __device__ void read(int k, int end) {
#pragma unroll
    for (int i = 0; i < kLines; ++i) entry[i] = entry_of_line(i, k, end);
  }

  // Copies `width` columns from `col` on; the source has `cols`. Reads the index of the stage that
  // begins with row `next`.
  template <int width>
  __device__ void copy(Element* smem, int col, int cols, int next, int end) {
    const int piece = threadIdx.x % kPieces, line = threadIdx.x / kPieces;
    Element* to = smem + line * T::kSpan + (piece ^ (line % 8)) * kPiece;
#pragma unroll
    for (int i = 0; i < kLines; ++i) {
      const int source = source_row(rows, entry[i]);
      entry[i] = entry_of_line(i, next, end);
      const auto* from = static_cast<const Element*>(rows.data) + source * rows.stride;
#pragma unroll
      for (int span = 0; span < width / T::kSpan; ++span) {
        const int c = col + span * T::kSpan + piece * kPiece;
        const bool valid = source >= 0 && c < cols;
        cutlass::arch::cp_async_zfill<16, cutlass::arch::CacheOperation::Global>(
            to + (span * T::kK + i * kCopyLines) * T::kSpan, valid ? from + c : rows.data, valid);
      }
    }
  }

 private:
  __device__ int entry_of_line(int i, int k, int end) const {
    const int r = k + threadIdx.x / kPieces + i * kCopyLines;
    return r < end ? __ldg(rows.index + r) : -1;
  }
};

template <class Config, class Params>
__device__ inline void produce_gather_lines(const Params& p,
                                            typename Traits<Config>::SharedStorage& smem, int first,
                                            int step, int cluster_rank) {
  using T = Traits<Config>;
  auto write = cutlass::PipelineState<T::kStages>{0, 1, 0};
  LineGather<Config> a{p.gather, {}}, b{p.gather_b, {}};
  Scheduler<Config> scheduler(p.problem, smem);
  Tile tile;
  for (int index = first; scheduler.get(index, cluster_rank, tile); index += step) {
    const int end = tile.k0 + tile.k_size;
    if constexpr (T::kGatherA) a.read(tile.k0, end);
    if constexpr (T::kGatherB) b.read(tile.k0, end);
    // tile.k0 is the first row of a stage. Counted so, as registers are scarce.
#pragma unroll 1
    for (; tile.k0 < end; tile.k0 += T::kK, ++write) {
      const int s = write.index();
      auto* smem_a = smem.a + s * T::kM * T::kK;
      auto* smem_b = smem.b + s * T::kN * T::kK;
      smem.empty[s].wait(write.phase());
      auto* full = reinterpret_cast<uint64_t*>(&smem.full[s]);
      if (threadIdx.x == 0) {
        constexpr int kBytes =
            (T::kGatherA ? 0 : T::kStageBytesA) + (T::kGatherB ? 0 : T::kStageBytesB);
        if constexpr (kBytes == 0) {
          smem.full[s].arrive();
        } else {
          smem.full[s].arrive_and_expect_tx(kBytes);
          if constexpr (!T::kGatherA) load_a<Config>(&p.map_a, full, smem_a, tile, 0, 0);
          if constexpr (!T::kGatherB)
            load_b<Config>(&p.map_b, full, smem_b, tile, 0, 0, cluster_rank);
        }
      }
      const int next = tile.k0 + T::kK;
      if constexpr (T::kGatherA) a.template copy<T::kM>(smem_a, tile.row0, p.problem.m, next, end);
      if constexpr (T::kGatherB) {
        // With both gathered a branch, always taken: the compiler moves no code across it, and the
        // addresses of both at once would not fit the registers.
        if (!T::kGatherA || tile.col0 < p.problem.n)
          b.template copy<T::kN>(smem_b, tile.col0, p.problem.n, next, end);
      }
      cutlass::arch::cpasync_barrier_arrive_noinc(full);
    }
  }
  finish_copies();
  if (T::kCluster > 1 && threadIdx.x == 0) {
    for (int i = 0; i < T::kStages; ++i, ++write) smem.empty[write.index()].wait(write.phase());
  }
}

}  // namespace moe_ops::cuda::sm90
