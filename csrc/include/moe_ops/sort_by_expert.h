// sort_by_expert: slots sorted by expert, stable; slots without an expert go to the tail.
#pragma once

#include <cstdint>

#include "moe_ops/common.h"
#include "moe_ops/routing.h"

namespace moe_ops {

struct SortByExpertParams {
  Routing routing;          // with topk_ids; N below 2^31
  int32_t* expert_offsets;  // [E+1] out
  int32_t* row_to_slot;     // [N] out
  int32_t* slot_to_row;     // [N] out, the inverse
  void* workspace;          // CUDA: sort_by_expert_workspace bytes, aligned to 4; nullptr if that is 0
};

namespace cpu {
void sort_by_expert(const SortByExpertParams& p);
}  // namespace cpu

namespace cuda {
// Bytes; 0 for few slots.
int64_t sort_by_expert_workspace(int64_t num_slots, int64_t num_experts);
Status sort_by_expert(const SortByExpertParams& p, Stream stream);
}  // namespace cuda

}  // namespace moe_ops
