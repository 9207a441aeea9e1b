#include "moe_ops/router_linear.h"

#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

namespace {

struct Shape {
  DType type;
  int64_t num_tokens, hidden_size, num_experts;
};

Shape check_operands(const Op& op, const Tensor& x, const Tensor& weight) {
  const DType type = check_float(op, "x", x);
  check_dim(op, "x", x, 2, "[T, H]");
  check_same_dtype(op, "weight", weight, "x", x);
  check_dim(op, "weight", weight, 2, "[E, H]");
  check_size(op, "weight", weight, 1, x.size(1), "H");
  check_num_experts(op, weight.size(0));
  return {type, x.size(0), x.size(1), weight.size(0)};
}

Tensor router_linear(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                     const OptType& logits_dtype) {
  constexpr const char* kOp = "router_linear";
  const Shape shape = check_operands(kOp, x, weight);
  if (bias.has_value()) {
    check_same_dtype(kOp, "bias", *bias, "x", x);
    check_dim(kOp, "bias", *bias, 1, "[E]");
    check_size(kOp, "bias", *bias, 0, shape.num_experts, "E");
  }
  const ScalarType dtype = logits_dtype.value_or(x.scalar_type());
  RouterLinearParams p;
  p.logits_type = check_result_type(kOp, "logits_dtype", dtype, x, shape.type);
  const Tensor rows = with_dense_rows(x), w = dense(weight);
  OptTensor b;
  if (bias.has_value()) b = dense(*bias);
  Tensor logits = empty_cpu(kOp, {shape.num_tokens, shape.num_experts}, dtype);
  p.x = rows.const_data_ptr();
  p.weight = w.const_data_ptr();
  p.bias = b.has_value() ? b->const_data_ptr() : nullptr;
  p.type = shape.type;
  p.x_stride = row_stride(rows);
  p.num_tokens = shape.num_tokens;
  p.hidden_size = shape.hidden_size;
  p.num_experts = shape.num_experts;
  p.logits = logits.mutable_data_ptr();
  cpu::router_linear(p, torch_parallel());
  return logits;
}

std::tuple<Tensor, Tensor, Tensor> router_linear_bwd(const Tensor& grad_logits, const Tensor& x,
                                                     const Tensor& weight, bool need_x,
                                                     bool need_weight, bool need_bias) {
  constexpr const char* kOp = "router_linear_bwd";
  const Shape shape = check_operands(kOp, x, weight);
  RouterLinearBwdParams p;
  check_float(kOp, "grad_logits", grad_logits);
  p.grad_type = check_result_type(kOp, "grad_logits", grad_logits.scalar_type(), x, shape.type);
  check_dim(kOp, "grad_logits", grad_logits, 2, "[T, E]");
  check_size(kOp, "grad_logits", grad_logits, 0, shape.num_tokens, "T");
  check_size(kOp, "grad_logits", grad_logits, 1, shape.num_experts, "E");
  const Tensor g = dense(grad_logits), rows = with_dense_rows(x), w = dense(weight);
  const ScalarType dtype = x.scalar_type();
  const int64_t T = shape.num_tokens, H = shape.hidden_size, E = shape.num_experts;
  Tensor grad_x = need_x ? empty_cpu(kOp, {T, H}, dtype) : empty_cpu(kOp, {0}, dtype);
  Tensor grad_weight = need_weight ? empty_cpu(kOp, {E, H}, dtype) : empty_cpu(kOp, {0}, dtype);
  Tensor grad_bias = empty_cpu(kOp, {need_bias ? E : 0}, dtype);
  p.grad_logits = g.const_data_ptr();
  p.x = rows.const_data_ptr();
  p.weight = w.const_data_ptr();
  p.type = shape.type;
  p.x_stride = row_stride(rows);
  p.num_tokens = T;
  p.hidden_size = H;
  p.num_experts = E;
  p.grad_x = need_x ? grad_x.mutable_data_ptr() : nullptr;
  p.grad_weight = need_weight ? grad_weight.mutable_data_ptr() : nullptr;
  p.grad_bias = need_bias ? grad_bias.mutable_data_ptr() : nullptr;
  cpu::router_linear_bwd(p, torch_parallel());
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) {
  m.impl("router_linear", MOE_BOX(router_linear));
  m.impl("router_linear_bwd", MOE_BOX(router_linear_bwd));
}

}  // namespace moe_ops::adapter
