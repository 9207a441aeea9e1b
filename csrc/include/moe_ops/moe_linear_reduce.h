// moe_linear_reduce where experts are narrow, in blocks of tokens (moe_linear_map.h); and the last
// step of its backward elsewhere, after u = W^T grad_y by rows: gradients of h and of the routing
// weights. Everything else of it is grouped_gemm with row indices, and unpermute.
#pragma once

#include <cstdint>

#include "moe_ops/common.h"
#include "moe_ops/grouped_gemm.h"
#include "moe_ops/moe_linear_map.h"

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

// s.rows is H, s.cols D.
struct MoeLinearReduceParams {
  SlotProduct s;
  const void* h;             // [T, K, D] contiguous
  ExpertMatrices w;          // [E, H, D]
  ExpertVectors bias;        // [E, H] or none
  const void* topk_weights;  // [T, K] accumulate type
  void* y;                   // [T, H] contiguous, h's type
};

struct MoeLinearReduceBlocksBwdParams {
  SlotProduct s;
  Rows grad_y;    // [T, H]
  const void* h;  // [T, K, D] contiguous
  ExpertMatrices w;
  ExpertVectors bias;
  const void* topk_weights;
  void *grad_h, *grad_w;    // [T, K, D], [E, H, D] contiguous, h's type; nullptr: not wanted
  void* grad_topk_weights;  // [T, K] accumulate type; nullptr: not wanted
  void* grad_bias;          // [E, H] contiguous, h's type; nullptr: not wanted
};

namespace cpu {
void moe_linear_reduce_bwd(const MoeLinearReduceBwdParams& p, const Parallel& par);

void moe_linear_reduce(const MoeLinearReduceParams& p, const Parallel& par);
void moe_linear_reduce_bwd(const MoeLinearReduceBlocksBwdParams& p, const Parallel& par);
}  // namespace cpu

namespace cuda {

// u, h, grad_y and bias have one type. Slots without an expert get zeros.
struct MoeLinearReduceBwdParams {
  const int32_t* expert_offsets;  // [E+1]
  int64_t num_experts;            // E
  int64_t num_rows;               // N
  int64_t in_features;            // D
  int64_t hidden_size;            // H
  DType type;
  const void* u;               // [N, D] contiguous
  DeviceRows h;                // [N, D]
  DeviceRows grad_y;           // [N, H]; read with a bias only
  ExpertVectors bias;          // [E, H] or none
  const void* topk_weights;    // [N] by slot, accumulate type; not read without grad_h
  const int32_t* row_to_slot;  // [N]
  void* grad_h;                // [N, D] contiguous by slot; nullptr: not wanted
  void* grad_topk_weights;     // [N] by slot, accumulate type; nullptr: not wanted
};

Status moe_linear_reduce_bwd(const MoeLinearReduceBwdParams& p, Stream stream);

}  // namespace cuda

}  // namespace moe_ops
