// The routing of a call: the experts that each token chose, and the order of rows that follows from
// it. Every op has it in this form, on the CPU and on CUDA.
#pragma once

#include <cstdint>

#include "moe_ops/common.h"

namespace moe_ops {

// N = T * K slots; slot t * K + k is the k-th expert selected for token t. Rows are slots sorted by
// expert, in the order of slots within an expert. Rows expert_offsets[e] to expert_offsets[e + 1]
// are those of expert e; rows from expert_offsets[E] on are of slots without an expert.
//
// An op that sorts for itself gets topk_ids, one whose caller has sorted gets the maps. On CUDA all
// pointers are to device memory, and kernels clamp or skip values that are out of range.
struct Routing {
  int64_t num_tokens = 0;                   // T
  int64_t top_k = 0;                        // K
  int64_t num_experts = 0;                  // E
  IndexMap topk_ids;                        // [T, K]; a value outside [0, E) is no expert
  const int32_t* expert_offsets = nullptr;  // [E+1], from 0, never falling
  const int32_t* row_to_slot = nullptr;     // [N]
  const int32_t* slot_to_row = nullptr;     // [T, K], the inverse

  constexpr int64_t num_slots() const { return num_tokens * top_k; }
  bool sorted() const { return expert_offsets != nullptr; }
  // Returns the number of rows that have an expert. It reads expert_offsets, so it is for the CPU
  // only.
  int64_t num_valid_rows() const { return expert_offsets[num_experts]; }
};

}  // namespace moe_ops
