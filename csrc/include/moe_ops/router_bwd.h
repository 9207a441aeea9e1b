// router_bwd: the gradient of the routing weights in the router logits, for every router.
#pragma once

#include <cstdint>

#include "moe_ops/common.h"
#include "moe_ops/score_func.h"

namespace moe_ops {

// The gradient of every router: given the ids, none of them looks at the selection again.
struct RouterBwdParams {
  const void* grad_weights;   // [T,K] fp32 (fp64 for fp64 logits)
  const void* router_logits;  // [T,E], rows logits_stride elements apart
  DType type;
  int64_t logits_stride;
  const int32_t* topk_ids;  // [T,K]; -1 where there is no expert, never out of range otherwise
  int64_t num_tokens;       // T
  int64_t num_experts;      // E
  int64_t top_k;            // K
  ScoreFunc score_func;
  bool topk_first;
  bool renormalize;
  double routed_scaling_factor;
  void* grad_logits;  // [T,E] out, of `type`
};

namespace cpu {
void router_bwd(const RouterBwdParams& p, const Parallel& par);
}  // namespace cpu

namespace cuda {

// Device counterpart of moe_ops::RouterBwdParams; ids are not validated, and a value outside [0, E)
// is no expert.
struct RouterBwdParams {
  const void* grad_weights;
  const void* router_logits;
  DType type;
  int64_t logits_stride;
  IndexMap topk_ids;  // [T,K]
  int64_t num_tokens, num_experts, top_k;
  ScoreFunc score_func;
  bool topk_first, renormalize;
  double routed_scaling_factor;
  void* grad_logits;
};

Status router_bwd(const RouterBwdParams& p, Stream stream);

}  // namespace cuda

}  // namespace moe_ops
