#include "torch/router.h"

#include <cmath>

#include "torch/device.h"

namespace moe_ops::adapter {

DType check_router_logits(const Op& op, const Tensor& router_logits) {
  const DType type = check_float(op, "router_logits", router_logits);
  check_dim(op, "router_logits", router_logits, 2, "[T, E]");
  MOE_CHECK(
      router_logits.size(1) >= 1 && router_logits.size(1) < std::numeric_limits<int32_t>::max(), op,
      ": router_logits must be [T, E] with at least one expert, got shape ",
      shape_string(router_logits), ".");
  return type;
}

ScoreFunc check_score_func(const Op& op, const std::string& name) {
  std::string names;
  for (int i = 0; i < kScoreFuncs; ++i) {
    if (name == kScoreFuncNames[i]) return static_cast<ScoreFunc>(i);
    names += (i == 0 ? "" : ", ") + std::string(kScoreFuncNames[i]);
  }
  fail(op, ": score_func must be one of ", names, ", got '", name, "'.");
}

void check_scaling_factor(const Op& op, double factor) {
  MOE_CHECK(std::isfinite(factor), op, ": routed_scaling_factor must be finite, got ", factor, ".");
}

static DType check_router_gradient(const Op& op, const Tensor& grad_weights,
                                   const Tensor& router_logits, const Tensor& topk_ids,
                                   double routed_scaling_factor) {
  const DType type = check_router_logits(op, router_logits);
  check_index(op, "topk_ids", topk_ids);
  check_dim(op, "topk_ids", topk_ids, 2, "[T, K]");
  check_size(op, "topk_ids", topk_ids, 0, router_logits.size(0), "T");
  check_float(op, "grad_weights", grad_weights);
  check_dim(op, "grad_weights", grad_weights, 2, "[T, K]");
  check_size(op, "grad_weights", grad_weights, 0, topk_ids.size(0), "T");
  check_size(op, "grad_weights", grad_weights, 1, topk_ids.size(1), "K");
  check_scaling_factor(op, routed_scaling_factor);
  return type;
}

Tensor router_gradient(const Op& op, const Tensor& grad_weights, const Tensor& router_logits,
                       const Tensor& topk_ids, ScoreFunc score_func, bool topk_first,
                       bool renormalize, double routed_scaling_factor) {
  RouterBwdParams p;
  p.type = check_router_gradient(op, grad_weights, router_logits, topk_ids, routed_scaling_factor);
  const Tensor logits = with_dense_rows(router_logits);
  const Tensor grad = contiguous_as(grad_weights, accumulate_type(router_logits.scalar_type()));
  const std::vector<int32_t> ids = normalized_ids(topk_ids, router_logits.size(1));
  Tensor grad_logits =
      empty_cpu(op, {router_logits.size(0), router_logits.size(1)}, router_logits.scalar_type());
  p.grad_weights = grad.const_data_ptr();
  p.router_logits = logits.const_data_ptr();
  p.logits_stride = row_stride(logits);
  p.topk_ids = ids.data();
  p.num_tokens = router_logits.size(0);
  p.num_experts = router_logits.size(1);
  p.top_k = topk_ids.size(1);
  p.score_func = score_func;
  p.topk_first = topk_first;
  p.renormalize = renormalize;
  p.routed_scaling_factor = routed_scaling_factor;
  p.grad_logits = grad_logits.mutable_data_ptr();
  cpu::router_bwd(p, torch_parallel());
  return grad_logits;
}

#ifdef MOE_OPS_WITH_CUDA

Tensor router_gradient_cuda(const Op& op, const Tensor& grad_weights, const Tensor& router_logits,
                            const Tensor& topk_ids, ScoreFunc score_func, bool topk_first,
                            bool renormalize, double routed_scaling_factor) {
  cuda::RouterBwdParams p;
  p.type = check_router_gradient(op, grad_weights, router_logits, topk_ids, routed_scaling_factor);
  const Tensor logits = with_dense_rows(router_logits);
  const Tensor grad = contiguous_as(grad_weights, accumulate_type(router_logits.scalar_type()));
  const DeviceIndex ids = device_index(op, "topk_ids", topk_ids);
  Tensor grad_logits = device_empty(router_logits, {router_logits.size(0), router_logits.size(1)},
                                    router_logits.scalar_type());
  p.grad_weights = grad.const_data_ptr();
  p.router_logits = logits.const_data_ptr();
  p.logits_stride = row_stride(logits);
  p.topk_ids = {ids.data, ids.is_64};
  p.num_tokens = router_logits.size(0);
  p.num_experts = router_logits.size(1);
  p.top_k = topk_ids.size(1);
  p.score_func = score_func;
  p.topk_first = topk_first;
  p.renormalize = renormalize;
  p.routed_scaling_factor = routed_scaling_factor;
  p.grad_logits = grad_logits.mutable_data_ptr();
  check_status(op, cuda::router_bwd(p, current_stream(router_logits)));
  return grad_logits;
}

#endif  // MOE_OPS_WITH_CUDA

}  // namespace moe_ops::adapter
