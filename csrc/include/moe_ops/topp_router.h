// topp_router: each token's shortest list of experts that gathers top_p of the probability.
// T tokens, E experts. The gradient is router_bwd.
#pragma once

#include <cstdint>

#include "moe_ops/common.h"

namespace moe_ops {

struct ToppRouterParams {
  const void* router_logits;  // [T,E], rows logits_stride elements apart
  DType type;
  int64_t logits_stride;
  int64_t num_tokens;   // T
  int64_t num_experts;  // E
  double top_p;
  int64_t min_k;
  int64_t max_k;
  bool renormalize;
  double routed_scaling_factor;
  void* topk_weights;  // [T,max_k] out, fp32 (fp64 for fp64 logits); 0 in unused slots
  int32_t* topk_ids;   // [T,max_k] out; -1 in unused slots
};

namespace cpu {
void topp_router(const ToppRouterParams& p, const Parallel& par);
}  // namespace cpu

// CUDA launchers take these params with device pointers.
namespace cuda {
int64_t topp_router_workspace(const ToppRouterParams& p);  // bytes; mostly 0
Status topp_router(const ToppRouterParams& p, void* workspace, Stream stream);
}  // namespace cuda

}  // namespace moe_ops
