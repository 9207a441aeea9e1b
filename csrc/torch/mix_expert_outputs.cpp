#include "moe_ops/mix_expert_outputs.h"

#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

namespace {

MixActivation activation_of(const Op& op, const std::string& name) {
  if (name == "none") return MixActivation::kNone;
  if (name == "relu") return MixActivation::kRelu;
  if (name == "silu") return MixActivation::kSilu;
  if (name == "sigmoid") return MixActivation::kSigmoid;
  fail(op, ": activation must be one of none, relu, silu, sigmoid, got '", name, "'.");
}

void check_pair(const Op& op, const char* first, const OptTensor& a, const char* second,
                const OptTensor& b) {
  MOE_CHECK(a.has_value() == b.has_value(), op, ": ", a.has_value() ? second : first,
            " must come with ", a.has_value() ? first : second, ", got None.");
}

// The normalization's operands, dense, and what keeps them alive.
struct Norm {
  OptTensor weight, bias, mean, var;
  MixNorm norm;
};

Norm norm_of(const Op& op, const Tensor& outputs, const OptTensor& norm_weight,
             const OptTensor& norm_bias, const OptTensor& mean, const OptTensor& var, double eps) {
  check_pair(op, "norm_weight", norm_weight, "norm_bias", norm_bias);
  check_pair(op, "mean", mean, "var", var);
  MOE_CHECK(norm_weight.has_value() || !mean.has_value(), op,
            ": norm_weight must come with mean, got None.");
  MOE_CHECK(eps >= 0, op, ": eps must be at least 0, got ", eps, ".");
  const ScalarType acc = accumulate_type(outputs.scalar_type());
  const auto dense_of = [&](const char* name, const OptTensor& t) {
    OptTensor out;
    if (!t.has_value()) return out;
    check_device(op, name, *t);
    MOE_CHECK(t->scalar_type() == acc, op, ": ", name, " must be ", dtype_name(acc),
              " for outputs of ", dtype_name(outputs.scalar_type()), ", got ",
              dtype_name(t->scalar_type()), ".");
    check_dim(op, name, *t, 2, "[E, O]");
    check_size(op, name, *t, 0, outputs.size(1), "E");
    check_size(op, name, *t, 1, outputs.size(2), "O");
    out = dense(*t);
    return out;
  };
  Norm out;
  out.weight = dense_of("norm_weight", norm_weight);
  out.bias = dense_of("norm_bias", norm_bias);
  out.mean = dense_of("mean", mean);
  out.var = dense_of("var", var);
  const auto data = [](const OptTensor& t) {
    return t.has_value() ? const_cast<void*>(t->const_data_ptr()) : nullptr;
  };
  out.norm = {data(out.weight), data(out.bias), data(out.mean), data(out.var), eps, false};
  return out;
}

template <class P>
void set_sizes(const Op& op, const Tensor& outputs, const Tensor& weights, const OptTensor& factor,
               const std::string& activation, P& p) {
  p.type = check_float(op, "outputs", outputs);
  check_dim(op, "outputs", outputs, 3, "[T, E, O]");
  check_num_experts(op, outputs.size(1));
  check_same_dtype(op, "weights", weights, "outputs", outputs);
  check_dim(op, "weights", weights, 3, "[T, M, E]");
  check_size(op, "weights", weights, 0, outputs.size(0), "T");
  check_size(op, "weights", weights, 2, outputs.size(1), "E");
  p.act = activation_of(op, activation);
  p.num_tokens = outputs.size(0);
  p.num_experts = outputs.size(1);
  p.size = outputs.size(2);
  p.num_mixtures = weights.size(1);
  p.factor = nullptr;
  p.repeats = 1;
  if (!factor.has_value()) return;
  check_same_dtype(op, "factor", *factor, "outputs", outputs);
  check_dim(op, "factor", *factor, 3, "[T / r, M, O]");
  check_size(op, "factor", *factor, 1, weights.size(1), "M");
  check_size(op, "factor", *factor, 2, outputs.size(2), "O");
  const int64_t given = factor->size(0);
  MOE_CHECK(p.num_tokens == 0 ? given == 0 : given > 0 && p.num_tokens % given == 0, op,
            ": factor must have a number of rows that divides T = ", p.num_tokens, ", got shape ",
            shape_string(*factor), ".");
  if (given > 0) p.repeats = p.num_tokens / given;
}

std::tuple<Tensor, Tensor, Tensor> mix_expert_outputs(const Tensor& outputs, const Tensor& weights,
                                                      const OptTensor& factor,
                                                      const OptTensor& norm_weight,
                                                      const OptTensor& norm_bias,
                                                      const OptTensor& mean, const OptTensor& var,
                                                      std::string activation, double eps) {
  constexpr const char* kOp = "mix_expert_outputs";
  MixExpertOutputsParams p;
  set_sizes(kOp, outputs, weights, factor, activation, p);
  const Norm norm = norm_of(kOp, outputs, norm_weight, norm_bias, mean, var, eps);
  p.norm = norm.norm;
  p.norm.batch = norm.weight.has_value() && !norm.mean.has_value();
  const ScalarType acc = accumulate_type(outputs.scalar_type());
  const auto statistics = [&] {
    return p.norm.batch ? empty_cpu(kOp, {p.num_experts, p.size}, acc) : empty_cpu(kOp, {0}, acc);
  };
  Tensor y = empty_cpu(kOp, {p.num_tokens, p.num_mixtures, p.size}, outputs.scalar_type());
  Tensor batch_mean = statistics(), batch_var = statistics();
  if (p.norm.batch) {
    p.norm.mean = batch_mean.mutable_data_ptr();
    p.norm.var = batch_var.mutable_data_ptr();
  }
  const Tensor x = dense(outputs), w = dense(weights);
  const OptTensor f = contiguous_as(factor, outputs.scalar_type());
  p.factor = f.has_value() ? f->const_data_ptr() : nullptr;
  p.outputs = x.const_data_ptr();
  p.weights = w.const_data_ptr();
  p.y = y.mutable_data_ptr();
  cpu::mix_expert_outputs(p, torch_parallel());
  return {y, batch_mean, batch_var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mix_expert_outputs_bwd(
    const Tensor& grad_y, const Tensor& outputs, const Tensor& weights, const OptTensor& factor,
    const OptTensor& norm_weight, const OptTensor& norm_bias, const OptTensor& mean,
    const OptTensor& var, std::string activation, double eps, bool batch, bool need_weights,
    bool need_factor, bool need_norm_weight, bool need_norm_bias) {
  constexpr const char* kOp = "mix_expert_outputs_bwd";
  MixExpertOutputsBwdParams p;
  set_sizes(kOp, outputs, weights, factor, activation, p);
  const Norm norm = norm_of(kOp, outputs, norm_weight, norm_bias, mean, var, eps);
  MOE_CHECK(norm.weight.has_value() == norm.mean.has_value(), kOp,
            ": mean must come with norm_weight, got None.");
  p.norm = norm.norm;
  p.norm.batch = batch && norm.weight.has_value();
  check_same_dtype(kOp, "grad_y", grad_y, "outputs", outputs);
  check_dim(kOp, "grad_y", grad_y, 3, "[T, M, O]");
  check_size(kOp, "grad_y", grad_y, 0, p.num_tokens, "T");
  check_size(kOp, "grad_y", grad_y, 1, p.num_mixtures, "M");
  check_size(kOp, "grad_y", grad_y, 2, p.size, "O");
  const ScalarType dtype = outputs.scalar_type(), acc = accumulate_type(dtype);
  const auto made = [](bool wanted, std::initializer_list<int64_t> shape, ScalarType type) {
    return wanted ? empty_cpu(kOp, shape, type) : empty_cpu(kOp, {0}, type);
  };
  const bool normed = norm.weight.has_value();
  const std::initializer_list<int64_t> all = {p.num_tokens, p.num_experts, p.size};
  Tensor grad_outputs = empty_cpu(kOp, all, dtype);
  Tensor grad_weights = made(need_weights, {p.num_tokens, p.num_mixtures, p.num_experts}, dtype);
  Tensor grad_scale = made(need_norm_weight && normed, {p.num_experts, p.size}, acc);
  Tensor grad_shift = made(need_norm_bias && normed, {p.num_experts, p.size}, acc);
  Tensor grad_normed = p.norm.batch && dtype != acc ? empty_cpu(kOp, all, acc) : grad_outputs;
  need_factor = need_factor && factor.has_value();
  Tensor grad_factor = made(need_factor, {p.num_tokens / p.repeats, p.num_mixtures, p.size}, dtype);
  const Tensor g = dense(grad_y), x = dense(outputs), w = dense(weights);
  const OptTensor f = contiguous_as(factor, dtype);
  p.factor = f.has_value() ? f->const_data_ptr() : nullptr;
  p.grad_factor = need_factor ? grad_factor.mutable_data_ptr() : nullptr;
  const auto out = [](bool wanted, Tensor& t) { return wanted ? t.mutable_data_ptr() : nullptr; };
  p.grad_y = g.const_data_ptr();
  p.outputs = x.const_data_ptr();
  p.weights = w.const_data_ptr();
  p.grad_outputs = grad_outputs.mutable_data_ptr();
  p.grad_normed = grad_normed.mutable_data_ptr();
  p.grad_weights = out(need_weights, grad_weights);
  p.grad_norm_weight = out(need_norm_weight && normed, grad_scale);
  p.grad_norm_bias = out(need_norm_bias && normed, grad_shift);
  cpu::mix_expert_outputs_bwd(p, torch_parallel());
  return {grad_outputs, grad_weights, grad_factor, grad_scale, grad_shift};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) {
  m.impl("mix_expert_outputs", MOE_BOX(mix_expert_outputs));
  m.impl("mix_expert_outputs_bwd", MOE_BOX(mix_expert_outputs_bwd));
}

}  // namespace moe_ops::adapter
