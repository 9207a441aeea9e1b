// Stable counting sort of slots by expert, in two launches, or in one where one block can hold all
// slots. Slots are cut into a chunk a block and a part a warp, both in slot order; warps beyond the
// parts, where there are few slots, only look after buckets:
//   1. count:  how many slots of each bucket a chunk has. Bucket E holds the slots without an
//   expert
//   2. place:  the first row of (bucket, chunk, warp) is a sum of counts; a warp then goes through
//              its part 32 slots at a time, and a slot's rank among its equals is the number of
//              lower lanes with the same bucket
// Atomics only count, so nothing depends on the order of blocks or warps.
#include "cuda/launch.h"
#include "cuda/overlap.cuh"
#include "cuda/reduce.cuh"
#include "moe_ops/sort_by_expert.h"

namespace moe_ops::cuda {

namespace {

constexpr int kMaxWarps = 32;
constexpr int kSlotsPerWarp = 128;   // of a part, at least: four steps
constexpr int64_t kMaxBlocks = 512;  // each reads the counts of all
constexpr int64_t kOneBlockSlots = 4096;
constexpr int64_t kSharedBytes = 47 * 1024;      // of tables; a block has 48 KiB without asking
constexpr int64_t kMaxTable = int64_t{1} << 22;  // counts of all blocks, where E is huge

// Partition of a sort. A table has a count for each part and bucket; it is in shared memory, or for
// more than 12000 experts in the workspace, after the counts.
struct Plan {
  int parts;  // of a block
  int warps;
  bool in_shared;
  int64_t part;  // slots of a part
  int64_t blocks;
  int64_t buckets;  // E + 1

  int64_t chunk() const { return part * parts; }
  int64_t counts() const { return blocks > 1 ? blocks * buckets : 0; }
  int64_t tables() const { return in_shared ? 0 : blocks * parts * buckets; }
};

Plan plan_sort(int64_t num_slots, int64_t num_experts) {
  Plan p;
  p.buckets = num_experts + 1;
  const auto most = static_cast<int64_t>(kSharedBytes / 4 / p.buckets);
  p.in_shared = most >= 1;
  p.parts = 1;
  while (p.parts < kMaxWarps && 2 * p.parts <= most && p.parts * kSlotsPerWarp < num_slots)
    p.parts *= 2;
  // A bucket a thread, so that the first rows are one sum.
  p.warps = p.parts;
  while (p.warps < kMaxWarps && p.warps * kWarp < p.buckets) p.warps *= 2;
  int64_t blocks = kMaxBlocks;
  if (!p.in_shared) blocks = kMaxTable / p.buckets > 1 ? kMaxTable / p.buckets : 1;
  if (num_slots <= kOneBlockSlots) blocks = 1;
  const int64_t part = ceil_div(num_slots, blocks * p.parts);
  p.part = round_up<int64_t>(part > kSlotsPerWarp ? part : kSlotsPerWarp, kWarp);
  p.blocks = num_slots == 0 ? 1 : ceil_div(num_slots, p.chunk());
  return p;
}

struct Args {
  const void* ids;
  int64_t num_slots;
  int32_t num_experts;
  int parts;
  int64_t part;
  int32_t* counts;  // [blocks, E+1]; nullptr: one block
  int32_t* tables;  // [blocks, parts, E+1]; nullptr: in shared memory
  int32_t* expert_offsets;
  int32_t* row_to_slot;
  int32_t* slot_to_row;
};

template <class Id>
__device__ int32_t bucket_of(const Args& a, int64_t slot) {
  const Id id = static_cast<const Id*>(a.ids)[slot];
  return id >= 0 && id < a.num_experts ? static_cast<int32_t>(id) : a.num_experts;
}

// --- 1

template <class Id, bool InShared>
__global__ void count_kernel(const Args a) {
  extern __shared__ int32_t shared_table[];
  await_previous_kernel();
  const int buckets = a.num_experts + 1;
  int32_t* const out = a.counts + static_cast<int64_t>(blockIdx.x) * buckets;
  int32_t* const counts = InShared ? shared_table : out;
  for (int b = threadIdx.x; b < buckets; b += blockDim.x) counts[b] = 0;
  __syncthreads();
  const int64_t begin = blockIdx.x * a.part * a.parts;
  const int64_t end = min(begin + a.part * a.parts, a.num_slots);
  for (int64_t s = begin + threadIdx.x; s < end; s += blockDim.x) {
    atomicAdd(counts + bucket_of<Id>(a, s), 1);
  }
  if constexpr (InShared) {
    __syncthreads();
    for (int b = threadIdx.x; b < buckets; b += blockDim.x) out[b] = counts[b];
  }
}

// --- 2

// Returns the sum of `v` over lower threads, and sets `total` to the sum over all threads. `sums`
// has kMaxWarps entries.
__device__ int32_t block_exclusive_sum(int32_t v, int32_t* sums, int32_t& total) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int32_t below = warp_exclusive_sum(v, lane);
  if (lane == kWarp - 1) sums[warp] = below + v;
  __syncthreads();
  const int32_t of_warp = lane < warps ? sums[lane] : 0;
  total = warp_sum(of_warp);
  const int32_t before = __shfl_sync(kAllLanes, warp_exclusive_sum(of_warp, lane), warp);
  __syncthreads();
  return before + below;
}

// Converts the counts of this block's parts to the first row of each (part, bucket).
__device__ void find_first_rows(const Args& a, int32_t* table, int32_t* sums) {
  const int buckets = a.num_experts + 1;
  int32_t start = 0;  // of the first bucket of the round
  for (int first = 0; first < buckets; first += blockDim.x) {
    const int b = first + threadIdx.x;
    int32_t before = 0, all = 0;  // slots of bucket b in the chunks before this one, and in all
    if (b < buckets) {
      if (a.counts == nullptr) {
        for (int w = 0; w < a.parts; ++w) all += table[w * buckets + b];
      } else {
#pragma unroll 8
        for (int c = 0; c < static_cast<int>(gridDim.x); ++c) {
          const int32_t n = a.counts[static_cast<int64_t>(c) * buckets + b];
          all += n;
          before += c < static_cast<int>(blockIdx.x) ? n : 0;
        }
      }
    }
    int32_t total;
    const int32_t begin = start + block_exclusive_sum(all, sums, total);
    start += total;
    if (b < buckets) {
      if (blockIdx.x == 0) a.expert_offsets[b] = begin;
      int32_t row = begin + before;
      for (int w = 0; w < a.parts; ++w) {
        const int32_t n = table[w * buckets + b];
        table[w * buckets + b] = row;
        row += n;
      }
    }
  }
}

template <class Id, bool InShared>
__global__ void place_kernel(const Args a) {
  extern __shared__ int32_t shared_table[];
  __shared__ int32_t sums[kMaxWarps];
  await_previous_kernel();
  const int lane = threadIdx.x % kWarp, part = threadIdx.x / kWarp;
  const int buckets = a.num_experts + 1;
  int32_t* const table =
      InShared ? shared_table : a.tables + static_cast<int64_t>(blockIdx.x) * a.parts * buckets;
  for (int i = threadIdx.x; i < a.parts * buckets; i += blockDim.x) table[i] = 0;
  __syncthreads();

  int32_t* const next = table + part * buckets;  // the row that the next slot of a bucket takes
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * a.parts + part) * a.part;
  const int64_t end = part < a.parts ? min(begin + a.part, a.num_slots) : begin;
  for (int64_t s = begin + lane; s < end; s += kWarp) atomicAdd(next + bucket_of<Id>(a, s), 1);
  __syncthreads();
  find_first_rows(a, table, sums);
  __syncthreads();

