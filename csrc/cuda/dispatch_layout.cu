// Three steps: the rank of each slot, or none where an earlier slot of the token goes there; a sort
// of slots by rank; what each row finds on its rank, a thread an expert.
#include <algorithm>

#include "cuda/launch.h"
#include "cuda/overlap.cuh"
#include "cuda/rows.cuh"
#include "moe_ops/dispatch_layout.h"
#include "moe_ops/sort_by_expert.h"

namespace moe_ops::cuda {

namespace {

constexpr int kThreads = 256;

struct Args {
  IndexMap topk_ids, physical;
  int64_t num_slots, num_rows, top_k, num_ids, num_ranks, experts_per_rank;
  int32_t* ranks;              // [N]
  const int32_t* row_to_slot;  // [N]
  const int32_t* rank_offsets;
  int32_t *row_to_token, *slot_to_row, *local_ids;
};

__device__ __forceinline__ int64_t thread_index() {
  return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}

// Returns the expert of a slot if a rank has it, else -1.
__device__ __forceinline__ int64_t expert_of(const Args& a, int64_t slot) {
  int64_t id = index_at(a.topk_ids, slot);
  if (id < 0 || id >= a.num_ids) return -1;
  if (a.physical.data != nullptr) id = index_at(a.physical, id);
  return id >= 0 && id < a.num_ranks * a.experts_per_rank ? id : -1;
}

__global__ void rank_kernel(const Args a) {
  await_previous_kernel();
  const int64_t slot = thread_index();
  if (slot >= a.num_slots) return;
  const int64_t expert = expert_of(a, slot);
  int64_t rank = expert < 0 ? -1 : expert / a.experts_per_rank;
  const int64_t first = rank * a.experts_per_rank;
  for (int64_t s = slot - slot % a.top_k; s < slot && rank >= 0; ++s) {
    const int64_t other = expert_of(a, s) - first;
    if (other >= 0 && other < a.experts_per_rank) rank = -1;
  }
  a.ranks[slot] = static_cast<int32_t>(rank);
}

__global__ void rows_kernel(const Args a) {
  await_previous_kernel();
  const int64_t i = thread_index(), rows = a.rank_offsets[a.num_ranks];
  // The sort gave rows of the tail to slots that go nowhere.
  if (i < a.num_slots && a.slot_to_row[i] >= rows) a.slot_to_row[i] = -1;
  const int64_t row = i / a.top_k, k = i % a.top_k;
  if (row >= a.num_rows) return;
  int64_t token = -1, local = -1;
  if (row < rows) {
    const int64_t slot = a.row_to_slot[row];
    token = slot / a.top_k;
    local = expert_of(a, token * a.top_k + k) - a.ranks[slot] * a.experts_per_rank;
    if (local >= a.experts_per_rank) local = -1;
  }
  if (k == 0) a.row_to_token[row] = static_cast<int32_t>(token);
  a.local_ids[i] = static_cast<int32_t>(local < 0 ? -1 : local);
}

Launch launch_of(int64_t threads, Stream stream) {
  Launch at{static_cast<unsigned>(ceil_div<int64_t>(threads, kThreads)), kThreads, stream};
  at.overlaps = true;
  return at;
}

}  // namespace

int64_t dispatch_layout_workspace(const DispatchLayoutParams& p) {
  const int64_t N = p.num_slots();
  return 2 * N * static_cast<int64_t>(sizeof(int32_t)) + sort_by_expert_workspace(N, p.num_ranks);
}

Status dispatch_layout(const DispatchLayoutParams& p, Stream stream) {
  const int64_t N = p.num_slots();
  auto* const workspace = static_cast<int32_t*>(p.workspace);
  int32_t* const row_to_slot = workspace + N;
  const Args a{
      p.topk_ids,    p.physical,         N,         p.num_rows(), p.top_k,        p.num_ids,
      p.num_ranks,   p.experts_per_rank, workspace, row_to_slot,  p.rank_offsets, p.row_to_token,
      p.slot_to_row, p.local_ids};
  if (N > 0) MOE_TRY(launch_kernel<rank_kernel>(launch_of(N, stream), a));
  SortByExpertParams sort{};
  sort.routing.num_tokens = p.num_tokens;
  sort.routing.top_k = p.top_k;
  sort.routing.num_experts = p.num_ranks;
  sort.routing.topk_ids = {workspace, false};
  sort.expert_offsets = p.rank_offsets;
  sort.row_to_slot = row_to_slot;
  sort.slot_to_row = p.slot_to_row;
  sort.workspace = workspace + 2 * N;
  MOE_TRY(sort_by_expert(sort, stream));
  if (N == 0) return 0;
  return launch_kernel<rows_kernel>(launch_of(std::max(N, p.num_rows() * p.top_k), stream), a);
}

}  // namespace moe_ops::cuda
