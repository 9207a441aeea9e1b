// router_linear: the router's linear map, from tokens to logits, and its gradients.
#pragma once

#include <cstdint>

#include "moe_ops/common.h"

namespace moe_ops {

struct RouterLinearParams {
  const void* x;       // [T, H], rows x_stride elements apart
  const void* weight;  // [E, H] contiguous, like all below
  const void* bias;    // [E] or nullptr
  DType type;          // of these
  int64_t x_stride;
  int64_t num_tokens, hidden_size, num_experts;
  void* logits;  // [T, E], out
  DType logits_type;
};

struct RouterLinearBwdParams {
  const void* grad_logits;  // [T, E], contiguous like all but x
  DType grad_type;          // of grad_logits
  const void* x;            // [T, H], rows x_stride elements apart
  const void* weight;       // [E, H]
  DType type;               // of x, weight and what comes out
  int64_t x_stride;
  int64_t num_tokens, hidden_size, num_experts;
  void* grad_x;       // [T, H], out; nullptr: not wanted, like the others
  void* grad_weight;  // [E, H], out
  void* grad_bias;    // [E], out
};

namespace cpu {
void router_linear(const RouterLinearParams& p, const Parallel& par);
void router_linear_bwd(const RouterLinearBwdParams& p, const Parallel& par);
}  // namespace cpu

}  // namespace moe_ops
