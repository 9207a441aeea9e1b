// The last step of moe_linear_reduce's backward, after u = W^T grad_y by rows: gradients of h and
// of the routing weights. Everything else of moe_linear_map and moe_linear_reduce is grouped_gemm
// with row indices, and unpermute.
#pragma once

#include <cstdint>

#include "moe_ops/common.h"
#include "moe_ops/grouped_gemm.h"

namespace moe_ops {

struct MoeLinearReduceBwdParams {
  const int64_t* expert_offsets;  // [E+1]
  int64_t num_experts;            // E
  int64_t in_features;            // D
  int64_t hidden_size;            // H
  const void* u;                  // [rows, D] contiguous, accumulate type
  Rows h;                         // [N, D] by slot, index = row_to_slot
  Rows grad_y;                    // [T, H], index = token of each row
  ExpertVectors bias;             // [E, H] or none
  const void* row_weights;        // [rows], accumulate type
  const int32_t* row_to_slot;     // [N]
  void* grad_h;                   // [N, D] contiguous by slot, h's type; nullptr: not wanted
  void* grad_topk_weights;        // [N] accumulate type; nullptr: not wanted
};

namespace cpu {
void moe_linear_reduce_bwd(const MoeLinearReduceBwdParams& p, const Parallel& par);
}  // namespace cpu

}  // namespace moe_ops
