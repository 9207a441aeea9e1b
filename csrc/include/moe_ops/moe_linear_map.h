// moe_linear_map where experts are narrow: blocks of tokens at once, without sorting all slots.
// Everything else of it is grouped_gemm with row indices, and unpermute.
#pragma once

#include <cstdint>

#include "moe_ops/common.h"
#include "moe_ops/grouped_gemm.h"

namespace moe_ops {

// The routing of moe_linear_map and moe_linear_reduce, and the sizes of their matrices.
struct SlotProduct {
  int64_t num_tokens;   // T
  int64_t top_k;        // K
  int64_t num_experts;  // E
  int64_t rows, cols;   // of a matrix: [O, H] of map, [H, D] of reduce
  const int32_t* ids;   // [T, K], -1: no expert
};

struct MoeLinearMapParams {
  SlotProduct s;
  Rows x;              // [T, H]
  ExpertMatrices w;    // [E, O, H]
  ExpertVectors bias;  // [E, O] or none
  void* h;             // [T, K, O] contiguous, x's type
};

struct MoeLinearMapBwdParams {
  SlotProduct s;
  const void* grad_h;  // [T, K, O] contiguous, x's type
  Rows x;
  ExpertMatrices w;
  void *grad_x, *grad_w;  // [T, H], [E, O, H] contiguous, x's type; nullptr: not wanted
  void* grad_bias;        // [E, O] contiguous; nullptr: not wanted
};

namespace cpu {
// Whether the functions below take a product of operands of this type, and are the faster way.
bool takes_slot_product(const SlotProduct& s, DType type);

void moe_linear_map(const MoeLinearMapParams& p, const Parallel& par);
void moe_linear_map_bwd(const MoeLinearMapBwdParams& p, const Parallel& par);
}  // namespace cpu

}  // namespace moe_ops
