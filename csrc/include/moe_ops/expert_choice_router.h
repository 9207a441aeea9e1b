// expert_choice_router: each expert's best tokens, in slot form. T tokens, E experts. The gradient
// is router_bwd with K = E.
#pragma once

#include <cstdint>

#include "moe_ops/common.h"
#include "moe_ops/score_func.h"

namespace moe_ops {

struct ExpertChoiceRouterParams {
  const void* router_logits;  // [T,E], rows logits_stride elements apart
  DType type;
  int64_t logits_stride;
  int64_t num_tokens;   // T
  int64_t num_experts;  // E
  int64_t capacity;     // tokens an expert takes; more than T means all
  ScoreFunc score_func;
  double routed_scaling_factor;
  void* topk_weights;  // [T,E] out, fp32 (fp64 for fp64 logits); 0 in unused slots
  int32_t* topk_ids;   // [T,E] out, ascending; -1 in unused slots
};

namespace cpu {
void expert_choice_router(const ExpertChoiceRouterParams& p, const Parallel& par);
}  // namespace cpu

// CUDA launchers take these params with device pointers.
namespace cuda {
int64_t expert_choice_router_workspace(const ExpertChoiceRouterParams& p);  // bytes
Status expert_choice_router(const ExpertChoiceRouterParams& p, void* workspace, Stream stream);
}  // namespace cuda

}  // namespace moe_ops
