#include "moe_ops/topk_router.h"

#include <cmath>
#include <string>

#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

// What the three routers check in the same words (declared again in their adapters).
DType check_router_logits(const char* op, const Tensor& router_logits) {
  const DType type = check_float(op, "router_logits", router_logits);
  check_dim(op, "router_logits", router_logits, 2, "[T, E]");
  MOE_CHECK(
      router_logits.size(1) >= 1 && router_logits.size(1) < std::numeric_limits<int32_t>::max(), op,
      ": router_logits must be [T, E] with at least one expert, got shape ",
      shape_string(router_logits), ".");
  return type;
}

ScoreFunc check_score_func(const char* op, const std::string& name) {
  if (name == "softmax") return ScoreFunc::kSoftmax;
  MOE_CHECK(name == "sigmoid", op, ": score_func must be one of softmax, sigmoid, got '", name,
            "'.");
  return ScoreFunc::kSigmoid;
}

void check_scaling_factor(const char* op, double factor) {
  MOE_CHECK(std::isfinite(factor), op, ": routed_scaling_factor must be finite, got ", factor, ".");
}

Tensor router_gradient(const char* op, const Tensor& grad_weights, const Tensor& router_logits,
                       const Tensor& topk_ids, ScoreFunc score_func, bool topk_first,
                       bool renormalize, double routed_scaling_factor) {
  RouterBwdParams p;
  p.type = check_router_logits(op, router_logits);
  check_index(op, "topk_ids", topk_ids);
  check_dim(op, "topk_ids", topk_ids, 2, "[T, K]");
  check_size(op, "topk_ids", topk_ids, 0, router_logits.size(0), "T");
  check_float(op, "grad_weights", grad_weights);
  check_dim(op, "grad_weights", grad_weights, 2, "[T, K]");
  check_size(op, "grad_weights", grad_weights, 0, topk_ids.size(0), "T");
  check_size(op, "grad_weights", grad_weights, 1, topk_ids.size(1), "K");
  check_scaling_factor(op, routed_scaling_factor);

  const Tensor logits = with_dense_rows(router_logits);
  const Tensor grad = contiguous_as(grad_weights, accumulate_type(router_logits.scalar_type()));
  const std::vector<int32_t> ids = normalized_ids(topk_ids, router_logits.size(1));
  Tensor grad_logits =
      empty_cpu({router_logits.size(0), router_logits.size(1)}, router_logits.scalar_type());
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

namespace {

void check_groups(const char* op, const TopkRouterParams& p) {
  MOE_CHECK(p.num_groups >= 1 && p.num_experts % p.num_groups == 0, op,
            ": num_groups must divide the ", p.num_experts, " experts, got ", p.num_groups, ".");
  MOE_CHECK(p.num_topk_groups >= 1 && p.num_topk_groups <= p.num_groups, op,
            ": num_topk_groups must be from 1 to num_groups = ", p.num_groups, ", got ",
            p.num_topk_groups, ".");
  const int64_t group_size = p.num_experts / p.num_groups;
  MOE_CHECK(p.group_score == GroupScore::kMax || group_size >= 2, op,
            ": group_score 'top2_sum' needs at least 2 experts in a group, got ", p.num_experts,
            " experts in ", p.num_groups, " groups.");
  MOE_CHECK(p.top_k <= p.num_topk_groups * group_size, op, ": top_k must be at most ",
            p.num_topk_groups * group_size, ", the experts in ", p.num_topk_groups,
            " of the groups, got ", p.top_k, ".");
}

std::tuple<Tensor, Tensor> topk_router(const Tensor& router_logits, int64_t top_k,
                                       std::string score_func, bool topk_first, bool renormalize,
                                       double routed_scaling_factor, const OptTensor& expert_bias,
                                       int64_t num_groups, int64_t num_topk_groups,
                                       std::string group_score) {
  constexpr const char* kOp = "topk_router";
  TopkRouterParams p;
  p.type = check_router_logits(kOp, router_logits);
  const int64_t T = router_logits.size(0), E = router_logits.size(1);
  MOE_CHECK(top_k >= 1 && top_k <= E, kOp, ": top_k must be from 1 to E = ", E, ", got ", top_k,
            ".");
  p.score_func = check_score_func(kOp, score_func);
  check_scaling_factor(kOp, routed_scaling_factor);
  MOE_CHECK(group_score == "max" || group_score == "top2_sum", kOp,
            ": group_score must be one of max, top2_sum, got '", group_score, "'.");
  p.num_tokens = T;
  p.num_experts = E;
  p.top_k = top_k;
  p.num_groups = num_groups;
  p.num_topk_groups = num_topk_groups;
  p.group_score = group_score == "max" ? GroupScore::kMax : GroupScore::kTop2Sum;
  check_groups(kOp, p);
  if (expert_bias.has_value()) {
    check_float(kOp, "expert_bias", *expert_bias);
    check_dim(kOp, "expert_bias", *expert_bias, 1, "[E]");
    check_size(kOp, "expert_bias", *expert_bias, 0, E, "E");
  }

  const ScalarType out_type = accumulate_type(router_logits.scalar_type());
  const Tensor logits = with_dense_rows(router_logits);
  const OptTensor bias = contiguous_as(expert_bias, out_type);
  Tensor topk_weights = empty_cpu({T, top_k}, out_type);
  Tensor topk_ids = empty_cpu({T, top_k}, ScalarType::Int);
  p.router_logits = logits.const_data_ptr();
  p.logits_stride = row_stride(logits);
  p.topk_first = topk_first;
  p.renormalize = renormalize;
  p.routed_scaling_factor = routed_scaling_factor;
  p.expert_bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
  p.topk_weights = topk_weights.mutable_data_ptr();
  p.topk_ids = static_cast<int32_t*>(topk_ids.mutable_data_ptr());
  cpu::topk_router(p, torch_parallel());
  return {topk_weights, topk_ids};
}

Tensor topk_router_bwd(const Tensor& grad_weights, const Tensor& router_logits,
                       const Tensor& topk_ids, std::string score_func, bool topk_first,
                       bool renormalize, double routed_scaling_factor) {
  constexpr const char* kOp = "topk_router_bwd";
  return router_gradient(kOp, grad_weights, router_logits, topk_ids,
                         check_score_func(kOp, score_func), topk_first, renormalize,
                         routed_scaling_factor);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) {
  m.impl("topk_router", MOE_BOX(topk_router));
  m.impl("topk_router_bwd", MOE_BOX(topk_router_bwd));
}

}  // namespace moe_ops::adapter
