// topk_router: each token's K experts and their weights from router logits. T tokens, E experts,
// K top-k, G groups of E/G consecutive experts.
#pragma once

#include <cstdint>

#include "moe_ops/common.h"
#include "moe_ops/score_func.h"

namespace moe_ops {

enum class GroupScore : int { kMax, kTop2Sum };

struct TopkRouterParams {
  const void* router_logits;  // [T,E], rows logits_stride elements apart
  DType type;
  int64_t logits_stride;
  int64_t num_tokens;   // T
  int64_t num_experts;  // E
  int64_t top_k;        // K
  ScoreFunc score_func;
  bool topk_first;
  bool renormalize;
  double routed_scaling_factor;
  const void* expert_bias;  // [E] fp32 (fp64 for fp64 logits); nullptr: no bias
  int64_t num_groups;       // G
  int64_t num_topk_groups;
  GroupScore group_score;
  void* topk_weights;  // [T,K] out, fp32 (fp64 for fp64 logits)
  int32_t* topk_ids;   // [T,K] out
};

namespace cpu {
void topk_router(const TopkRouterParams& p, const Parallel& par);
}  // namespace cpu

// CUDA launchers take these params with device pointers.
namespace cuda {
int64_t topk_router_workspace(const TopkRouterParams& p);  // bytes; mostly 0
Status topk_router(const TopkRouterParams& p, void* workspace, Stream stream);
}  // namespace cuda

}  // namespace moe_ops
