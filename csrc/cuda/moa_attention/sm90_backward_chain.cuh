// Ordered accumulation: the blocks of a head add to the same tile of rows in the order of keys.
//
// A warp of a block reads the sums that the same warp of the previous block wrote, and writes them
// for the next block. No other warp accesses these sums, so one flag per warp suffices for
// synchronization.
#pragma once

#include "cuda/moa_attention/backward.h"
#include "cuda/moa_attention/problem.cuh"
#include "cuda/moa_attention/scores.cuh"

namespace moe_ops::cuda::attention::sm90 {

// A tile of 64 rows that a block walks over, as its producer tells the consumers.
struct Step {
  int tile;         // of the band; below 0: there are no more
  int first, last;  // tiles of 64 keys that matter to the rows
  int whole;        // there are 64 rows, and they see all keys of the block
};

// Key block that a block of threads processes.
struct KeyBlock {
  int item;          // batch and head
  int block;         // of 128 keys
  int64_t row_zero;  // row_index of the head's first row

  KeyBlock() = default;
  __device__ KeyBlock(const MoaAttentionParams& p, int index) {
    const int heads = static_cast<int>(p.batch * p.num_heads);
    item = index % heads;
    block = index / heads;
    row_zero = row_index(p, Head(p, item), 0);
  }
  __device__ int64_t row(const MoaAttentionParams& p, int r) const {
    return row_zero + r * p.num_heads;
  }
};

// A consumer's thread, asked for where it is wanted: what is made of it is not kept in registers of
// the loop around it.
struct Consumer {
  int index;  // 0 to 255
  __device__ Consumer() {
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    index -= 128;
  }
  __device__ int lane() const { return index % kWarp; }
  __device__ int warp() const { return index / kWarp; }
  // Returns the first row of the thread's fragment, of 64; the other one is eight further.
  __device__ int line() const { return warp() % 4 * 16 + lane() / 4; }
};

__device__ __forceinline__ void wait_for(const int* flag, int value) {
  int found;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(found) : "l"(flag) : "memory");
  } while (found < value);
}
// Raises a flag: a waiter that sees it also sees what the warp has written.
__device__ __forceinline__ void raise(int* flag, int value) {
  __syncwarp();
  if (threadIdx.x % kWarp == 0) {
    asm volatile("st.release.gpu.global.s32 [%0], %1;" : : "l"(flag), "r"(value) : "memory");
  }
}

// A place in the chain of a tile of rows.
struct Link {
  int tile;    // of all heads
  int before;  // blocks that add to it before this one
  bool last;

  __device__ Link(const BackwardLaunch& launch, const KeyBlock& at, const Step& step)
      : tile(at.item * launch.band_tiles + step.tile),
        before(at.block - step.first / 2),
        last(step.last <= 2 * (at.block + 1)) {}
};

// ---- Parts of grad_q: warp 0 to 7 of the consumers ----

template <int kTiles>
__device__ float4* part_of(const Chain& chain, const Link& link, int warp) {
  return reinterpret_cast<float4*>(chain.parts) +
         ((int64_t{link.tile} * Chain::kWarps + warp) * kTiles * kWarp + threadIdx.x % kWarp);
}
template <int kTiles>
__device__ void take_part(const Chain& chain, const Link& link, int warp,
                          Fragment<float, kTiles>& f) {
  if (link.before == 0) {
    f.clear();
    return;
  }
  wait_for(chain.parts_done + int64_t{link.tile} * Chain::kWarps + warp, link.before);
  const float4* part = part_of<kTiles>(chain, link, warp);
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const float4 v = __ldcg(part + j * kWarp);
    f.v[j][0] = v.x;
    f.v[j][1] = v.y;
    f.v[j][2] = v.z;
    f.v[j][3] = v.w;
  }
}
template <int kTiles>
__device__ void leave_part(const Chain& chain, const Link& link, int warp,
                           const Fragment<float, kTiles>& f) {
  float4* part = part_of<kTiles>(chain, link, warp);
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    __stcg(part + j * kWarp, make_float4(f.v[j][0], f.v[j][1], f.v[j][2], f.v[j][3]));
  }
  raise(chain.parts_done + int64_t{link.tile} * Chain::kWarps + warp, link.before + 1);
}

// ---- Stick-breaking: sums of weight times gradient over the keys before, a number a row ----

// Reads the sums of the block before. `line`: the thread's first row in the tile; the other one is
// eight lines further.
__device__ inline void take_sums(const BackwardLaunch& launch, const Chain& chain, const Link& link,
                                 const KeyBlock& at, const Step& step, int line,
                                 float (&before)[2]) {
  const MoaAttentionParams& p = launch.b.fwd;
  if (link.before > 0) wait_for(chain.sums_done + int64_t{link.tile} * 4 + line / 16, link.before);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (link.before > 0) {
      before[i] = __ldcg(chain.sums + int64_t{link.tile} * 64 + line + 8 * i);
      continue;
    }
    // The remainder of a stick is before all keys.
    const int r = (launch.band + step.tile) * 64 + line + 8 * i;
    before[i] = 0;
    if (r >= num_rows(p)) continue;
    const int64_t index = at.row(p, r);
    before[i] = static_cast<const float*>(p.state)[index] *
                static_cast<const float*>(launch.b.grad_state)[index];
  }
}
__device__ inline void leave_sums(const Chain& chain, const Link& link, int line,
                                  const float (&before)[2], const float (&total)[2]) {
  if (threadIdx.x % 4 == 0) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      __stcg(chain.sums + int64_t{link.tile} * 64 + line + 8 * i, before[i] + total[i]);
    }
  }
  raise(chain.sums_done + int64_t{link.tile} * 4 + line / 16, link.before + 1);
}

// Prepares a band: resets its flags and finds the keys that its rows see. Rows that see no key get
// a gradient of zero here, as no block processes them.
template <bool kSoftmax>
__global__ void __launch_bounds__(128)
    moa_attention_sm90_chain_kernel(const __grid_constant__ BackwardLaunch launch,
                                    const __grid_constant__ Chain chain) {
  const MoaAttentionParams& p = launch.b.fwd;
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i == 0) *chain.next_item = 0;
  if (i >= p.batch * p.num_heads * launch.band_tiles) return;
  for (int w = 0; w < Chain::kWarps; ++w) chain.parts_done[i * Chain::kWarps + w] = 0;
  for (int w = 0; w < 4; ++w) chain.sums_done[i * 4 + w] = 0;
  const int row0 = (launch.band + static_cast<int>(i % launch.band_tiles)) * 64;
  const int row_end = min(row0 + 64, num_rows(p));
  int first = 0, last = 0;
  if (row0 < row_end) {
    const int first_key = keys_of_row(p, row0).first, last_key = keys_of_row(p, row_end - 1).last;
    if (last_key > first_key) {
      first = kSoftmax ? first_key / 64 : launch.first_tile[i];
      last = (last_key + 63) / 64;
    }
  }
  chain.ranges[2 * i] = first;
  chain.ranges[2 * i + 1] = last;
  if (last > first) return;
  const Head head(p, i / launch.band_tiles);
  const int64_t chunks = p.head_size / 8;  // of 16 bytes
  auto* grad_q = static_cast<uint4*>(launch.b.grad_q);
  for (int r = row0; r < row_end; ++r) {
    uint4* row = grad_q + row_index(p, head, r) * chunks;
    for (int c = 0; c < chunks; ++c) row[c] = make_uint4(0, 0, 0, 0);
  }
}

}  // namespace moe_ops::cuda::attention::sm90
