// Few slots sorted by the kernel that is the first to want them, in each of its blocks: a launch of
// its own takes longer than that.
#pragma once

#include "cuda/moe_ffn/stages.h"
#include "cuda/reduce.cuh"
#include "cuda/rows.cuh"

namespace moe_ops::cuda::sm90 {

// An expert and its rows; `expert` is -1: there is none.
struct ExpertRows {
  int expert, begin, end;
};

struct FewSortShared {
  int32_t counts[kFewSortExperts];   // rows of each expert
  uint16_t ids[kFewSortByExpert];    // an expert, or kFewSortExperts: none
  uint16_t slots[kFewSortByExpert];  // of the block's expert, in order
  ExpertRows found;
};

// Finds expert number `ordinal` of those that have rows. All lanes of a warp take part.
__device__ inline ExpertRows find_expert(const int32_t* counts, int num_experts, int ordinal) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  int first_row = 0;  // of the first expert of a round
  for (int base = 0; base < num_experts; base += kWarp) {
    const int rows = base + lane < num_experts ? counts[base + lane] : 0;
    const unsigned has = __ballot_sync(kAllLanes, rows > 0);
    const int begin = first_row + warp_exclusive_sum(rows, lane);
    if (ordinal < __popc(has)) {
      unsigned left = has;
      for (int skip = ordinal; skip > 0; --skip) left &= left - 1;
      const int where = __ffs(static_cast<int>(left)) - 1;
      const int of_expert = __shfl_sync(kAllLanes, begin, where);
      return {base + where, of_expert, of_expert + __shfl_sync(kAllLanes, rows, where)};
    }
    ordinal -= __popc(has);
    first_row = __shfl_sync(kAllLanes, begin + rows, kWarp - 1);
  }
  return {-1, 0, 0};
}

// Sorts the slots; all threads of the block call. Afterwards slots[i] is the slot of the expert's
// row i.
__device__ inline ExpertRows sort_few(const FewSort& p, int num_experts, int ordinal,
                                      FewSortShared& shared) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  for (int e = thread; e < num_experts; e += threads) shared.counts[e] = 0;
  __syncthreads();
  for (int slot = thread; slot < p.num_slots; slot += threads) {
    const int64_t id = index_at(p.ids, slot);
    const bool has = id >= 0 && id < num_experts;
    shared.ids[slot] = static_cast<uint16_t>(has ? id : kFewSortExperts);
    if (has) atomicAdd(shared.counts + id, 1);
  }
  __syncthreads();
  if (thread < kWarp) {
    const ExpertRows found = find_expert(shared.counts, num_experts, ordinal);
    if (thread == 0) shared.found = found;
    int place = 0;
    for (int first = 0; first < p.num_slots; first += kWarp) {
      const int slot = first + thread;
      const bool mine = slot < p.num_slots && shared.ids[slot] == found.expert;
      const unsigned all = __ballot_sync(kAllLanes, mine);
      if (mine) {
        shared.slots[place + __popc(all & lanes_below(thread))] = static_cast<uint16_t>(slot);
      }
      place += __popc(all);
    }
  }
  __syncthreads();
  return shared.found;
}

// Writes the maps that later kernels read. One block of each expert writes where its slots are;
// with `rest`, it also writes the offsets and the slots that have no expert. One warp calls.
__device__ inline void write_maps(const FewSort& p, int num_experts, const ExpertRows& found,
                                  const FewSortShared& shared, bool rest) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int row = found.begin + lane; row < found.end; row += kWarp)
    p.slot_to_row[shared.slots[row - found.begin]] = row;
  if (!rest) return;
  int first_row = 0;
  for (int base = 0; base <= num_experts; base += kWarp) {
    const int rows = base + lane < num_experts ? shared.counts[base + lane] : 0;
    const int begin = first_row + warp_exclusive_sum(rows, lane);
    if (base + lane <= num_experts) p.expert_offsets[base + lane] = begin;
    first_row = __shfl_sync(kAllLanes, begin + rows, kWarp - 1);
  }
  for (int slot = lane; slot < p.num_slots; slot += kWarp)
    if (shared.ids[slot] == kFewSortExperts) p.slot_to_row[slot] = -1;
}

}  // namespace moe_ops::cuda::sm90
