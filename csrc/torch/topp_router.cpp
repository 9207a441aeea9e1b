#include "moe_ops/topp_router.h"

#include "torch/device.h"
#include "torch/router.h"
#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

namespace {

// Checks a call and returns its parameters without the addresses.
ToppRouterParams topp_params(const Op& op, const Tensor& router_logits, double top_p, int64_t max_k,
                             int64_t min_k, bool renormalize, double routed_scaling_factor) {
  ToppRouterParams p;
  p.type = check_router_logits(op, router_logits);
  const int64_t E = router_logits.size(1);
  MOE_CHECK(top_p > 0 && top_p <= 1, op, ": top_p must be above 0 and at most 1, got ", top_p, ".");
  MOE_CHECK(max_k >= 1 && max_k <= E, op, ": max_k must be from 1 to E = ", E, ", got ", max_k,
            ".");
  MOE_CHECK(min_k >= 1 && min_k <= max_k, op, ": min_k must be from 1 to max_k = ", max_k, ", got ",
            min_k, ".");
  check_scaling_factor(op, routed_scaling_factor);
  p.num_tokens = router_logits.size(0);
  p.num_experts = E;
  p.top_p = top_p;
  p.min_k = min_k;
  p.max_k = max_k;
  p.renormalize = renormalize;
  p.routed_scaling_factor = routed_scaling_factor;
  return p;
}

void set_addresses(ToppRouterParams& p, const Tensor& logits, Tensor& topk_weights,
                   Tensor& topk_ids) {
  p.router_logits = logits.const_data_ptr();
  p.logits_stride = row_stride(logits);
  p.topk_weights = topk_weights.mutable_data_ptr();
  p.topk_ids = static_cast<int32_t*>(topk_ids.mutable_data_ptr());
}

std::tuple<Tensor, Tensor> topp_router(const Tensor& router_logits, double top_p, int64_t max_k,
                                       int64_t min_k, bool renormalize,
                                       double routed_scaling_factor) {
  constexpr const char* kOp = "topp_router";
  ToppRouterParams p =
      topp_params(kOp, router_logits, top_p, max_k, min_k, renormalize, routed_scaling_factor);
  const Tensor logits = with_dense_rows(router_logits);
  Tensor topk_weights =
      empty_cpu(kOp, {p.num_tokens, max_k}, accumulate_type(router_logits.scalar_type()));
  Tensor topk_ids = empty_cpu(kOp, {p.num_tokens, max_k}, ScalarType::Int);
  set_addresses(p, logits, topk_weights, topk_ids);
  cpu::topp_router(p, torch_parallel());
  return {topk_weights, topk_ids};
}

Tensor topp_router_bwd(const Tensor& grad_weights, const Tensor& router_logits,
                       const Tensor& topk_ids, bool renormalize, double routed_scaling_factor) {
  return router_gradient("topp_router_bwd", grad_weights, router_logits, topk_ids,
                         ScoreFunc::kSoftmax, false, renormalize, routed_scaling_factor);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) {
  m.impl("topp_router", MOE_BOX(topp_router));
  m.impl("topp_router_bwd", MOE_BOX(topp_router_bwd));
}

#ifdef MOE_OPS_WITH_CUDA

static std::tuple<Tensor, Tensor> topp_router_cuda(const Tensor& router_logits, double top_p,
                                                   int64_t max_k, int64_t min_k, bool renormalize,
                                                   double routed_scaling_factor) {
  const Op op("topp_router", router_logits);
  ToppRouterParams p =
      topp_params(op, router_logits, top_p, max_k, min_k, renormalize, routed_scaling_factor);
  const Tensor logits = with_dense_rows(router_logits);
  Tensor topk_weights = device_empty(router_logits, {p.num_tokens, max_k},
                                     accumulate_type(router_logits.scalar_type()));
  Tensor topk_ids = device_empty(router_logits, {p.num_tokens, max_k}, ScalarType::Int);
  Tensor workspace =
      device_empty(router_logits, {cuda::topp_router_workspace(p)}, ScalarType::Byte);
  set_addresses(p, logits, topk_weights, topk_ids);
  check_status(op,
               cuda::topp_router(p, workspace.mutable_data_ptr(), current_stream(router_logits)));
  return {topk_weights, topk_ids};
}

static Tensor topp_router_bwd_cuda(const Tensor& grad_weights, const Tensor& router_logits,
                                   const Tensor& topk_ids, bool renormalize,
                                   double routed_scaling_factor) {
  return router_gradient_cuda({"topp_router_bwd", router_logits}, grad_weights, router_logits,
                              topk_ids, ScoreFunc::kSoftmax, false, renormalize,
                              routed_scaling_factor);
}

MOE_CUDA_LIBRARY(m) {
  m.impl("topp_router", MOE_CUDA_BOX(topp_router_cuda));
  m.impl("topp_router_bwd", MOE_CUDA_BOX(topp_router_bwd_cuda));
}

#endif  // MOE_OPS_WITH_CUDA

}  // namespace moe_ops::adapter
