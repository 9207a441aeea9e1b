// sort_slots: slots sorted by expert, stable; slots without an expert go to the tail.
#pragma once

#include <cstdint>

#include "moe_ops/common.h"

namespace moe_ops {

struct SortSlotsParams {
  const int32_t* topk_ids;  // [N]; -1 where there is no expert, never out of range otherwise
  int64_t num_slots;        // N, below 2^31
  int64_t num_experts;      // E
  int32_t* expert_offsets;  // [E+1] out
  int32_t* row_to_slot;     // [N] out
  int32_t* slot_to_row;     // [N] out, the inverse; may be where topk_ids are
};

namespace cpu {
void sort_slots(const SortSlotsParams& p);
}  // namespace cpu

}  // namespace moe_ops
