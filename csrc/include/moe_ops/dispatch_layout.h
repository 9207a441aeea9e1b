// dispatch_layout: which rank each token goes to, once a rank, and what it finds there. Experts are
// spread over ranks in order: expert e is number e % experts_per_rank of rank e / experts_per_rank.
#pragma once

#include <algorithm>
#include <cstdint>

#include "moe_ops/common.h"

namespace moe_ops {

struct DispatchLayoutParams {
  int64_t num_tokens, top_k;            // T, K; T * K below 2^31
  int64_t num_ranks, experts_per_rank;  // n, E / n; their product below 2^31
  IndexMap topk_ids;                    // [T, K]
  // [num_ids] or no data: the expert, of those that ranks have, that an id stands for. An id or an
  // expert out of range is nowhere.
  IndexMap physical;
  int64_t num_ids;
  // Outputs. Rows are sorted by rank, then by token; those from rank_offsets[n] on hold -1.
  int32_t* rank_offsets;      // [n+1]
  int32_t* row_to_token;      // [R]
  int32_t* slot_to_row;       // [T, K]; -1: nowhere, or a rank that an earlier slot goes to
  int32_t* local_ids;         // [R, K]: numbers on the row's rank, -1 for experts of others
  void* workspace = nullptr;  // CUDA: dispatch_layout_workspace bytes, aligned to 4

  int64_t num_slots() const { return num_tokens * top_k; }
  int64_t num_rows() const { return num_tokens * std::min(top_k, num_ranks); }  // R
};

namespace cpu {
void dispatch_layout(const DispatchLayoutParams& p, const Parallel& par);
}  // namespace cpu

namespace cuda {
int64_t dispatch_layout_workspace(const DispatchLayoutParams& p);  // bytes
Status dispatch_layout(const DispatchLayoutParams& p, Stream stream);
}  // namespace cuda

}  // namespace moe_ops
