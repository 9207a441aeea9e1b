#include "moe_ops/moe_ffn_fp8.h"

#include "torch/activation.h"
#include "torch/device.h"
#include "torch/fp8.h"
#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

namespace {

constexpr const char* kOp = "moe_ffn_fp8";

struct Sizes {
  DType type;
  ActivationParams act;
  int64_t T, H, I, E, K, width;
};

void check_bias(const Op& op, const char* name, const OptTensor& bias, const Tensor& x, int64_t E,
                int64_t features, const char* shape) {
  if (!bias.has_value()) return;
  check_same_dtype(op, name, *bias, "x", x);
  check_dim(op, name, *bias, 2, shape);
  check_size(op, name, *bias, 0, E, "E");
  check_size(op, name, *bias, 1, features, "the number of features");
}

Sizes check(const Op& op, const Tensor& x, const Tensor& w_gate_up, const Tensor& w_gate_up_scale,
            const Tensor& w_down, const Tensor& w_down_scale, const Tensor& topk_weights,
            const Tensor& topk_ids, const OptTensor& b_gate_up, const OptTensor& b_down,
            const std::string& activation, bool interleaved, double alpha, double limit) {
  Sizes s;
  s.act = check_activation(op, activation, interleaved, alpha, limit, false);
  const bool gated = is_gated(s.act.kind);
  check_index(op, "topk_ids", topk_ids);
  check_dim(op, "topk_ids", topk_ids, 2, "[T, K]");
  s.type = check_float_to_fp8(op, "x", x);
  check_dim(op, "x", x, 2, "[T, H]");
  s.T = x.size(0);
  s.H = x.size(1);
  s.K = topk_ids.size(1);
  check_fp8_weights(op, "w_gate_up", "w_gate_up_scale", w_gate_up, w_gate_up_scale,
                    gated ? "[E, 2I, H]" : "[E, I, H]");
  s.E = w_gate_up.size(0);
  s.width = w_gate_up.size(1);
  MOE_CHECK(s.E >= 1, op, ": w_gate_up must hold at least one expert, got shape ",
            shape_string(w_gate_up), ".");
  check_size(op, "w_gate_up", w_gate_up, 2, s.H, "H");
  MOE_CHECK(!gated || s.width % 2 == 0, op,
            ": w_gate_up must have an even number 2I of features, got shape ",
            shape_string(w_gate_up), ".");
  s.I = gated ? s.width / 2 : s.width;
  check_fp8_weights(op, "w_down", "w_down_scale", w_down, w_down_scale, "[E, H, I]");
  check_size(op, "w_down", w_down, 0, s.E, "E");
  check_size(op, "w_down", w_down, 1, s.H, "H");
  check_size(op, "w_down", w_down, 2, s.I, "I");
  check_float(op, "topk_weights", topk_weights);
  check_dim(op, "topk_weights", topk_weights, 2, "[T, K]");
  check_size(op, "topk_weights", topk_weights, 0, s.T, "T");
  check_size(op, "topk_weights", topk_weights, 1, s.K, "K");
  check_size(op, "topk_ids", topk_ids, 0, s.T, "T");
  check_bias(op, "b_gate_up", b_gate_up, x, s.E, s.width, gated ? "[E, 2I]" : "[E, I]");
  check_bias(op, "b_down", b_down, x, s.E, s.H, "[E, H]");
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
  p.desc = {slots.routing, weights.const_data_ptr(), s.H, s.I, s.act, apply_router_weight_on_input};
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
  p.desc = {slots.routing, weights.const_data_ptr(), s.H, s.I, s.act, apply_router_weight_on_input};
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
