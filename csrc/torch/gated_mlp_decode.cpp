#include "moe_ops/gated_mlp_decode.h"

#include <cmath>

#include "torch/activation.h"
#include "torch/dense_layer.h"

namespace moe_ops::adapter {

namespace {

constexpr const char* kOp = "gated_mlp_decode";

Tensor gated_mlp_decode(const Tensor& x, const Tensor& w_gate, const Tensor& w_up,
                        const Tensor& w_down, const OptTensor& w_gate_scale,
                        const OptTensor& w_up_scale, const OptTensor& w_down_scale,
                        const OptTensor& norm_weight, double eps, const OptTensor& output_gate,
                        const OptTensor& residual, double residual_scale, std::string activation,
                        std::string formats) {
  GatedMlpDecodeParams p;
  p.type = check_float(kOp, "x", x);
  check_dim(kOp, "x", x, 2, "[T, H]");
  const int64_t T = x.size(0), H = x.size(1);
  check_num_slots(kOp, "x", T);
  p.activation = check_activation(kOp, activation, false, 1.702, 7.0, true).kind;
  MOE_CHECK(!has_limit(p.activation), kOp,
            ": activation must be one of swiglu, geglu, geglu_tanh, reglu, got '", activation,
            "'.");
  const auto names = format_names<3>(kOp, "formats", formats);
  const Dense gate =
      dense_layer(kOp, {"w_gate", w_gate, w_gate_scale, {}, names[0]}, x, p.type, -1, H);
  const int64_t I = gate.layer.out_features;
  const Dense up = dense_layer(kOp, {"w_up", w_up, w_up_scale, {}, names[1]}, x, p.type, I, H);
  const Dense down =
      dense_layer(kOp, {"w_down", w_down, w_down_scale, {}, names[2]}, x, p.type, -1, I);
  const int64_t O = down.layer.out_features;
  check_vector(kOp, "norm_weight", norm_weight, x, H, "H");
  check_vector(kOp, "output_gate", output_gate, x, H, "H");
  if (residual.has_value()) {
    check_same_dtype(kOp, "residual", *residual, "x", x);
    check_dim(kOp, "residual", *residual, 2, "[T, O]");
    check_size(kOp, "residual", *residual, 0, T, "T");
    check_size(kOp, "residual", *residual, 1, O, "O");
  }
  MOE_CHECK(eps >= 0, kOp, ": eps must be at least 0, got ", eps, ".");
  MOE_CHECK(std::isfinite(residual_scale), kOp, ": residual_scale must be finite, got ",
            residual_scale, ".");
  const Tensor src = dense(x);
  OptTensor norm, sigmoid, more;
  if (norm_weight.has_value()) norm = dense(*norm_weight);
  if (output_gate.has_value()) sigmoid = dense(*output_gate);
  if (residual.has_value()) more = dense(*residual);
  const auto data = [](const OptTensor& t) {
    return t.has_value() ? t->const_data_ptr() : nullptr;
  };
  Tensor y = empty_cpu(kOp, {T, O}, x.scalar_type());
  p.x = src.const_data_ptr();
  p.num_tokens = T;
  p.norm_weight = data(norm);
  p.eps = eps;
  p.gate = gate.layer;
  p.up = up.layer;
  p.down = down.layer;
  p.output_gate = data(sigmoid);
  p.residual = data(more);
  p.residual_scale = residual_scale;
  p.y = y.mutable_data_ptr();
  cpu::gated_mlp_decode(p, torch_parallel());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) {
  m.impl("gated_mlp_decode", MOE_BOX(gated_mlp_decode));
}

}  // namespace moe_ops::adapter
