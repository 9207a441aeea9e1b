#include "moe_ops/moe_ffn_quantized.h"

#include "torch/device.h"
#include "torch/moe_ffn/quantized_checks.h"

namespace moe_ops::adapter {

namespace {

constexpr const char* kOp = "moe_ffn_quantized";

using Inputs = QuantizedFfnInputs;
using Call = QuantizedFfnCall;

// The operands of a call, and the copies that some of them need.
struct Operands {
  Tensor src, weights;
  OptTensor factors;
  Bias up_bias, down_bias;
  MoeFfnQuantizedParams params;

  Operands(const Call& call, const Routing& routing, const Inputs& in, Tensor& y)
      : src(with_dense_rows(in.x)),
        weights(contiguous_as(in.topk_weights, ScalarType::Float)),
        factors(contiguous_as(in.x_scale, ScalarType::Float)),
        up_bias(bias_of(in.b_gate_up, call.sizes.type)),
        down_bias(bias_of(in.b_down, call.sizes.type)) {
    params.desc = desc_of(call.sizes, routing, weights, in.on_input);
    params.x = rows_of(src, call.sizes.type);
    params.x_scale =
        factors.has_value() ? static_cast<const float*>(factors->const_data_ptr()) : nullptr;
    params.w_gate_up = call.up.matrices;
    params.w_down = call.down.matrices;
    params.b_gate_up = up_bias.vectors;
    params.b_down = down_bias.vectors;
    params.y = y.mutable_data_ptr();
  }
};

Tensor moe_ffn_quantized(const Tensor& x, const Tensor& w_gate_up, const Tensor& w_gate_up_scale,
                         const Tensor& w_down, const Tensor& w_down_scale,
                         const Tensor& topk_weights, const Tensor& topk_ids, std::string format,
                         const OptTensor& x_scale, const OptTensor& b_gate_up,
                         const OptTensor& b_down, std::string activation, bool interleaved,
                         bool apply_router_weight_on_input, double alpha, double limit,
                         const OptTensor& w_gate_up_zero, const OptTensor& w_down_zero) {
  const Inputs in = {.x = x,
                     .w_gate_up = w_gate_up,
                     .w_gate_up_scale = w_gate_up_scale,
                     .w_down = w_down,
                     .w_down_scale = w_down_scale,
                     .topk_weights = topk_weights,
                     .topk_ids = topk_ids,
                     .x_scale = x_scale,
                     .b_gate_up = b_gate_up,
                     .b_down = b_down,
                     .act = check_activation(kOp, activation, interleaved, alpha, limit, false),
                     .on_input = apply_router_weight_on_input,
                     .format = format,
                     .w_gate_up_zero = w_gate_up_zero,
                     .w_down_zero = w_down_zero};
  const Call call = check(kOp, in);
  const Sizes& s = call.sizes;
  const SlotIds slots = slot_ids(kOp, topk_ids, s.E);
  Tensor y = empty_cpu(kOp, {s.T, s.H}, x.scalar_type());
  const Operands operands(call, slots.routing, in, y);
  cpu::moe_ffn_quantized(operands.params, torch_parallel());
  return y;
}

FfnOutputs moe_ffn_quantized_fwd(const Tensor& x, const Tensor& w_gate_up,
                                 const Tensor& w_gate_up_scale, const Tensor& w_down,
                                 const Tensor& w_down_scale, const Tensor& topk_weights,
                                 const Tensor& topk_ids, std::string format,
                                 const OptTensor& x_scale, const OptTensor& b_gate_up,
                                 const OptTensor& b_down, std::string activation, bool interleaved,
                                 bool apply_router_weight_on_input, double alpha, double limit,
                                 const OptTensor& w_gate_up_zero, const OptTensor& w_down_zero) {
  const Inputs in = {.x = x,
                     .w_gate_up = w_gate_up,
                     .w_gate_up_scale = w_gate_up_scale,
                     .w_down = w_down,
                     .w_down_scale = w_down_scale,
                     .topk_weights = topk_weights,
                     .topk_ids = topk_ids,
                     .x_scale = x_scale,
                     .b_gate_up = b_gate_up,
                     .b_down = b_down,
                     .act = check_activation(kOp, activation, interleaved, alpha, limit, false),
                     .on_input = apply_router_weight_on_input,
                     .format = format,
                     .w_gate_up_zero = w_gate_up_zero,
                     .w_down_zero = w_down_zero};
  const Call call = check(kOp, in);
  const Sizes& s = call.sizes;
  const SortedSlots slots = sorted_slots(kOp, topk_ids, s.E);
  Tensor y = empty_cpu(kOp, {s.T, s.H}, x.scalar_type());
  Tensor preact = empty_cpu(kOp, {s.T * s.K, s.width}, x.scalar_type());
  Operands operands(call, slots.routing, in, y);
  operands.params.preact = preact.mutable_data_ptr();
  cpu::moe_ffn_quantized(operands.params, torch_parallel());
  return {y, preact, slots.expert_offsets, slots.row_to_slot, slots.slot_to_row};
}

// Computes the gradients of x and of the routing weights, by GEMMs with transposed weights that are
// dequantized in cache.
std::tuple<Tensor, Tensor> moe_ffn_quantized_bwd(
    const Tensor& grad_y, const Tensor& x, const Tensor& w_gate_up, const Tensor& w_gate_up_scale,
    const Tensor& w_down, const Tensor& w_down_scale, const Tensor& topk_weights,
    const Tensor& preact, const Tensor& expert_offsets, const Tensor& row_to_slot,
    const Tensor& slot_to_row, std::string format, const OptTensor& b_gate_up,
    const OptTensor& b_down, std::string activation, bool interleaved,
    bool apply_router_weight_on_input, double alpha, double limit, const OptTensor& w_gate_up_zero,
    const OptTensor& w_down_zero, bool need_x, bool need_topk_weights) {
  constexpr const char* kBwdOp = "moe_ffn_quantized_bwd";
  const Inputs in = {.x = x,
                     .w_gate_up = w_gate_up,
                     .w_gate_up_scale = w_gate_up_scale,
                     .w_down = w_down,
                     .w_down_scale = w_down_scale,
                     .topk_weights = topk_weights,
                     .topk_ids = slot_to_row,
                     .x_scale = {},
                     .b_gate_up = b_gate_up,
                     .b_down = b_down,
                     .act = check_activation(kBwdOp, activation, interleaved, alpha, limit, false),
                     .on_input = apply_router_weight_on_input,
                     .format = format,
                     .w_gate_up_zero = w_gate_up_zero,
                     .w_down_zero = w_down_zero};
  const Call call = check(kBwdOp, in);
  const Sizes& s = call.sizes;
  check_saved(kBwdOp, s, grad_y, x, preact, expert_offsets, row_to_slot, slot_to_row);
  const int64_t N = s.T * s.K;
  const Tensor offsets = checked_offsets(kBwdOp, expert_offsets, N);
  const Tensor rows = checked_map(kBwdOp, "row_to_slot", row_to_slot, N);
  const Tensor slots = checked_map(kBwdOp, "slot_to_row", slot_to_row, N);
  const Tensor gy = with_dense_rows(grad_y), src = with_dense_rows(x), pre = dense(preact);
  const Tensor weights = contiguous_as(topk_weights, ScalarType::Float);
  const Bias down_bias = bias_of(b_down, s.type);
  Tensor grad_x = empty_cpu_if(need_x, kBwdOp, {s.T, s.H}, x.scalar_type());
  Tensor grad_topk_weights = empty_cpu_if(need_topk_weights, kBwdOp, {s.T, s.K}, ScalarType::Float);
  MoeFfnBwdParams p{};
  p.desc = desc_of(s, routing_of(offsets, rows, slots), weights, apply_router_weight_on_input);
  p.grad_y = rows_of(gy, check_float(kBwdOp, "grad_y", gy));
  p.x = rows_of(src, s.type);
  p.w_gate_up = matrices_of(call.up.matrices, s.type);
  p.w_down = matrices_of(call.down.matrices, s.type);
  p.b_down = down_bias.vectors;
  p.preact = pre.const_data_ptr();
  p.grad_x = data_if(need_x, grad_x);
  p.grad_topk_weights = data_if(need_topk_weights, grad_topk_weights);
  cpu::moe_ffn_bwd(p, torch_parallel());
  return {grad_x, grad_topk_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) {
  m.impl("moe_ffn_quantized", MOE_BOX(moe_ffn_quantized));
  m.impl("moe_ffn_quantized_fwd", MOE_BOX(moe_ffn_quantized_fwd));
  m.impl("moe_ffn_quantized_bwd", MOE_BOX(moe_ffn_quantized_bwd));
}

#ifdef MOE_OPS_WITH_CUDA

static Tensor moe_ffn_quantized_cuda(const Tensor& x, const Tensor& w_gate_up,
                                     const Tensor& w_gate_up_scale, const Tensor& w_down,
                                     const Tensor& w_down_scale, const Tensor& topk_weights,
                                     const Tensor& topk_ids, std::string format,
                                     const OptTensor& x_scale, const OptTensor& b_gate_up,
                                     const OptTensor& b_down, std::string activation,
                                     bool interleaved, bool apply_router_weight_on_input,
                                     double alpha, double limit, const OptTensor& w_gate_up_zero,
                                     const OptTensor& w_down_zero) {
  const Op op(kOp, x);
  const Inputs in = {.x = x,
                     .w_gate_up = w_gate_up,
                     .w_gate_up_scale = w_gate_up_scale,
                     .w_down = w_down,
                     .w_down_scale = w_down_scale,
                     .topk_weights = topk_weights,
                     .topk_ids = topk_ids,
                     .x_scale = x_scale,
                     .b_gate_up = b_gate_up,
                     .b_down = b_down,
                     .act = check_activation(op, activation, interleaved, alpha, limit, false),
                     .on_input = apply_router_weight_on_input,
                     .format = format,
                     .w_gate_up_zero = w_gate_up_zero,
                     .w_down_zero = w_down_zero};
  Call call = check(op, in);
  align_records(call.up);
  align_records(call.down);
  const Sizes& s = call.sizes;
  const SortedSlots slots = device_sorted_slots(op, topk_ids, s.E);
  Tensor y = device_empty(x, {s.T, s.H}, x.scalar_type());
  Operands operands(call, slots.routing, in, y);
  MoeFfnQuantizedParams& p = operands.params;
  Tensor workspace = device_empty(x, {cuda::moe_ffn_quantized_workspace(p)}, ScalarType::Byte);
  p.workspace = workspace.mutable_data_ptr();
  check_status(op, cuda::moe_ffn_quantized(p, current_stream(x)));
  return y;
}

MOE_CUDA_LIBRARY(m) { m.impl("moe_ffn_quantized", MOE_CUDA_BOX(moe_ffn_quantized_cuda)); }

#endif  // MOE_OPS_WITH_CUDA

}  // namespace moe_ops::adapter
