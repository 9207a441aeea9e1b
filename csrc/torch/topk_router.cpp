#include "moe_ops/topk_router.h"

#include <cmath>
#include <string>

#include "torch/device.h"
#include "torch/router.h"
#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

namespace {

void check_groups(const Op& op, const TopkRouterParams& p) {
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

// Arguments of a call.
struct Inputs {
  const Tensor& router_logits;  // [T, E]
  int64_t top_k;
  const std::string& score_func;
  bool topk_first, renormalize;
  double routed_scaling_factor;
  const OptTensor& expert_bias;  // [E] or none
  int64_t num_groups, num_topk_groups;
  const std::string& group_score;
};

// Checks a call and returns its parameters without the addresses.
TopkRouterParams topk_params(const Op& op, const Inputs& in) {
  const auto& [router_logits, top_k, score_func, topk_first, renormalize, routed_scaling_factor,
               expert_bias, num_groups, num_topk_groups, group_score] = in;
  TopkRouterParams p;
  p.type = check_router_logits(op, router_logits);
  const int64_t E = router_logits.size(1);
  MOE_CHECK(top_k >= 1 && top_k <= E, op, ": top_k must be from 1 to E = ", E, ", got ", top_k,
            ".");
  p.score_func = check_score_func(op, score_func);
  check_scaling_factor(op, routed_scaling_factor);
  MOE_CHECK(group_score == "max" || group_score == "top2_sum", op,
            ": group_score must be one of max, top2_sum, got '", group_score, "'.");
  p.num_tokens = router_logits.size(0);
  p.num_experts = E;
  p.top_k = top_k;
  p.num_groups = num_groups;
  p.num_topk_groups = num_topk_groups;
  p.group_score = group_score == "max" ? GroupScore::kMax : GroupScore::kTop2Sum;
  check_groups(op, p);
  if (expert_bias.has_value()) {
    check_float(op, "expert_bias", *expert_bias);
    check_dim(op, "expert_bias", *expert_bias, 1, "[E]");
    check_size(op, "expert_bias", *expert_bias, 0, E, "E");
  }
  p.topk_first = topk_first;
  p.renormalize = renormalize;
  p.routed_scaling_factor = routed_scaling_factor;
  return p;
}

void set_addresses(TopkRouterParams& p, const Tensor& logits, const OptTensor& bias,
                   Tensor& topk_weights, Tensor& topk_ids) {
  p.router_logits = logits.const_data_ptr();
  p.logits_stride = row_stride(logits);
  p.expert_bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
  p.topk_weights = topk_weights.mutable_data_ptr();
  p.topk_ids = static_cast<int32_t*>(topk_ids.mutable_data_ptr());
}

std::tuple<Tensor, Tensor> topk_router(const Tensor& router_logits, int64_t top_k,
                                       std::string score_func, bool topk_first, bool renormalize,
                                       double routed_scaling_factor, const OptTensor& expert_bias,
                                       int64_t num_groups, int64_t num_topk_groups,
                                       std::string group_score) {
  constexpr const char* kOp = "topk_router";
  TopkRouterParams p = topk_params(kOp, {.router_logits = router_logits,
                                         .top_k = top_k,
                                         .score_func = score_func,
                                         .topk_first = topk_first,
                                         .renormalize = renormalize,
                                         .routed_scaling_factor = routed_scaling_factor,
                                         .expert_bias = expert_bias,
                                         .num_groups = num_groups,
                                         .num_topk_groups = num_topk_groups,
                                         .group_score = group_score});
  const ScalarType out_type = accumulate_type(router_logits.scalar_type());
  const Tensor logits = with_dense_rows(router_logits);
  const OptTensor bias = contiguous_as(expert_bias, out_type);
  Tensor topk_weights = empty_cpu(kOp, {p.num_tokens, top_k}, out_type);
  Tensor topk_ids = empty_cpu(kOp, {p.num_tokens, top_k}, ScalarType::Int);
  set_addresses(p, logits, bias, topk_weights, topk_ids);
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

#ifdef MOE_OPS_WITH_CUDA

static std::tuple<Tensor, Tensor> topk_router_cuda(const Tensor& router_logits, int64_t top_k,
                                                   std::string score_func, bool topk_first,
                                                   bool renormalize, double routed_scaling_factor,
                                                   const OptTensor& expert_bias, int64_t num_groups,
                                                   int64_t num_topk_groups,
                                                   std::string group_score) {
  const Op op("topk_router", router_logits);
  TopkRouterParams p = topk_params(op, {.router_logits = router_logits,
                                        .top_k = top_k,
                                        .score_func = score_func,
                                        .topk_first = topk_first,
                                        .renormalize = renormalize,
                                        .routed_scaling_factor = routed_scaling_factor,
                                        .expert_bias = expert_bias,
                                        .num_groups = num_groups,
                                        .num_topk_groups = num_topk_groups,
                                        .group_score = group_score});
  const ScalarType out_type = accumulate_type(router_logits.scalar_type());
  const Tensor logits = with_dense_rows(router_logits);
  const OptTensor bias = contiguous_as(expert_bias, out_type);
  Tensor topk_weights = device_empty(router_logits, {p.num_tokens, top_k}, out_type);
  Tensor topk_ids = device_empty(router_logits, {p.num_tokens, top_k}, ScalarType::Int);
  Tensor workspace =
      device_empty(router_logits, {cuda::topk_router_workspace(p)}, ScalarType::Byte);
  set_addresses(p, logits, bias, topk_weights, topk_ids);
  check_status(op,
               cuda::topk_router(p, workspace.mutable_data_ptr(), current_stream(router_logits)));
  return {topk_weights, topk_ids};
}

static Tensor topk_router_bwd_cuda(const Tensor& grad_weights, const Tensor& router_logits,
                                   const Tensor& topk_ids, std::string score_func, bool topk_first,
                                   bool renormalize, double routed_scaling_factor) {
  const Op op("topk_router_bwd", router_logits);
  return router_gradient_cuda(op, grad_weights, router_logits, topk_ids,
                              check_score_func(op, score_func), topk_first, renormalize,
                              routed_scaling_factor);
}

MOE_CUDA_LIBRARY(m) {
  m.impl("topk_router", MOE_CUDA_BOX(topk_router_cuda));
  m.impl("topk_router_bwd", MOE_CUDA_BOX(topk_router_bwd_cuda));
}

#endif  // MOE_OPS_WITH_CUDA

}  // namespace moe_ops::adapter
