#include "moe_ops/moe_ffn_fp8.h"

#include "torch/device.h"
#include "torch/fp8.h"
#include "torch/moe_ffn/checks.h"

namespace moe_ops::adapter {

namespace {

constexpr const char* kOp = "moe_ffn_fp8";

// A checked call but for its routing, outputs and workspace: parameters, and the tensors they point
// to.
struct Call {
  Sizes sizes;
  ScalarType y_dtype;
  MoeFfnFp8Params params;
  Tensor x, x_scale, weights;
  Fp8Weights up, down;
  Bias up_bias, down_bias;
};

Call make_call(const Op& op, const Tensor& x, const Tensor& w_gate_up,
               const Tensor& w_gate_up_scale, const Tensor& w_down, const Tensor& w_down_scale,
               const Tensor& topk_weights, const Tensor& topk_ids, const OptTensor& b_gate_up,
               const OptTensor& b_down, const std::string& activation, bool interleaved,
               bool apply_router_weight_on_input, double alpha, double limit,
               const OptTensor& x_scale, const OptType& out_dtype) {
  const ActivationParams act = check_activation(op, activation, interleaved, alpha, limit, false);
  check_index(op, "topk_ids", topk_ids);
  check_dim(op, "topk_ids", topk_ids, 2, "[T, K]");
  Call c;
  MoeFfnFp8Params& p = c.params;
  p.has_codes = x_scale.has_value();
  DType type = DType::kFloat32;  // of x, or of sums of codes
  if (p.has_codes) {
    check_fp8(op, "x", x);
    MOE_CHECK(out_dtype.has_value(), op, ": out_dtype must be given with x_scale, got None.");
    c.y_dtype = *out_dtype;
    p.y_type = check_out_dtype(op, c.y_dtype);
  } else {
    type = check_float_to_fp8(op, "x", x);
    c.y_dtype = out_dtype.value_or(x.scalar_type());
    p.y_type = check_result_type(op, "out_dtype", c.y_dtype, x, type);
  }
  const Sizes s = check_ffn(op, type, x, w_gate_up, w_down, topk_weights, topk_ids.size(1), act,
                            [&](const char* name, const Tensor& w, const char* shape) {
                              const bool up = &w == &w_gate_up;
                              check_fp8_weights(op, name, up ? "w_gate_up_scale" : "w_down_scale",
                                                w, up ? w_gate_up_scale : w_down_scale, shape);
                            });
  c.sizes = s;
  check_size(op, "topk_ids", topk_ids, 0, s.T, "T");
  const DType up_bias_type = fp8_bias_type(op, "b_gate_up", b_gate_up);
  const DType down_bias_type = fp8_bias_type(op, "b_down", b_down);
  if (p.has_codes) {
    check_bias_shapes(op, b_gate_up, b_down, s);
  } else {
    check_biases(op, b_gate_up, b_down, x, s);
  }
  c.x = with_dense_rows(x);
  if (p.has_codes) {
    check_fp8_scale(op, "x_scale", *x_scale);
    check_dim(op, "x_scale", *x_scale, 2, "[T, ceil(H / 128)]");
    check_size(op, "x_scale", *x_scale, 0, s.T, "T");
    check_size(op, "x_scale", *x_scale, 1, fp8_blocks(s.H), "the blocks of 128 inputs");
    c.x_scale = with_dense_rows(*x_scale);
    p.x_codes = {static_cast<const uint8_t*>(c.x.const_data_ptr()), row_stride(c.x),
                 static_cast<const float*>(c.x_scale.const_data_ptr()), row_stride(c.x_scale),
                 nullptr};
  } else {
    p.x = rows_of(c.x, type);
  }
  c.weights = contiguous_as(topk_weights, ScalarType::Float);
  c.up = fp8_weights(w_gate_up, w_gate_up_scale);
  c.down = fp8_weights(w_down, w_down_scale);
  c.up_bias = bias_of(b_gate_up, up_bias_type);
  c.down_bias = bias_of(b_down, down_bias_type);
  p.desc = desc_of(s, {}, c.weights, apply_router_weight_on_input);
  p.w_gate_up = c.up.matrices;
  p.w_down = c.down.matrices;
  p.b_gate_up = c.up_bias.vectors;
  p.b_down = c.down_bias.vectors;
  return c;
}

Tensor moe_ffn_fp8(const Tensor& x, const Tensor& w_gate_up, const Tensor& w_gate_up_scale,
                   const Tensor& w_down, const Tensor& w_down_scale, const Tensor& topk_weights,
                   const Tensor& topk_ids, const OptTensor& b_gate_up, const OptTensor& b_down,
                   std::string activation, bool interleaved, bool apply_router_weight_on_input,
                   double alpha, double limit, const OptTensor& x_scale, const OptType& out_dtype) {
  Call c = make_call(kOp, x, w_gate_up, w_gate_up_scale, w_down, w_down_scale, topk_weights,
                     topk_ids, b_gate_up, b_down, activation, interleaved,
                     apply_router_weight_on_input, alpha, limit, x_scale, out_dtype);
  const SlotIds slots = slot_ids(kOp, topk_ids, c.sizes.E);
  Tensor y = empty_cpu(kOp, {c.sizes.T, c.sizes.H}, c.y_dtype);
  c.params.desc.routing = slots.routing;
  c.params.y = y.mutable_data_ptr();
  cpu::moe_ffn_fp8(c.params, torch_parallel());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) { m.impl("moe_ffn_fp8", MOE_BOX(moe_ffn_fp8)); }

#ifdef MOE_OPS_WITH_CUDA

static Tensor moe_ffn_fp8_cuda(const Tensor& x, const Tensor& w_gate_up,
                               const Tensor& w_gate_up_scale, const Tensor& w_down,
                               const Tensor& w_down_scale, const Tensor& topk_weights,
                               const Tensor& topk_ids, const OptTensor& b_gate_up,
                               const OptTensor& b_down, std::string activation, bool interleaved,
                               bool apply_router_weight_on_input, double alpha, double limit,
                               const OptTensor& x_scale, const OptType& out_dtype) {
  const Op op(kOp, x);
  Call c = make_call(op, x, w_gate_up, w_gate_up_scale, w_down, w_down_scale, topk_weights,
                     topk_ids, b_gate_up, b_down, activation, interleaved,
                     apply_router_weight_on_input, alpha, limit, x_scale, out_dtype);
  const SortedSlots slots = device_sorted_slots(op, topk_ids, c.sizes.E);
  Tensor y = device_empty(x, {c.sizes.T, c.sizes.H}, c.y_dtype);
  c.params.desc.routing = slots.routing;
  c.params.y = y.mutable_data_ptr();
  Tensor workspace = device_empty(x, {cuda::moe_ffn_fp8_workspace(c.params)}, ScalarType::Byte);
  c.params.workspace = workspace.mutable_data_ptr();
  check_status(op, cuda::moe_ffn_fp8(c.params, current_stream(x)));
  return y;
}

MOE_CUDA_LIBRARY(m) { m.impl("moe_ffn_fp8", MOE_CUDA_BOX(moe_ffn_fp8_cuda)); }

#endif  // MOE_OPS_WITH_CUDA

}  // namespace moe_ops::adapter
