// Checks of the FFN block of quantized weights.
#pragma once

#include <string>

#include "torch/moe_ffn/checks.h"
#include "torch/quantized.h"

namespace moe_ops::adapter {

// Arguments of a call in either direction. P = 2I for gated activations, else I; scales and zero
// points have the shapes of the weights' formats.
struct QuantizedFfnInputs {
  const Tensor& x;                // [T, H]
  const Tensor& w_gate_up;        // [E, P, H]
  const Tensor& w_gate_up_scale;  // of w_gate_up
  const Tensor& w_down;           // [E, H, I]
  const Tensor& w_down_scale;     // of w_down
  const Tensor& topk_weights;     // [T, K]
  const Tensor& topk_ids;         // [T, K]; backward: slot_to_row, of the same shape
  const OptTensor& x_scale;       // [H] or none
  const OptTensor& b_gate_up;     // [E, P] or none
  const OptTensor& b_down;        // [E, H] or none
  ActivationParams act;
  bool on_input;                    // apply_router_weight_on_input
  const std::string& format;        // names of the formats of both weights
  const OptTensor& w_gate_up_zero;  // zero points of w_gate_up, or none
  const OptTensor& w_down_zero;     // zero points of w_down, or none
};

// Validated sizes and weights of one call.
struct QuantizedFfnCall {
  Sizes sizes;
  Quantized up, down;
};

inline QuantizedFfnCall check(const Op& op, const QuantizedFfnInputs& in) {
  const Tensor &x = in.x, &topk_weights = in.topk_weights;
  const Tensor &w_gate_up = in.w_gate_up, &w_down = in.w_down;
  QuantizedFfnCall call;
  const auto names = format_names<2>(op, "format", in.format);
  const WeightFormat up = format_of(op, "format", names[0]);
  const WeightFormat down = format_of(op, "format", names[1]);
  Sizes& s = call.sizes;
  s.act = in.act;
  const bool gated = is_gated(s.act.kind);
  check_index(op, "topk_ids", in.topk_ids);
  check_dim(op, "topk_ids", in.topk_ids, 2, "[T, K]");
  s.type = check_float(op, "x", x);
  MOE_CHECK(s.type != DType::kFloat64, op,
            ": x must be float32, bfloat16 or float16, got float64.");
  check_dim(op, "x", x, 2, "[T, H]");
  s.T = x.size(0);
  s.H = x.size(1);
  s.K = in.topk_ids.size(1);
  call.up =
      quantized_of(op, "w_gate_up", w_gate_up, in.w_gate_up_scale, in.w_gate_up_zero, up, names[0]);
  s.E = call.up.experts;
  s.width = call.up.features;
  MOE_CHECK(s.E >= 1, op, ": w_gate_up must hold at least one expert, got shape ",
            shape_string(w_gate_up), ".");
  MOE_CHECK(call.up.depth == s.H, op, ": w_gate_up must have rows of H = ", s.H, " weights, got ",
            call.up.depth, " (shape ", shape_string(w_gate_up), ").");
  MOE_CHECK(!gated || s.width % 2 == 0, op,
            ": w_gate_up must have an even number 2I of features, got shape ",
            shape_string(w_gate_up), ".");
  s.I = gated ? s.width / 2 : s.width;
  call.down = quantized_of(op, "w_down", w_down, in.w_down_scale, in.w_down_zero, down, names[1]);
  check_size(op, "w_down", w_down, 0, s.E, "E");
  check_size(op, "w_down", w_down, 1, s.H, "H");
  MOE_CHECK(call.down.depth == s.I, op, ": w_down must have rows of I = ", s.I, " weights, got ",
            call.down.depth, " (shape ", shape_string(w_down), ").");
  check_float(op, "topk_weights", topk_weights);
  check_dim(op, "topk_weights", topk_weights, 2, "[T, K]");
  check_size(op, "topk_weights", topk_weights, 0, s.T, "T");
  check_size(op, "topk_weights", topk_weights, 1, s.K, "K");
  check_size(op, "topk_ids", in.topk_ids, 0, s.T, "T");
  if (in.x_scale.has_value()) {
    check_device(op, "x_scale", *in.x_scale);
    MOE_CHECK(in.x_scale->scalar_type() == ScalarType::Float, op, ": x_scale must be float32, got ",
              dtype_name(in.x_scale->scalar_type()), ".");
    check_dim(op, "x_scale", *in.x_scale, 1, "[H]");
    check_size(op, "x_scale", *in.x_scale, 0, s.H, "H");
  }
  check_biases(op, in.b_gate_up, in.b_down, x, s);
  return call;
}

}  // namespace moe_ops::adapter
