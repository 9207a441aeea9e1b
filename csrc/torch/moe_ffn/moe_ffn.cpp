#include "moe_ops/moe_ffn.h"

#include "cpu/gemm/prepack.h"
#include "torch/moe_ffn/checks.h"

namespace moe_ops::adapter {

namespace {

// Packed copies of the two weights.
struct Packed {
  const Tensor* gate_up;
  const Tensor* down;
  bool only;  // the weights themselves may not be read
};

// Returns the size in bytes of the packed copy of w.
int64_t packed_bytes(const Op& op, const char* name, const Tensor& w, DType type,
                     int64_t segments) {
  // Padding adds less than this to the features of a segment and to the depth.
  constexpr uint64_t kPadding = 64;
  auto most = static_cast<uint64_t>(dtype_size(type));
  const uint64_t features = static_cast<uint64_t>(w.size(1)) + segments * kPadding;
  const uint64_t depth = static_cast<uint64_t>(w.size(2)) + kPadding;
  const bool fits = !__builtin_mul_overflow(most, static_cast<uint64_t>(w.size(0)), &most) &&
                    !__builtin_mul_overflow(most, features, &most) &&
                    !__builtin_mul_overflow(most, depth, &most) &&
                    most <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
  MOE_CHECK(fits, op, ": ", name, " must take fewer than 2^63 bytes when it is packed, got shape ",
            shape_string(w), ".");
  return w.size(0) * cpu::panel_layout(type, w.size(1), w.size(2), segments).expert_bytes();
}

// Checks the packed copy of w and adds it to the matrices of w.
void set_packed(const Op& op, const char* name, const Tensor& packed, const Tensor& w,
                int64_t segments, ExpertMatrices& matrices) {
  check_device(op, name, packed);
  const int64_t bytes = packed_bytes(op, name, w, matrices.type, segments);
  MOE_CHECK(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 &&
                packed.numel() == bytes && packed.is_contiguous(),
            op, ": ", name,
            " must be what pack_experts makes of this weight on this machine, uint8 [", bytes,
            "], got ", dtype_name(packed.scalar_type()), " of shape ", shape_string(packed), ".");
  matrices.panels = packed.const_data_ptr();
}

// Runs a checked call. preact: kept for a backward; nullptr in inference.
Tensor run_ffn(const Op& op, const Sizes& s, const Routing& routing, const FfnInputs& in,
               Tensor* preact = nullptr, const Packed* packed = nullptr) {
  const ScalarType dtype = in.out_dtype.value_or(in.x.scalar_type());
  const DType y_type = check_result_type(op, "out_dtype", dtype, in.x, s.type);
  const bool packed_only = packed != nullptr && packed->only;
  const auto read = [&](const Tensor& w) {
    return packed_only ? Weights{w, {nullptr, s.type, 0, w.size(2), 1}} : weights_of(w, s.type);
  };
  const Weights up = read(in.w_gate_up), down = read(in.w_down);
  MoeFfnParams p;
  p.w_gate_up = up.matrices;
  p.w_down = down.matrices;
  if (packed != nullptr) {
    const int64_t segments = is_gated(s.act.kind) && !s.act.interleaved ? 2 : 1;
    set_packed(op, "packed_gate_up", *packed->gate_up, up.tensor, segments, p.w_gate_up);
    set_packed(op, "packed_down", *packed->down, down.tensor, 1, p.w_down);
  }
  const Tensor src = with_dense_rows(in.x);
  const Bias up_bias = bias_of(in.b_gate_up, s.type);
  const Bias down_bias = bias_of(in.b_down, s.type);
  const Tensor weights = contiguous_as(in.topk_weights, accumulate_type(in.x.scalar_type()));
  Tensor y = empty_cpu(op, {s.T, s.H}, dtype);
  if (preact != nullptr) *preact = empty_cpu(op, {s.T * s.K, s.width}, in.x.scalar_type());
  p.desc = desc_of(s, routing, weights, in.on_input);
  p.x = rows_of(src, s.type);
  p.b_gate_up = up_bias.vectors;
  p.b_down = down_bias.vectors;
  p.y = y.mutable_data_ptr();
  p.y_type = y_type;
  p.preact = preact != nullptr ? preact->mutable_data_ptr() : nullptr;
  cpu::moe_ffn(p, torch_parallel());
  return y;
}

Tensor infer(const Op& op, const FfnInputs& in, const Packed* packed = nullptr) {
  const Sizes s = check_fwd(op, in);
  const SlotIds slots = slot_ids(op, in.topk_ids, s.E);
  return run_ffn(op, s, slots.routing, in, nullptr, packed);
}

Tensor moe_ffn(const Tensor& x, const Tensor& w_gate_up, const Tensor& w_down,
               const Tensor& topk_weights, const Tensor& topk_ids, const OptTensor& b_gate_up,
               const OptTensor& b_down, std::string activation, bool interleaved,
               bool apply_router_weight_on_input, double alpha, double limit,
               const OptType& out_dtype) {
  constexpr const char* kOp = "moe_ffn";
  return infer(kOp, {.x = x,
                     .w_gate_up = w_gate_up,
                     .w_down = w_down,
                     .topk_weights = topk_weights,
                     .topk_ids = topk_ids,
                     .b_gate_up = b_gate_up,
                     .b_down = b_down,
                     .act = check_activation(kOp, activation, interleaved, alpha, limit, false),
                     .on_input = apply_router_weight_on_input,
                     .out_dtype = out_dtype});
}

Tensor moe_ffn_packed(const Tensor& x, const Tensor& w_gate_up, const Tensor& w_down,
                      const Tensor& packed_gate_up, const Tensor& packed_down,
                      const Tensor& topk_weights, const Tensor& topk_ids,
                      const OptTensor& b_gate_up, const OptTensor& b_down, std::string activation,
                      bool interleaved, bool apply_router_weight_on_input, double alpha,
                      double limit, const OptType& out_dtype, bool packed_only) {
  constexpr const char* kOp = "moe_ffn_packed";
  const Packed packed{&packed_gate_up, &packed_down, packed_only};
  return infer(kOp,
               {.x = x,
                .w_gate_up = w_gate_up,
                .w_down = w_down,
                .topk_weights = topk_weights,
                .topk_ids = topk_ids,
                .b_gate_up = b_gate_up,
                .b_down = b_down,
                .act = check_activation(kOp, activation, interleaved, alpha, limit, false),
                .on_input = apply_router_weight_on_input,
                .out_dtype = out_dtype},
               &packed);
}

Tensor pack_experts(const Tensor& w, bool halves) {
  constexpr const char* kOp = "pack_experts";
  const DType type = check_float(kOp, "w", w);
  check_dim(kOp, "w", w, 3, "[E, O, K]");
  MOE_CHECK(!halves || w.size(1) % 2 == 0, kOp,
            ": w must have an even number of features to have halves, got shape ", shape_string(w),
            ".");
  const int64_t segments = halves ? 2 : 1;
  const Weights weights = weights_of(w, type);
  Tensor packed = empty_cpu(kOp, {packed_bytes(kOp, "w", w, type, segments)}, ScalarType::Byte);
  cpu::pack_panels(weights.matrices, w.size(0), w.size(1), w.size(2), segments,
                   packed.mutable_data_ptr(), torch_parallel());
  return packed;
}

FfnOutputs moe_ffn_fwd(const Tensor& x, const Tensor& w_gate_up, const Tensor& w_down,
                       const Tensor& topk_weights, const Tensor& topk_ids,
                       const OptTensor& b_gate_up, const OptTensor& b_down, std::string activation,
                       bool interleaved, bool apply_router_weight_on_input, double alpha,
                       double limit, const OptType& out_dtype) {
  constexpr const char* kOp = "moe_ffn";
  const FfnInputs in = {.x = x,
                        .w_gate_up = w_gate_up,
                        .w_down = w_down,
                        .topk_weights = topk_weights,
                        .topk_ids = topk_ids,
                        .b_gate_up = b_gate_up,
                        .b_down = b_down,
                        .act = check_activation(kOp, activation, interleaved, alpha, limit, false),
                        .on_input = apply_router_weight_on_input,
                        .out_dtype = out_dtype};
  const Sizes s = check_fwd(kOp, in);
  const SortedSlots slots = sorted_slots(kOp, topk_ids, s.E);
  Tensor preact;
  const Tensor y = run_ffn(kOp, s, slots.routing, in, &preact);
  return {y, preact, slots.expert_offsets, slots.row_to_slot, slots.slot_to_row};
}

FfnGradients run_bwd(const Op& op, const FfnBwdInputs& in) {
  const Sizes s = check_bwd(op, in);
  const int64_t N = s.T * s.K;
  const Tensor offsets = checked_offsets(op, in.expert_offsets, N);
  const Tensor rows = checked_map(op, "row_to_slot", in.row_to_slot, N);
  const Tensor slots = checked_map(op, "slot_to_row", in.slot_to_row, N);

  const ScalarType type = in.x.scalar_type(), acc = accumulate_type(type);
  // The products of a bfloat16 block round it anyway; in float16 it might underflow.
  const bool rounds = type == ScalarType::BFloat16;
  const Tensor gy = with_dense_rows(
      rounds && in.grad_y.scalar_type() != type ? contiguous_as(in.grad_y, type) : in.grad_y);
  const Tensor src = with_dense_rows(in.x);
  const Tensor pre = dense(in.preact);
  const Tensor weights = contiguous_as(in.topk_weights, acc);
  const Weights up = weights_of(in.w_gate_up, s.type);
  const Weights down = weights_of(in.w_down, s.type);
  const Bias down_bias = bias_of(in.b_down, s.type);
  Tensor grad_x = empty_cpu_if(in.need.x, op, {s.T, s.H}, type);
  Tensor grad_w_gate_up = empty_cpu_if(in.need.w_gate_up, op, {s.E, s.width, s.H}, type);
  Tensor grad_w_down = empty_cpu_if(in.need.w_down, op, {s.E, s.H, s.I}, type);
  Tensor grad_topk_weights = empty_cpu_if(in.need.topk_weights, op, {s.T, s.K}, acc);
  Tensor grad_b_gate_up = empty_cpu_if(in.need.b_gate_up, op, {s.E, s.width}, type);
  Tensor grad_b_down = empty_cpu_if(in.need.b_down, op, {s.E, s.H}, type);
  MoeFfnBwdParams p;
  p.desc = desc_of(s, routing_of(offsets, rows, slots), weights, in.on_input);
  p.grad_y = rows_of(gy, check_float(op, "grad_y", gy));
  p.x = rows_of(src, s.type);
  p.w_gate_up = up.matrices;
  p.w_down = down.matrices;
  p.b_down = down_bias.vectors;
  p.preact = pre.const_data_ptr();
  p.grad_x = data_if(in.need.x, grad_x);
  p.grad_w_gate_up = data_if(in.need.w_gate_up, grad_w_gate_up);
  p.grad_w_down = data_if(in.need.w_down, grad_w_down);
  p.grad_w_gate_up_type = p.grad_w_down_type = s.type;
  p.accumulate_w_gate_up = in.main_w_gate_up.has_value();
  p.accumulate_w_down = in.main_w_down.has_value();
  if (in.main_w_gate_up.has_value()) {
    p.grad_w_gate_up_type =
        check_main_grad(op, "main_grad of w_gate_up", *in.main_w_gate_up, in.x, in.w_gate_up);
    p.grad_w_gate_up = in.main_w_gate_up->mutable_data_ptr();
  }
  if (in.main_w_down.has_value()) {
    p.grad_w_down_type =
        check_main_grad(op, "main_grad of w_down", *in.main_w_down, in.x, in.w_down);
    p.grad_w_down = in.main_w_down->mutable_data_ptr();
  }
  p.grad_topk_weights = data_if(in.need.topk_weights, grad_topk_weights);
  p.grad_b_gate_up = data_if(in.need.b_gate_up, grad_b_gate_up);
  p.grad_b_down = data_if(in.need.b_down, grad_b_down);
  cpu::moe_ffn_bwd(p, torch_parallel());
  return {grad_x, grad_w_gate_up, grad_w_down, grad_topk_weights, grad_b_gate_up, grad_b_down};
}

FfnGradients moe_ffn_bwd(const Tensor& grad_y, const Tensor& x, const Tensor& w_gate_up,
                         const Tensor& w_down, const Tensor& topk_weights, const Tensor& preact,
                         const Tensor& expert_offsets, const Tensor& row_to_slot,
                         const Tensor& slot_to_row, const OptTensor& b_down, std::string activation,
                         bool interleaved, bool apply_router_weight_on_input, double alpha,
                         double limit, bool need_x, bool need_w_gate_up, bool need_w_down,
                         bool need_topk_weights, bool need_b_gate_up, bool need_b_down) {
  constexpr const char* kOp = "moe_ffn_bwd";
  return run_bwd(kOp, {.grad_y = grad_y,
                       .x = x,
                       .w_gate_up = w_gate_up,
                       .w_down = w_down,
                       .topk_weights = topk_weights,
                       .preact = preact,
                       .expert_offsets = expert_offsets,
                       .row_to_slot = row_to_slot,
                       .slot_to_row = slot_to_row,
                       .b_down = b_down,
                       .act = check_activation(kOp, activation, interleaved, alpha, limit, false),
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

FfnGradients moe_ffn_bwd_accumulate(const Tensor& grad_y, const Tensor& x, const Tensor& w_gate_up,
                                    const Tensor& w_down, const Tensor& topk_weights,
                                    const Tensor& preact, const Tensor& expert_offsets,
                                    const Tensor& row_to_slot, const Tensor& slot_to_row,
                                    const OptTensor& b_down, std::string activation,
                                    bool interleaved, bool apply_router_weight_on_input,
                                    double alpha, double limit, bool need_x, bool need_w_gate_up,
                                    bool need_w_down, bool need_topk_weights, bool need_b_gate_up,
                                    bool need_b_down, const OptTensor& main_w_gate_up,
                                    const OptTensor& main_w_down) {
  constexpr const char* kOp = "moe_ffn_bwd_accumulate";
  return run_bwd(kOp, {.grad_y = grad_y,
                       .x = x,
                       .w_gate_up = w_gate_up,
                       .w_down = w_down,
                       .topk_weights = topk_weights,
                       .preact = preact,
                       .expert_offsets = expert_offsets,
                       .row_to_slot = row_to_slot,
                       .slot_to_row = slot_to_row,
                       .b_down = b_down,
                       .act = check_activation(kOp, activation, interleaved, alpha, limit, false),
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

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) {
  m.impl("moe_ffn", MOE_BOX(moe_ffn));
  m.impl("moe_ffn_packed", MOE_BOX(moe_ffn_packed));
  m.impl("pack_experts", MOE_BOX(pack_experts));
  m.impl("moe_ffn_fwd", MOE_BOX(moe_ffn_fwd));
  m.impl("moe_ffn_bwd", MOE_BOX(moe_ffn_bwd));
  m.impl("moe_ffn_bwd_accumulate", MOE_BOX(moe_ffn_bwd_accumulate));
}

}  // namespace moe_ops::adapter
