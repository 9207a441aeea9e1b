#ifdef MOE_OPS_WITH_CUDA

#include "moe_ops/moe_ffn.h"
#include "torch/device.h"
#include "torch/moe_ffn/checks.h"

namespace moe_ops::adapter {

namespace {

// Runs a call. save: keeps the pre-activation for a backward.
FfnOutputs run_ffn(const Op& op, const FfnInputs& in, bool save) {
  const Sizes s = check_fwd(op, in);
  const ScalarType type = in.x.scalar_type(), y_dtype = in.out_dtype.value_or(type);
  const DType y_type = check_result_type(op, "out_dtype", y_dtype, in.x, s.type);
  const UnsortedSlots slots = device_unsorted_slots(op, in.topk_ids, s.E);
  const Tensor src = token_rows(in.x);
  const Weights up = weights_of(in.w_gate_up, s.type);
  const Weights down = weights_of(in.w_down, s.type);
  const Bias up_bias = bias_of(in.b_gate_up, s.type);
  const Bias down_bias = bias_of(in.b_down, s.type);
  const Tensor weights = contiguous_as(in.topk_weights, accumulate_type(type));
  Tensor y = device_empty(in.x, {s.T, s.H}, y_dtype);
  Tensor preact = device_empty_if(save, in.x, {s.T * s.K, s.width}, type);
  MoeFfnParams p;
  p.desc = desc_of(s, slots.sorted.routing, weights, in.on_input);
  p.sort = slots.sort;
  p.x = rows_of(src, s.type);
  p.w_gate_up = up.matrices;
  p.w_down = down.matrices;
  p.b_gate_up = up_bias.vectors;
  p.b_down = down_bias.vectors;
  p.y = y.mutable_data_ptr();
  p.y_type = y_type;
  p.preact = data_if(save, preact);
  Tensor workspace = device_empty(in.x, {cuda::moe_ffn_workspace(p)}, ScalarType::Byte);
  p.workspace = workspace.mutable_data_ptr();
  check_status(op, cuda::moe_ffn(p, current_stream(in.x)));
  const SortedSlots& maps = slots.sorted;
  return {y, preact, maps.expert_offsets, maps.row_to_slot, maps.slot_to_row};
}

Tensor moe_ffn_cuda(const Tensor& x, const Tensor& w_gate_up, const Tensor& w_down,
                    const Tensor& topk_weights, const Tensor& topk_ids, const OptTensor& b_gate_up,
                    const OptTensor& b_down, std::string activation, bool interleaved,
                    bool apply_router_weight_on_input, double alpha, double limit,
                    const OptType& out_dtype) {
  const Op op("moe_ffn", x);
  return std::get<0>(
      run_ffn(op,
              {.x = x,
               .w_gate_up = w_gate_up,
               .w_down = w_down,
               .topk_weights = topk_weights,
               .topk_ids = topk_ids,
               .b_gate_up = b_gate_up,
               .b_down = b_down,
               .act = check_activation(op, activation, interleaved, alpha, limit, false),
               .on_input = apply_router_weight_on_input,
               .out_dtype = out_dtype},
              false));
}

FfnOutputs moe_ffn_fwd_cuda(const Tensor& x, const Tensor& w_gate_up, const Tensor& w_down,
                            const Tensor& topk_weights, const Tensor& topk_ids,
                            const OptTensor& b_gate_up, const OptTensor& b_down,
                            std::string activation, bool interleaved,
                            bool apply_router_weight_on_input, double alpha, double limit,
                            const OptType& out_dtype) {
  const Op op("moe_ffn", x);
  return run_ffn(op,
                 {.x = x,
                  .w_gate_up = w_gate_up,
                  .w_down = w_down,
                  .topk_weights = topk_weights,
                  .topk_ids = topk_ids,
                  .b_gate_up = b_gate_up,
                  .b_down = b_down,
                  .act = check_activation(op, activation, interleaved, alpha, limit, false),
                  .on_input = apply_router_weight_on_input,
                  .out_dtype = out_dtype},
                 true);
}

FfnGradients run_bwd(const Op& op, const FfnBwdInputs& in) {
  const Sizes s = check_bwd(op, in);
  const ScalarType type = in.x.scalar_type(), acc = accumulate_type(type);
  const Tensor offsets = device_offsets(op, in.expert_offsets, s.T * s.K);
  const Tensor rows = contiguous_as(in.row_to_slot, ScalarType::Int);
  const Tensor slots = contiguous_as(in.slot_to_row, ScalarType::Int);
  const Tensor gy =
      token_rows(in.grad_y.scalar_type() == type ? in.grad_y : contiguous_as(in.grad_y, type));
  const Tensor src = token_rows(in.x);
  const Tensor pre = dense(in.preact);
  const Tensor weights = contiguous_as(in.topk_weights, acc);
  const Weights up = weights_of(in.w_gate_up, s.type);
  const Weights down = weights_of(in.w_down, s.type);
  const Bias down_bias = bias_of(in.b_down, s.type);
  // A tensor for a gradient that is wanted, and where its kernel writes.
  const auto wanted = [&](bool need, std::initializer_list<int64_t> sizes, ScalarType t,
                          void*& out) {
    Tensor grad = device_empty_if(need, in.x, sizes, t);
    out = data_if(need, grad);
    return grad;
  };
  MoeFfnBwdParams p;
  p.desc = desc_of(s, routing_of(offsets, rows, slots), weights, in.on_input);
  p.grad_y = rows_of(gy, s.type);
  p.x = rows_of(src, s.type);
  p.w_gate_up = up.matrices;
  p.w_down = down.matrices;
  p.b_down = down_bias.vectors;
  p.preact = pre.const_data_ptr();
  Tensor grad_x = wanted(in.need.x, {s.T, s.H}, type, p.grad_x);
  // Gradients of weights lie as the weights do: autograd would copy others.
  const auto wanted_like = [&](bool need, const Tensor& w, void*& out, bool& transpose) {
    transpose = need && is_transposed(w);
    if (!transpose) return wanted(need, {w.size(0), w.size(1), w.size(2)}, type, out);
    const Tensor grad = wanted(true, {w.size(0), w.size(2), w.size(1)}, type, out);
    return torch::stable::transpose(grad, 1, 2);
  };
  Tensor grad_w_gate_up =
      wanted_like(in.need.w_gate_up, in.w_gate_up, p.grad_w_gate_up, p.transpose_grad_w_gate_up);
  Tensor grad_w_down =
      wanted_like(in.need.w_down, in.w_down, p.grad_w_down, p.transpose_grad_w_down);
  Tensor grad_topk_weights = wanted(in.need.topk_weights, {s.T, s.K}, acc, p.grad_topk_weights);
  Tensor grad_b_gate_up = wanted(in.need.b_gate_up, {s.E, s.width}, type, p.grad_b_gate_up);
  Tensor grad_b_down = wanted(in.need.b_down, {s.E, s.H}, type, p.grad_b_down);
  p.grad_w_gate_up_type = p.grad_w_down_type = s.type;
  p.accumulate_w_gate_up = in.main_w_gate_up.has_value();
  p.accumulate_w_down = in.main_w_down.has_value();
  if (in.main_w_gate_up.has_value()) {
    p.grad_w_gate_up_type =
        check_main_grad(op, "main_grad of w_gate_up", *in.main_w_gate_up, in.x, in.w_gate_up, true);
    p.transpose_grad_w_gate_up = is_transposed(*in.main_w_gate_up);
    p.grad_w_gate_up = in.main_w_gate_up->mutable_data_ptr();
  }
  if (in.main_w_down.has_value()) {
    p.grad_w_down_type =
        check_main_grad(op, "main_grad of w_down", *in.main_w_down, in.x, in.w_down, true);
    p.transpose_grad_w_down = is_transposed(*in.main_w_down);
    p.grad_w_down = in.main_w_down->mutable_data_ptr();
  }
  Tensor workspace = device_empty(in.x, {cuda::moe_ffn_bwd_workspace(p)}, ScalarType::Byte);
  p.workspace = workspace.mutable_data_ptr();
  check_status(op, cuda::moe_ffn_bwd(p, current_stream(in.x)));
  return {grad_x, grad_w_gate_up, grad_w_down, grad_topk_weights, grad_b_gate_up, grad_b_down};
}

FfnGradients moe_ffn_bwd_cuda(const Tensor& grad_y, const Tensor& x, const Tensor& w_gate_up,
                              const Tensor& w_down, const Tensor& topk_weights,
                              const Tensor& preact, const Tensor& expert_offsets,
                              const Tensor& row_to_slot, const Tensor& slot_to_row,
                              const OptTensor& b_down, std::string activation, bool interleaved,
                              bool apply_router_weight_on_input, double alpha, double limit,
                              bool need_x, bool need_w_gate_up, bool need_w_down,
                              bool need_topk_weights, bool need_b_gate_up, bool need_b_down) {
  const Op op("moe_ffn_bwd", x);
  return run_bwd(op, {.grad_y = grad_y,
                      .x = x,
                      .w_gate_up = w_gate_up,
                      .w_down = w_down,
                      .topk_weights = topk_weights,
                      .preact = preact,
                      .expert_offsets = expert_offsets,
                      .row_to_slot = row_to_slot,
                      .slot_to_row = slot_to_row,
                      .b_down = b_down,
                      .act = check_activation(op, activation, interleaved, alpha, limit, false),
                      .on_input = apply_router_weight_on_input,
                      .need = {.x = need_x,
                               .w_gate_up = need_w_gate_up,
                               .w_down = need_w_down,
                               .topk_weights = need_topk_weights,
                               .b_gate_up = need_b_gate_up,
                               .b_down = need_b_down},
                      .main_w_gate_up = {},
                      .main_w_down = {}});
}

FfnGradients moe_ffn_bwd_accumulate_cuda(
    const Tensor& grad_y, const Tensor& x, const Tensor& w_gate_up, const Tensor& w_down,
    const Tensor& topk_weights, const Tensor& preact, const Tensor& expert_offsets,
    const Tensor& row_to_slot, const Tensor& slot_to_row, const OptTensor& b_down,
    std::string activation, bool interleaved, bool apply_router_weight_on_input, double alpha,
    double limit, bool need_x, bool need_w_gate_up, bool need_w_down, bool need_topk_weights,
    bool need_b_gate_up, bool need_b_down, const OptTensor& main_w_gate_up,
    const OptTensor& main_w_down) {
  const Op op("moe_ffn_bwd_accumulate", x);
  return run_bwd(op, {.grad_y = grad_y,
                      .x = x,
                      .w_gate_up = w_gate_up,
                      .w_down = w_down,
                      .topk_weights = topk_weights,
                      .preact = preact,
                      .expert_offsets = expert_offsets,
                      .row_to_slot = row_to_slot,
                      .slot_to_row = slot_to_row,
                      .b_down = b_down,
                      .act = check_activation(op, activation, interleaved, alpha, limit, false),
                      .on_input = apply_router_weight_on_input,
                      .need = {.x = need_x,
                               .w_gate_up = need_w_gate_up && !main_w_gate_up.has_value(),
                               .w_down = need_w_down && !main_w_down.has_value(),
                               .topk_weights = need_topk_weights,
                               .b_gate_up = need_b_gate_up,
                               .b_down = need_b_down},
                      .main_w_gate_up = main_w_gate_up,
                      .main_w_down = main_w_down});
}

}  // namespace

MOE_CUDA_LIBRARY(m) {
  m.impl("moe_ffn", MOE_CUDA_BOX(moe_ffn_cuda));
  m.impl("moe_ffn_fwd", MOE_CUDA_BOX(moe_ffn_fwd_cuda));
  m.impl("moe_ffn_bwd", MOE_CUDA_BOX(moe_ffn_bwd_cuda));
  m.impl("moe_ffn_bwd_accumulate", MOE_CUDA_BOX(moe_ffn_bwd_accumulate_cuda));
}

}  // namespace moe_ops::adapter

#endif  // MOE_OPS_WITH_CUDA
