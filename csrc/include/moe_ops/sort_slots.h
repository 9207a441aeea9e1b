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

namespace cuda {

struct SortSlotsParams {
  const void* topk_ids;  // [N] contiguous; a value outside [0, E) is no expert
  bool ids_are_int64;    // otherwise int32
  int64_t num_slots;     // N, below 2^31
  int64_t num_experts;   // E
  int32_t* expert_offsets;
  int32_t* row_to_slot;
  int32_t* slot_to_row;
  void* workspace;  // sort_slots_workspace bytes, aligned to 4; nullptr where that is 0
};

// Bytes; 0 for few slots.
int64_t sort_slots_workspace(int64_t num_slots, int64_t num_experts);
Status sort_slots(const SortSlotsParams& p, Stream stream);

}  // namespace cuda

}  // namespace moe_ops
