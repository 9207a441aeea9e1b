// Checks that the three routers share, and their common gradient.
#pragma once

#include <string>

#include "moe_ops/router_bwd.h"
#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

DType check_router_logits(const Op& op, const Tensor& router_logits);
ScoreFunc check_score_func(const Op& op, const std::string& name);
void check_scaling_factor(const Op& op, double factor);
Tensor router_gradient(const Op& op, const Tensor& grad_weights, const Tensor& router_logits,
                       const Tensor& topk_ids, ScoreFunc score_func, bool topk_first,
                       bool renormalize, double routed_scaling_factor);

#ifdef MOE_OPS_WITH_CUDA
Tensor router_gradient_cuda(const Op& op, const Tensor& grad_weights, const Tensor& router_logits,
                            const Tensor& topk_ids, ScoreFunc score_func, bool topk_first,
                            bool renormalize, double routed_scaling_factor);
#endif

}  // namespace moe_ops::adapter
