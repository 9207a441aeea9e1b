#include "moe_ops/expert_choice_router.h"

#include <string>

#include "torch/device.h"
#include "torch/router.h"
#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

namespace {

// Checks a call and returns its parameters without the addresses.
ExpertChoiceRouterParams expert_choice_params(const Op& op, const Tensor& router_logits,
                                              int64_t capacity, const std::string& score_func,
                                              double routed_scaling_factor) {
  ExpertChoiceRouterParams p;
  p.type = check_router_logits(op, router_logits);
  MOE_CHECK(capacity >= 1, op, ": capacity must be at least 1, got ", capacity, ".");
  p.score_func = check_score_func(op, score_func);
  check_scaling_factor(op, routed_scaling_factor);
  p.num_tokens = router_logits.size(0);
  p.num_experts = router_logits.size(1);
  p.capacity = capacity;
  p.routed_scaling_factor = routed_scaling_factor;
  return p;
}

void set_addresses(ExpertChoiceRouterParams& p, const Tensor& logits, Tensor& topk_weights,
                   Tensor& topk_ids) {
  p.router_logits = logits.const_data_ptr();
  p.logits_stride = row_stride(logits);
  p.topk_weights = topk_weights.mutable_data_ptr();
  p.topk_ids = static_cast<int32_t*>(topk_ids.mutable_data_ptr());
}

std::tuple<Tensor, Tensor> expert_choice_router(const Tensor& router_logits, int64_t capacity,
                                                std::string score_func,
                                                double routed_scaling_factor) {
  constexpr const char* kOp = "expert_choice_router";
  ExpertChoiceRouterParams p =
      expert_choice_params(kOp, router_logits, capacity, score_func, routed_scaling_factor);
  const Tensor logits = with_dense_rows(router_logits);
  Tensor topk_weights =
      empty_cpu(kOp, {p.num_tokens, p.num_experts}, accumulate_type(router_logits.scalar_type()));
  Tensor topk_ids = empty_cpu(kOp, {p.num_tokens, p.num_experts}, ScalarType::Int);
  set_addresses(p, logits, topk_weights, topk_ids);
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

#ifdef MOE_OPS_WITH_CUDA

static std::tuple<Tensor, Tensor> expert_choice_router_cuda(const Tensor& router_logits,
                                                            int64_t capacity,
                                                            std::string score_func,
                                                            double routed_scaling_factor) {
  const Op op("expert_choice_router", router_logits);
  ExpertChoiceRouterParams p =
      expert_choice_params(op, router_logits, capacity, score_func, routed_scaling_factor);
  const Tensor logits = with_dense_rows(router_logits);
  Tensor topk_weights = device_empty(router_logits, {p.num_tokens, p.num_experts},
                                     accumulate_type(router_logits.scalar_type()));
  Tensor topk_ids = device_empty(router_logits, {p.num_tokens, p.num_experts}, ScalarType::Int);
  Tensor workspace =
      device_empty(router_logits, {cuda::expert_choice_router_workspace(p)}, ScalarType::Byte);
  set_addresses(p, logits, topk_weights, topk_ids);
  check_status(op, cuda::expert_choice_router(p, workspace.mutable_data_ptr(),
                                              current_stream(router_logits)));
  return {topk_weights, topk_ids};
}

static Tensor expert_choice_router_bwd_cuda(const Tensor& grad_weights, const Tensor& router_logits,
                                            const Tensor& topk_ids, std::string score_func,
                                            double routed_scaling_factor) {
  const Op op("expert_choice_router_bwd", router_logits);
  return router_gradient_cuda(op, grad_weights, router_logits, topk_ids,
                              check_score_func(op, score_func), false, false,
                              routed_scaling_factor);
}

MOE_CUDA_LIBRARY(m) {
  m.impl("expert_choice_router", MOE_CUDA_BOX(expert_choice_router_cuda));
  m.impl("expert_choice_router_bwd", MOE_CUDA_BOX(expert_choice_router_bwd_cuda));
}

#endif  // MOE_OPS_WITH_CUDA

}  // namespace moe_ops::adapter
