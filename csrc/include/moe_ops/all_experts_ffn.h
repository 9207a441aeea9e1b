// all_experts_ffn: every expert on every token, y[t, e] = W_down[e] act(W_up[e] x[t, g] + b_up[e]) +
// b_down[e] with g the input that expert e reads. Letters: T tokens, G inputs, H their width, E
// experts, I intermediate, O outputs.
#pragma once

#include <cstdint>

#include "moe_ops/activation.h"
#include "moe_ops/common.h"

namespace moe_ops {

struct AllExpertsFfnSizes {
  DType type;
  int64_t num_tokens, num_inputs, hidden_size;       // T, G, H
  int64_t num_experts, intermediate_size, out_size;  // E, I, O
  bool has_act;                                      // false: no activation between the products
  Activation act;                                    // not gated
  const int32_t* order;                              // [E] experts, those of one input in a row
  const int32_t* input_of;                           // [E] the input that expert e reads, in [0, G)
};

// All operands are contiguous and of `type` if not said otherwise.
struct AllExpertsFfnParams {
  AllExpertsFfnSizes size;
  const void* x;       // [T, G, H]
  const void* w_up;    // [E, I, H]
  const void* w_down;  // [E, O, I]
  const void* b_up;    // [E, I] or nullptr
  const void* b_down;  // [E, O] or nullptr
  void* y;             // [T, E, O], out
  void* preact;        // [E, T, I] accumulate type, out; nullptr: not wanted
};

// Outputs that are nullptr are not wanted.
struct AllExpertsFfnBwdParams {
  AllExpertsFfnSizes size;
  const void* grad_y;  // [T, E, O]
  const void* x;
  const void* w_up;
  const void* w_down;
  const void* preact;  // [E, T, I] accumulate type
  void* grad_x;        // [T, G, H]; zero for an input that no expert reads
  void* grad_w_up;
  void* grad_w_down;
  void* grad_b_up;
  void* grad_b_down;
};

namespace cpu {
void all_experts_ffn(const AllExpertsFfnParams& p, const Parallel& par);
void all_experts_ffn_bwd(const AllExpertsFfnBwdParams& p, const Parallel& par);
}  // namespace cpu

}  // namespace moe_ops