  for (int64_t first = begin; first < end; first += kWarp) {
    const int64_t s = first + lane;
    const int32_t bucket = s < end ? bucket_of<Id>(a, s) : -1;
    const unsigned equals = __match_any_sync(kAllLanes, bucket);
    const unsigned rank = __popc(equals & lanes_below(lane));
    const int32_t row = bucket >= 0 ? next[bucket] + static_cast<int32_t>(rank) : 0;
    __syncwarp();  // all have read `next` before one of them moves it on
    if (bucket >= 0) {
      if (rank == 0) next[bucket] = row + __popc(equals);
      a.row_to_slot[row] = static_cast<int32_t>(s);
      a.slot_to_row[s] = row;
    }
    __syncwarp();
  }
}

template <class Id, bool InShared>
Status launch(const Args& a, const Plan& plan, Stream stream) {
  const auto grid = static_cast<unsigned>(plan.blocks);
  const unsigned block = plan.warps * kWarp;
  const size_t table = InShared ? plan.buckets * sizeof(int32_t) : 0;
  Launch at{grid, block, stream, table};
  at.overlaps = true;
  if (plan.blocks > 1) MOE_TRY((launch_kernel<count_kernel<Id, InShared>>(at, a)));
  at.shared_bytes = table * plan.parts;
  return launch_kernel<place_kernel<Id, InShared>>(at, a);
}

}  // namespace

int64_t sort_by_expert_workspace(int64_t num_slots, int64_t num_experts) {
  const Plan plan = plan_sort(num_slots, num_experts);
  return (plan.counts() + plan.tables()) * static_cast<int64_t>(sizeof(int32_t));
}

Status sort_by_expert(const SortByExpertParams& p, Stream stream) {
  const Routing& r = p.routing;
  const Plan plan = plan_sort(r.num_slots(), r.num_experts);
  Args a;
  a.ids = r.topk_ids.data;
  a.num_slots = r.num_slots();
  a.num_experts = static_cast<int32_t>(r.num_experts);
  a.parts = plan.parts;
  a.part = plan.part;
  auto* const workspace = static_cast<int32_t*>(p.workspace);
  a.counts = plan.blocks > 1 ? workspace : nullptr;
  a.tables = plan.in_shared ? nullptr : workspace + plan.counts();
  a.expert_offsets = p.expert_offsets;
  a.row_to_slot = p.row_to_slot;
  a.slot_to_row = p.slot_to_row;
  if (r.topk_ids.is_64) {
    return plan.in_shared ? launch<int64_t, true>(a, plan, stream)
                          : launch<int64_t, false>(a, plan, stream);
  }
  return plan.in_shared ? launch<int32_t, true>(a, plan, stream)
                        : launch<int32_t, false>(a, plan, stream);
}

}  // namespace moe_ops::cuda
