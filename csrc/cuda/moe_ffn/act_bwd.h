// Between the products of moe_ffn's backward. P = 2I for gated activations, else I.
#pragma once

#include "moe_ops/activation.h"
#include "moe_ops/grouped_gemm.h"

namespace moe_ops::cuda {

// For each row r < expert_offsets[E], with s = row_to_slot[r], w = topk_weights[s] and
// h = act(preact[r]):
//   grad_topk_weights[s] = <h, u[r]> + <b_down[e(r)], grad_y[r]>
//   grad_preact[r]       = w * act'(preact[r]) u[r]
//   weighted_h[r]        = w * h
// The gradient of the pre-activation is linear in u, so u is not weighted. Slots without an expert
// get a zero in grad_topk_weights; other rows are left alone.
struct FfnActBwdParams {
  const int32_t* expert_offsets;  // [E+1]
  int64_t num_experts;            // E
  int64_t num_rows;               // N
  int64_t intermediate_size;      // I
  int64_t hidden_size;            // H
  DType type;
  ActivationParams act;
  const void* preact;          // [N, P] contiguous
  const void* u;               // [N, I] contiguous; nullptr: only weighted_h is wanted
  DeviceRows grad_y;           // [N, H]; read with b_down only
  ExpertVectors b_down;        // [E, H] or none
  const void* topk_weights;    // [N] by slot, accumulate type; nullptr: ones
  const int32_t* row_to_slot;  // [N]
  void* grad_preact;           // [N, P] contiguous; nullptr: not wanted
  void* weighted_h;            // [N, I] contiguous; nullptr: not wanted; may be u
  void* grad_topk_weights;     // [N] by slot, accumulate type; nullptr: not wanted
};

Status ffn_act_bwd(const FfnActBwdParams& p, Stream stream);

}  // namespace moe_ops::cuda
