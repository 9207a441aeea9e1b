#include "moe_ops/topp_router.h"

#include "torch/router.h"
#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

namespace {

std::tuple<Tensor, Tensor> topp_router(const Tensor& router_logits, double top_p, int64_t max_k,
                                       int64_t min_k, bool renormalize,
                                       double routed_scaling_factor) {
  constexpr const char* kOp = "topp_router";
  ToppRouterParams p;
  p.type = check_router_logits(kOp, router_logits);
  const int64_t T = router_logits.size(0), E = router_logits.size(1);
  MOE_CHECK(top_p > 0 && top_p <= 1, kOp, ": top_p must be above 0 and at most 1, got ", top_p,
            ".");
  MOE_CHECK(max_k >= 1 && max_k <= E, kOp, ": max_k must be from 1 to E = ", E, ", got ", max_k,
            ".");
  MOE_CHECK(min_k >= 1 && min_k <= max_k, kOp, ": min_k must be from 1 to max_k = ", max_k,
            ", got ", min_k, ".");
  check_scaling_factor(kOp, routed_scaling_factor);

  const ScalarType out_type = accumulate_type(router_logits.scalar_type());
  const Tensor logits = with_dense_rows(router_logits);
  Tensor topk_weights = empty_cpu({T, max_k}, out_type);
  Tensor topk_ids = empty_cpu({T, max_k}, ScalarType::Int);
  p.router_logits = logits.const_data_ptr();
  p.logits_stride = row_stride(logits);
  p.num_tokens = T;
  p.num_experts = E;
  p.top_p = top_p;
  p.min_k = min_k;
  p.max_k = max_k;
  p.renormalize = renormalize;
  p.routed_scaling_factor = routed_scaling_factor;
  p.topk_weights = topk_weights.mutable_data_ptr();
  p.topk_ids = static_cast<int32_t*>(topk_ids.mutable_data_ptr());
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

}  // namespace moe_ops::adapter
