#include "moe_ops/moe_ffn_fp8.h"

#include "torch/device.h"
#include "torch/fp8.h"
#include "torch/moe_ffn/checks.h"

namespace moe_ops::adapter {

namespace {

constexpr const char* kOp = "moe_ffn_fp8";

Sizes check(const Op& op, const Tensor& x, const Tensor& w_gate_up, const Tensor& w_gate_up_scale,
            const Tensor& w_down, const Tensor& w_down_scale, const Tensor& topk_weights,
            const Tensor& topk_ids, const OptTensor& b_gate_up, const OptTensor& b_down,
            const std::string& activation, bool interleaved, double alpha, double limit) {
  const ActivationParams act = check_activation(op, activation, interleaved, alpha, limit, false);
  check_index(op, "topk_ids", topk_ids);
  check_dim(op, "topk_ids", topk_ids, 2, "[T, K]");
  const DType type = check_float_to_fp8(op, "x", x);
  const Sizes s = check_ffn(op, type, x, w_gate_up, w_down, topk_weights, topk_ids.size(1), act,
                            [&](const char* name, const Tensor& w, const char* shape) {
                              const bool up = &w == &w_gate_up;
                              check_fp8_weights(op, name, up ? "w_gate_up_scale" : "w_down_scale",
                                                w, up ? w_gate_up_scale : w_down_scale, shape);
                            });
  check_size(op, "topk_ids", topk_ids, 0, s.T, "T");
  check_biases(op, b_gate_up, b_down, x, s);
  return s;
}

Tensor moe_ffn_fp8(const Tensor& x, const Tensor& w_gate_up, const Tensor& w_gate_up_scale,
                   const Tensor& w_down, const Tensor& w_down_scale, const Tensor& topk_weights,
                   const Tensor& topk_ids, const OptTensor& b_gate_up, const OptTensor& b_down,
                   std::string activation, bool interleaved, bool apply_router_weight_on_input,
                   double alpha, double limit) {
  const Sizes s = check(kOp, x, w_gate_up, w_gate_up_scale, w_down, w_down_scale, topk_weights,
                        topk_ids, b_gate_up, b_down, activation, interleaved, alpha, limit);
  const SlotIds slots = slot_ids(kOp, topk_ids, s.E);
  const Tensor src = with_dense_rows(x);
  const Tensor weights = contiguous_as(topk_weights, ScalarType::Float);
  const Fp8Weights up = fp8_weights(w_gate_up, w_gate_up_scale);
  const Fp8Weights down = fp8_weights(w_down, w_down_scale);
  const Bias up_bias = bias_of(b_gate_up, s.type);
  const Bias down_bias = bias_of(b_down, s.type);
  Tensor y = empty_cpu(kOp, {s.T, s.H}, x.scalar_type());
  MoeFfnFp8Params p;
  p.desc = desc_of(s, slots.routing, weights, apply_router_weight_on_input);
  p.x = rows_of(src, s.type);
  p.w_gate_up = up.matrices;
  p.w_down = down.matrices;
  p.b_gate_up = up_bias.vectors;
  p.b_down = down_bias.vectors;
  p.y = y.mutable_data_ptr();
  cpu::moe_ffn_fp8(p, torch_parallel());
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
                               bool apply_router_weight_on_input, double alpha, double limit) {
  const Op op(kOp, x);
  const Sizes s = check(op, x, w_gate_up, w_gate_up_scale, w_down, w_down_scale, topk_weights,
                        topk_ids, b_gate_up, b_down, activation, interleaved, alpha, limit);
  const SortedSlots slots = device_sorted_slots(op, topk_ids, s.E);
  const Tensor src = with_dense_rows(x);
  const Tensor weights = contiguous_as(topk_weights, ScalarType::Float);
  const Fp8Weights up = fp8_weights(w_gate_up, w_gate_up_scale);
  const Fp8Weights down = fp8_weights(w_down, w_down_scale);
  const Bias up_bias = bias_of(b_gate_up, s.type);
  const Bias down_bias = bias_of(b_down, s.type);
  Tensor y = device_empty(x, {s.T, s.H}, x.scalar_type());
  MoeFfnFp8Params p;
  p.desc = desc_of(s, slots.routing, weights, apply_router_weight_on_input);
  p.x = rows_of(src, s.type);
  p.w_gate_up = up.matrices;
  p.w_down = down.matrices;
  p.b_gate_up = up_bias.vectors;
  p.b_down = down_bias.vectors;
  p.y = y.mutable_data_ptr();
  Tensor workspace = device_empty(x, {cuda::moe_ffn_fp8_workspace(p)}, ScalarType::Byte);
  p.workspace = workspace.mutable_data_ptr();
  check_status(op, cuda::moe_ffn_fp8(p, current_stream(x)));
  return y;
}

MOE_CUDA_LIBRARY(m) { m.impl("moe_ffn_fp8", MOE_CUDA_BOX(moe_ffn_fp8_cuda)); }

#endif  // MOE_OPS_WITH_CUDA

}  // namespace moe_ops::adapter
