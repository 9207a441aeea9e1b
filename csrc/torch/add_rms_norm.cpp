#include "moe_ops/add_rms_norm.h"

#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

namespace {

void check_like(const Op& op, const char* name, const Tensor& t, const char* like_name,
                const Tensor& like) {
  check_same_dtype(op, name, t, like_name, like);
  check_dim(op, name, t, like.dim(), "[..., H]");
  for (int64_t d = 0; d < like.dim(); ++d) check_size(op, name, t, d, like.size(d), "x's size");
}

void check_vector(const Op& op, const char* name, const Tensor& t, const Tensor& x) {
  check_same_dtype(op, name, t, "x", x);
  check_dim(op, name, t, 1, "[H]");
  check_size(op, name, t, 0, x.size(x.dim() - 1), "H");
}

// Also H and the number of rows.
struct Shape {
  DType type;
  int64_t rows, hidden;
};

Shape check_x(const Op& op, const Tensor& x, const Tensor& weight) {
  const DType type = check_float(op, "x", x);
  MOE_CHECK(x.dim() >= 1, op, ": x must be [..., H], got shape ", shape_string(x), ".");
  check_vector(op, "weight", weight, x);
  const int64_t hidden = x.size(x.dim() - 1);
  return {type, hidden == 0 ? 0 : x.numel() / hidden, hidden};
}

std::vector<int64_t> shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& weight,
                                                const OptTensor& residual, const OptTensor& bias,
                                                double eps) {
  constexpr const char* kOp = "add_rms_norm";
  AddRmsNormParams p;
  const Shape shape = check_x(kOp, x, weight);
  if (residual.has_value()) check_like(kOp, "residual", *residual, "x", x);
  if (bias.has_value()) check_vector(kOp, "bias", *bias, x);
  MOE_CHECK(eps >= 0, kOp, ": eps must be at least 0, got ", eps, ".");
  const bool adds = residual.has_value() || bias.has_value();
  const Tensor src = dense(x), w = dense(weight);
  OptTensor more, b;
  if (residual.has_value()) more = dense(*residual);
  if (bias.has_value()) b = dense(*bias);
  const std::vector<int64_t> sizes = shape_of(x);
  Tensor y = empty_cpu(kOp, sizes, x.scalar_type());
  Tensor sum = adds ? empty_cpu(kOp, sizes, x.scalar_type()) : empty_cpu(kOp, {0}, x.scalar_type());
  Tensor rstd = empty_cpu(kOp, {shape.rows}, accumulate_type(x.scalar_type()));
  p.x = src.const_data_ptr();
  p.residual = more.has_value() ? more->const_data_ptr() : nullptr;
  p.weight = w.const_data_ptr();
  p.bias = b.has_value() ? b->const_data_ptr() : nullptr;
  p.type = shape.type;
  p.num_rows = shape.rows;
  p.hidden_size = shape.hidden;
  p.eps = eps;
  p.y = y.mutable_data_ptr();
  p.sum = adds ? sum.mutable_data_ptr() : nullptr;
  p.rstd = rstd.mutable_data_ptr();
  cpu::add_rms_norm(p, torch_parallel());
  return {y, sum, rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_bwd(const Tensor& grad_y, const OptTensor& grad_sum,
                                                    const Tensor& sum, const Tensor& weight,
                                                    const Tensor& rstd, bool need_x,
                                                    bool need_weight, bool need_bias) {
  constexpr const char* kOp = "add_rms_norm_bwd";
  AddRmsNormBwdParams p;
  const Shape shape = check_x(kOp, sum, weight);
  check_like(kOp, "grad_y", grad_y, "sum", sum);
  if (grad_sum.has_value()) check_like(kOp, "grad_sum", *grad_sum, "sum", sum);
  const ScalarType dtype = sum.scalar_type(), acc = accumulate_type(dtype);
  check_float(kOp, "rstd", rstd);
  check_dim(kOp, "rstd", rstd, 1, "[rows]");
  check_size(kOp, "rstd", rstd, 0, shape.rows, "the number of rows");
  const Tensor s = dense(sum), w = dense(weight), g = dense(grad_y), r = contiguous_as(rstd, acc);
  OptTensor more;
  if (grad_sum.has_value()) more = dense(*grad_sum);
  const Tensor workspace = empty_cpu(
      kOp, {cpu::add_rms_norm_workspace(shape.rows, shape.hidden, shape.type)}, ScalarType::Byte);
  Tensor grad_x = need_x ? empty_cpu(kOp, shape_of(sum), dtype) : empty_cpu(kOp, {0}, dtype);
  Tensor grad_weight = empty_cpu(kOp, {need_weight ? shape.hidden : 0}, dtype);
  Tensor grad_bias = empty_cpu(kOp, {need_bias ? shape.hidden : 0}, dtype);
  p.grad_y = g.const_data_ptr();
  p.grad_sum = more.has_value() ? more->const_data_ptr() : nullptr;
  p.sum = s.const_data_ptr();
  p.weight = w.const_data_ptr();
  p.rstd = r.const_data_ptr();
  p.type = shape.type;
  p.num_rows = shape.rows;
  p.hidden_size = shape.hidden;
  p.workspace = const_cast<void*>(workspace.const_data_ptr());
  p.grad_x = need_x ? grad_x.mutable_data_ptr() : nullptr;
  p.grad_weight = need_weight ? grad_weight.mutable_data_ptr() : nullptr;
  p.grad_bias = need_bias ? grad_bias.mutable_data_ptr() : nullptr;
  cpu::add_rms_norm_bwd(p, torch_parallel());
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) {
  m.impl("add_rms_norm", MOE_BOX(add_rms_norm));
  m.impl("add_rms_norm_bwd", MOE_BOX(add_rms_norm_bwd));
}

}  // namespace moe_ops::adapter
