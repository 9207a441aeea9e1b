// moe_ffn: the whole expert FFN block, forward and backward. P = 2I for gated activations, else I.
#pragma once

#include <cstdint>

#include "moe_ops/activation.h"
#include "moe_ops/common.h"
#include "moe_ops/grouped_gemm.h"

namespace moe_ops {

struct MoeFfnShape {
  int64_t num_tokens;         // T
  int64_t hidden_size;        // H
  int64_t intermediate_size;  // I
  int64_t num_experts;        // E
  int64_t top_k;              // K
  ActivationParams act;
  bool apply_router_weight_on_input;
  const int64_t* expert_offsets;  // [E+1]
  const int32_t* row_to_slot;     // [N]
  const int32_t* slot_to_row;     // [T, K]
  const void* topk_weights;       // [T, K] in the accumulate type
};

struct MoeFfnParams {
  MoeFfnShape shape;
  Rows x;                          // [T, H], no index
  const float* x_scale = nullptr;  // [H], factors of x; only with float32 sums
  ExpertMatrices w_gate_up;        // [E, P, H]
  ExpertMatrices w_down;           // [E, H, I]
  ExpertVectors b_gate_up;         // [E, P] or none
  ExpertVectors b_down;            // [E, H] or none
  void* y;                         // [T, H] contiguous, out, x's type
  void* preact;                    // [N, P] contiguous, out, x's type; nullptr: not wanted
};

struct MoeFfnBwdParams {
  MoeFfnShape shape;
  Rows grad_y;               // [T, H], no index
  Rows x;                    // [T, H], no index
  ExpertMatrices w_gate_up;  // [E, P, H]
  ExpertMatrices w_down;     // [E, H, I]
  ExpertVectors b_down;      // [E, H] or none: enters the gradient of the routing weights
  const void* preact;        // [N, P] contiguous, x's type
  // Outputs, contiguous, x's type unless said, nullptr where not wanted.
  void* grad_x;          // [T, H]
  void* grad_w_gate_up;  // [E, P, H] of type grad_w_gate_up_type
  void* grad_w_down;     // [E, H, I] of type grad_w_down_type
  DType grad_w_gate_up_type, grad_w_down_type;
  bool accumulate_w_gate_up, accumulate_w_down;  // add to what is there
  void* grad_b_gate_up;                          // [E, P]
  void* grad_b_down;                             // [E, H]
  void* grad_topk_weights;                       // [T, K] in the accumulate type
};

namespace cpu {
void moe_ffn(const MoeFfnParams& p, const Parallel& par);
void moe_ffn_bwd(const MoeFfnBwdParams& p, const Parallel& par);
}  // namespace cpu

namespace cuda {

struct MoeFfnShape {
  int64_t num_tokens;         // T
  int64_t hidden_size;        // H
  int64_t intermediate_size;  // I
  int64_t num_experts;        // E
  int64_t top_k;              // K
  ActivationParams act;
  bool apply_router_weight_on_input;
  const int32_t* expert_offsets;  // [E+1]
  const int32_t* row_to_slot;     // [N]
  const int32_t* slot_to_row;     // [T, K]
  const void* topk_weights;       // [T, K] in the accumulate type
};

// Types and outputs are those of the CPU's. What lies between the products (the pre-activation, the
// activation, an expert's output, and their gradients) is rounded to x's type; sums are not.
struct MoeFfnParams {
  MoeFfnShape shape;
  DeviceRows x;              // [T, H], no index
  ExpertMatrices w_gate_up;  // [E, P, H]
  ExpertMatrices w_down;     // [E, H, I]
  ExpertVectors b_gate_up;   // [E, P] or none
  ExpertVectors b_down;      // [E, H] or none
  void* y;                   // [T, H] contiguous, out
  void* preact;              // [N, P] contiguous, out; nullptr: not wanted
  void* workspace;           // moe_ffn_workspace bytes, aligned to 256
};

struct MoeFfnBwdParams {
  MoeFfnShape shape;
  DeviceRows grad_y;         // [T, H], no index
  DeviceRows x;              // [T, H], no index
  ExpertMatrices w_gate_up;  // [E, P, H]
  ExpertMatrices w_down;     // [E, H, I]
  ExpertVectors b_down;      // [E, H] or none: enters the gradient of the routing weights
  const void* preact;        // [N, P] contiguous
  // Outputs, contiguous, x's type unless said, nullptr where not wanted.
  void* grad_x;          // [T, H]
  void* grad_w_gate_up;  // [E, P, H] of type grad_w_gate_up_type
  void* grad_w_down;     // [E, H, I] of type grad_w_down_type
  DType grad_w_gate_up_type, grad_w_down_type;
  bool accumulate_w_gate_up, accumulate_w_down;  // add to what is there
  void* grad_b_gate_up;                          // [E, P]
  void* grad_b_down;                             // [E, H]
  void* grad_topk_weights;                       // [T, K] in the accumulate type
  void* workspace;                               // moe_ffn_bwd_workspace bytes, aligned to 256
};

// Bytes.
int64_t moe_ffn_workspace(const MoeFfnParams& p);
int64_t moe_ffn_bwd_workspace(const MoeFfnBwdParams& p);

Status moe_ffn(const MoeFfnParams& p, Stream stream);
Status moe_ffn_bwd(const MoeFfnBwdParams& p, Stream stream);

}  // namespace cuda

}  // namespace moe_ops
