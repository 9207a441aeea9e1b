#include "moe_ops/moe_ffn_fp8.h"

#include "torch/device.h"
#include "torch/fp8.h"
#include "torch/moe_ffn/checks.h"

namespace moe_ops::adapter {

namespace {

constexpr const char* kOp = "moe_ffn_fp8";

// Arguments of a call. P = 2I for gated activations, else I.
struct Inputs {
  const Tensor& x;                // [T, H], floats or codes
  const Tensor& w_gate_up;        // [E, P, H] codes
  const Tensor& w_gate_up_scale;  // [E, ceil(P / 128), ceil(H / 128)]
  const Tensor& w_down;           // [E, H, I] codes
  const Tensor& w_down_scale;     // [E, ceil(H / 128), ceil(I / 128)]
  const Tensor& topk_weights;     // [T, K]
  const Tensor& topk_ids;         // [T, K]
  const OptTensor& b_gate_up;     // [E, P] or none
  const OptTensor& b_down;        // [E, H] or none
  ActivationParams act;
  bool on_input;             // apply_router_weight_on_input
  const OptTensor& x_scale;  // [T, ceil(H / 128)] if x is codes
  const OptType& out_dtype;  // type of the result; none: x's
};

// Parameters of a checked call, but for its routing, outputs and workspace, and the tensors that
// they point to.
struct Call {
  Sizes sizes;
  ScalarType y_dtype;
  MoeFfnFp8Params params;
  Tensor x, x_scale, weights;
  Fp8Weights up, down;
  Bias up_bias, down_bias;
};

Call make_call(const Op& op, const Inputs& in) {
  check_index(op, "topk_ids", in.topk_ids);
  check_dim(op, "topk_ids", in.topk_ids, 2, "[T, K]");
  Call c;
  MoeFfnFp8Params& p = c.params;
  p.has_codes = in.x_scale.has_value();
  DType type = DType::kFloat32;  // of x, or of sums of codes
  if (p.has_codes) {
    check_fp8(op, "x", in.x);
    MOE_CHECK(in.out_dtype.has_value(), op, ": out_dtype must be given with x_scale, got None.");
    c.y_dtype = *in.out_dtype;
    p.y_type = check_out_dtype(op, c.y_dtype);
  } else {
    type = check_float_to_fp8(op, "x", in.x);
    c.y_dtype = in.out_dtype.value_or(in.x.scalar_type());
    p.y_type = check_result_type(op, "out_dtype", c.y_dtype, in.x, type);
  }
  const Sizes s =
      check_ffn(op, type, {in.x, in.w_gate_up, in.w_down, in.topk_weights}, in.topk_ids.size(1),
                in.act, [&](const char* name, const Tensor& w, const char* shape) {
                  const bool up = &w == &in.w_gate_up;
                  check_fp8_weights(op, name, up ? "w_gate_up_scale" : "w_down_scale", w,
                                    up ? in.w_gate_up_scale : in.w_down_scale, shape);
                });
  c.sizes = s;
  check_size(op, "topk_ids", in.topk_ids, 0, s.T, "T");
  const DType up_bias_type = fp8_bias_type(op, "b_gate_up", in.b_gate_up);
  const DType down_bias_type = fp8_bias_type(op, "b_down", in.b_down);
  if (p.has_codes) {
    check_bias_shapes(op, in.b_gate_up, in.b_down, s);
  } else {
    check_biases(op, in.b_gate_up, in.b_down, in.x, s);
  }
  c.x = with_dense_rows(in.x);
  if (p.has_codes) {
    check_fp8_scale(op, "x_scale", *in.x_scale);
    check_dim(op, "x_scale", *in.x_scale, 2, "[T, ceil(H / 128)]");
    check_size(op, "x_scale", *in.x_scale, 0, s.T, "T");
    check_size(op, "x_scale", *in.x_scale, 1, fp8_blocks(s.H), "the blocks of 128 inputs");
    c.x_scale = with_dense_rows(*in.x_scale);
    p.x_codes = {static_cast<const uint8_t*>(c.x.const_data_ptr()), row_stride(c.x),
                 static_cast<const float*>(c.x_scale.const_data_ptr()), row_stride(c.x_scale),
                 nullptr};
  } else {
    p.x = rows_of(c.x, type);
  }
  c.weights = contiguous_as(in.topk_weights, ScalarType::Float);
  c.up = fp8_weights(in.w_gate_up, in.w_gate_up_scale);
  c.down = fp8_weights(in.w_down, in.w_down_scale);
  c.up_bias = bias_of(in.b_gate_up, up_bias_type);
  c.down_bias = bias_of(in.b_down, down_bias_type);
  p.desc = desc_of(s, {}, c.weights, in.on_input);
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
  Call c =
      make_call(kOp, {.x = x,
                      .w_gate_up = w_gate_up,
                      .w_gate_up_scale = w_gate_up_scale,
                      .w_down = w_down,
                      .w_down_scale = w_down_scale,
                      .topk_weights = topk_weights,
                      .topk_ids = topk_ids,
                      .b_gate_up = b_gate_up,
                      .b_down = b_down,
                      .act = check_activation(kOp, activation, interleaved, alpha, limit, false),
                      .on_input = apply_router_weight_on_input,
                      .x_scale = x_scale,
                      .out_dtype = out_dtype});
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
  Call c = make_call(op, {.x = x,
                          .w_gate_up = w_gate_up,
                          .w_gate_up_scale = w_gate_up_scale,
                          .w_down = w_down,
                          .w_down_scale = w_down_scale,
                          .topk_weights = topk_weights,
                          .topk_ids = topk_ids,
                          .b_gate_up = b_gate_up,
                          .b_down = b_down,
                          .act = check_activation(op, activation, interleaved, alpha, limit, false),
                          .on_input = apply_router_weight_on_input,
                          .x_scale = x_scale,
                          .out_dtype = out_dtype});
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
