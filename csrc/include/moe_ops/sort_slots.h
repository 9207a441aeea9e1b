// sort_slots: slots sorted by expert, stable; slots without an expert go to the tail.
#pragma once

#include <cstdint>

#include "moe_ops/common.h"
#include "moe_ops/routing.h"

namespace moe_ops {

struct SortSlotsParams {
  Routing routing;          // with topk_ids; N below 2^31
  int32_t* expert_offsets;  // [E+1] out
  int32_t* row_to_slot;     // [N] out
  int32_t* slot_to_row;     // [N] out, the inverse
  void* workspace;          // CUDA: sort_slots_workspace bytes, aligned to 4; nullptr if that is 0
};

namespace cpu {
void sort_slots(const SortSlotsParams& p);
}  // namespace cpu

namespace cuda {
// Bytes; 0 for few slots.
int64_t sort_slots_workspace(int64_t num_slots, int64_t num_experts);
Status sort_slots(const SortSlotsParams& p, Stream stream);
}  // namespace cuda

}  // namespace moe_ops
