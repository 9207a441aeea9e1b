#include "moe_ops/moe_ffn_quantized.h"

#include "torch/moe_ffn/checks.h"

namespace moe_ops::adapter {

namespace {

constexpr const char* kOp = "moe_ffn_quantized";

// A weight and its scales; the tensors keep copies alive where some were made.
struct Quantized {
  Tensor tensor, scale;
  QuantizedMatrices matrices;
  int64_t experts, features, depth;
};

Quantized quantized_of(const char* name, const char* scale_name, const Tensor& w,
                       const Tensor& scale) {
  check_device(kOp, name, w);
  check_device(kOp, scale_name, scale);
  const ScalarType type = w.scalar_type();
  MOE_CHECK(type == ScalarType::Char || type == ScalarType::Byte, kOp, ": ", name,
            " must be int8, or uint8 with two 4-bit weights a byte, got ", dtype_name(type), ".");
  check_dim(kOp, name, w, 3, type == ScalarType::Char ? "[E, O, D]" : "[E, O, D/2]");
  MOE_CHECK(scale.scalar_type() == ScalarType::Float, kOp, ": ", scale_name,
            " must be float32, got ", dtype_name(scale.scalar_type()), ".");
  const bool four = type == ScalarType::Byte;
  check_dim(kOp, scale_name, scale, four ? 3 : 2,
            four ? "[E, O, D/G] beside 4-bit weights" : "[E, O] beside int8 weights");
  Quantized out{with_dense_rows(w), dense(scale), {},
                w.size(0),          w.size(1),    w.size(2) * (four ? 2 : 1)};
  check_size(kOp, scale_name, scale, 0, out.experts, "E");
  check_size(kOp, scale_name, scale, 1, out.features, "the number of features");
  QuantFormat& format = out.matrices.format;
  format.bits = four ? 4 : 8;
  format.group = out.depth;
  int64_t groups = 1;
  if (four) {
    groups = scale.size(2);
    format.group = groups == 0 ? 0 : out.depth / groups;
    const bool known = format.group == 32 || format.group == 64 || format.group == 128;
    MOE_CHECK(groups * format.group == out.depth && (known || out.depth == 0), kOp, ": ",
              scale_name, " must have a scale for each group of 32, 64 or 128 of the ", out.depth,
              " weights of a row, got shape ", shape_string(scale), ".");
  }
  format.scale = static_cast<const float*>(out.scale.const_data_ptr());
  format.scale_stride_o = groups;
  format.scale_stride_e = groups * out.features;
  out.matrices.data = out.tensor.const_data_ptr();
  out.matrices.stride_e = out.tensor.stride(0);
  out.matrices.stride_o = out.tensor.stride(1);
  return out;
}

Tensor moe_ffn_quantized(const Tensor& x, const Tensor& w_gate_up, const Tensor& w_gate_up_scale,
                         const Tensor& w_down, const Tensor& w_down_scale,
                         const Tensor& topk_weights, const Tensor& topk_ids,
                         const OptTensor& x_scale, const OptTensor& b_gate_up,
                         const OptTensor& b_down, std::string activation, bool interleaved,
                         bool apply_router_weight_on_input, double alpha, double limit) {
  const ActivationParams act = check_activation(kOp, activation, interleaved, alpha, limit, false);
  const bool gated = is_gated(act.kind);
  check_index(kOp, "topk_ids", topk_ids);
  check_dim(kOp, "topk_ids", topk_ids, 2, "[T, K]");
  const DType type = check_float(kOp, "x", x);
  MOE_CHECK(type != DType::kFloat64, kOp, ": x must be float32, bfloat16 or float16, got float64.");
  check_dim(kOp, "x", x, 2, "[T, H]");
  const int64_t T = x.size(0), H = x.size(1);
  const Quantized up = quantized_of("w_gate_up", "w_gate_up_scale", w_gate_up, w_gate_up_scale);
  const int64_t E = up.experts, width = up.features;
  MOE_CHECK(E >= 1, kOp, ": w_gate_up must hold at least one expert, got shape ",
            shape_string(w_gate_up), ".");
  MOE_CHECK(up.depth == H, kOp, ": w_gate_up must have rows of H = ", H, " weights, got ", up.depth,
            " (shape ", shape_string(w_gate_up), ").");
  MOE_CHECK(!gated || width % 2 == 0, kOp,
            ": w_gate_up must have an even number 2I of features, got shape ",
            shape_string(w_gate_up), ".");
  const int64_t I = gated ? width / 2 : width;
  const Quantized down = quantized_of("w_down", "w_down_scale", w_down, w_down_scale);
  check_size(kOp, "w_down", w_down, 0, E, "E");
  check_size(kOp, "w_down", w_down, 1, H, "H");
  MOE_CHECK(down.depth == I, kOp, ": w_down must have rows of I = ", I, " weights, got ",
            down.depth, " (shape ", shape_string(w_down), ").");
  check_float(kOp, "topk_weights", topk_weights);
  check_dim(kOp, "topk_weights", topk_weights, 2, "[T, K]");
  check_size(kOp, "topk_weights", topk_weights, 0, T, "T");
  check_size(kOp, "topk_weights", topk_weights, 1, topk_ids.size(1), "K");
  check_size(kOp, "topk_ids", topk_ids, 0, T, "T");
  if (x_scale.has_value()) {
    check_device(kOp, "x_scale", *x_scale);
    MOE_CHECK(x_scale->scalar_type() == ScalarType::Float, kOp, ": x_scale must be float32, got ",
              dtype_name(x_scale->scalar_type()), ".");
    check_dim(kOp, "x_scale", *x_scale, 1, "[H]");
    check_size(kOp, "x_scale", *x_scale, 0, H, "H");
  }
  check_bias(kOp, "b_gate_up", b_gate_up, x, E, width, gated ? "[E, 2I]" : "[E, I]");
  check_bias(kOp, "b_down", b_down, x, E, H, "[E, H]");

  const SlotIds slots = slot_ids(kOp, topk_ids, E);
  const Tensor src = with_dense_rows(x);
  const Tensor weights = contiguous_as(topk_weights, ScalarType::Float);
  const OptTensor factors = contiguous_as(x_scale, ScalarType::Float);
  const Bias up_bias = bias_of(b_gate_up, type);
  const Bias down_bias = bias_of(b_down, type);
  Tensor y = empty_cpu(kOp, {T, H}, x.scalar_type());
  MoeFfnQuantizedParams p;
  p.desc = {slots.routing, weights.const_data_ptr(), H, I, act, apply_router_weight_on_input};
  p.x = rows_of(src, type);
  p.x_scale = factors.has_value() ? static_cast<const float*>(factors->const_data_ptr()) : nullptr;
  p.w_gate_up = up.matrices;
  p.w_down = down.matrices;
  p.b_gate_up = up_bias.vectors;
  p.b_down = down_bias.vectors;
  p.y = y.mutable_data_ptr();
  cpu::moe_ffn_quantized(p, torch_parallel());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) {
  m.impl("moe_ffn_quantized", MOE_BOX(moe_ffn_quantized));
}

}  // namespace moe_ops::adapter
