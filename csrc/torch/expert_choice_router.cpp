#include "moe_ops/expert_choice_router.h"

#include <string>

#include "torch/router.h"
#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

namespace {

std::tuple<Tensor, Tensor> expert_choice_router(const Tensor& router_logits, int64_t capacity,
                                                std::string score_func,
                                                double routed_scaling_factor) {
  constexpr const char* kOp = "expert_choice_router";
  ExpertChoiceRouterParams p;
  p.type = check_router_logits(kOp, router_logits);
  MOE_CHECK(capacity >= 1, kOp, ": capacity must be at least 1, got ", capacity, ".");
  p.score_func = check_score_func(kOp, score_func);
  check_scaling_factor(kOp, routed_scaling_factor);

  const int64_t T = router_logits.size(0), E = router_logits.size(1);
  const Tensor logits = with_dense_rows(router_logits);
  Tensor topk_weights = empty_cpu({T, E}, accumulate_type(router_logits.scalar_type()));
  Tensor topk_ids = empty_cpu({T, E}, ScalarType::Int);
  p.router_logits = logits.const_data_ptr();
  p.logits_stride = row_stride(logits);
  p.num_tokens = T;
  p.num_experts = E;
  p.capacity = capacity;
  p.routed_scaling_factor = routed_scaling_factor;
  p.topk_weights = topk_weights.mutable_data_ptr();
  p.topk_ids = static_cast<int32_t*>(topk_ids.mutable_data_ptr());
  cpu::expert_choice_router(p, torch_parallel());
  return {topk_weights, topk_ids};
}

Tensor expert_choice_router_bwd(const Tensor& grad_weights, const Tensor& router_logits,
                                const Tensor& topk_ids, std::string score_func,
                                double routed_scaling_factor) {
  constexpr const char* kOp = "expert_choice_router_bwd";
  return router_gradient(kOp, grad_weights, router_logits, topk_ids,
                         check_score_func(kOp, score_func), false, false, routed_scaling_factor);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) {
  m.impl("expert_choice_router", MOE_BOX(expert_choice_router));
  m.impl("expert_choice_router_bwd", MOE_BOX(expert_choice_router_bwd));
}

}  // namespace moe_ops::adapter
