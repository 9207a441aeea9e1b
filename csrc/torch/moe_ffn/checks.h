// Checks and arguments that the adapters of moe_ffn share, on the CPU and on CUDA, for all kinds of
// weights.
#pragma once

#include "moe_ops/moe_ffn.h"
#include "torch/activation.h"
#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

struct Sizes {
  DType type;
  int64_t T, H, I, E, K, width;  // width: features of w_gate_up
  ActivationParams act;
};

// Operands that forward and backward have for every kind of weights. P = 2I for gated activations,
// else I.
struct FfnOperands {
  const Tensor& x;             // [T, H]
  const Tensor& w_gate_up;     // [E, P, H]
  const Tensor& w_down;        // [E, H, I]
  const Tensor& topk_weights;  // [T, K]
};

// Arguments of a forward call.
struct FfnInputs {
  const Tensor& x;             // [T, H]
  const Tensor& w_gate_up;     // [E, P, H]
  const Tensor& w_down;        // [E, H, I]
  const Tensor& topk_weights;  // [T, K]
  const Tensor& topk_ids;      // [T, K]
  const OptTensor& b_gate_up;  // [E, P] or none
  const OptTensor& b_down;     // [E, H] or none
  ActivationParams act;
  bool on_input;             // apply_router_weight_on_input
  const OptType& out_dtype;  // type of the result; none: x's
};

// Gradients that a backward call has to compute.
struct FfnNeeds {
  bool x, w_gate_up, w_down, topk_weights, b_gate_up, b_down;
};

// Arguments of a backward call; N = T K.
struct FfnBwdInputs {
  const Tensor& grad_y;          // [T, H]
  const Tensor& x;               // [T, H]
  const Tensor& w_gate_up;       // [E, P, H]
  const Tensor& w_down;          // [E, H, I]
  const Tensor& topk_weights;    // [T, K]
  const Tensor& preact;          // [N, P]
  const Tensor& expert_offsets;  // [E+1]
  const Tensor& row_to_slot;     // [N]
  const Tensor& slot_to_row;     // [T, K]
  const OptTensor& b_down;       // [E, H] or none
  ActivationParams act;
  bool on_input;  // apply_router_weight_on_input
  FfnNeeds need;
  // Buffers of the weights' shapes that their gradients are added to; none: new tensors.
  const OptTensor& main_w_gate_up;
  const OptTensor& main_w_down;
};

// weights: [T, K] in the accumulate type.
inline MoeFfnDesc desc_of(const Sizes& s, const Routing& routing, const Tensor& weights,
                          bool apply_router_weight_on_input) {
  return {routing, weights.const_data_ptr(), s.H, s.I, s.act, apply_router_weight_on_input};
}

// check_weight(name, w, shape) checks what is particular to a kind of weights, and the number of
// dimensions.
template <class CheckWeight>
Sizes check_ffn(const Op& op, DType type, const FfnOperands& operands, int64_t top_k,
                const ActivationParams& act, const CheckWeight& check_weight) {
  const auto& [x, w_gate_up, w_down, topk_weights] = operands;
  const bool gated = is_gated(act.kind);
  Sizes s;
  s.act = act;
  s.type = type;
  check_dim(op, "x", x, 2, "[T, H]");
  s.T = x.size(0);
  s.H = x.size(1);
  check_weight("w_gate_up", w_gate_up, gated ? "[E, 2I, H]" : "[E, I, H]");
  s.E = w_gate_up.size(0);
  s.width = w_gate_up.size(1);
  MOE_CHECK(s.E >= 1, op, ": w_gate_up must hold at least one expert, got shape ",
            shape_string(w_gate_up), ".");
  check_size(op, "w_gate_up", w_gate_up, 2, s.H, "H");
  MOE_CHECK(!gated || s.width % 2 == 0, op,
            ": w_gate_up must have an even number 2I of features, got shape ",
            shape_string(w_gate_up), ".");
  s.I = gated ? s.width / 2 : s.width;
  check_weight("w_down", w_down, "[E, H, I]");
  check_size(op, "w_down", w_down, 0, s.E, "E");
  check_size(op, "w_down", w_down, 1, s.H, "H");
  check_size(op, "w_down", w_down, 2, s.I, "I");
  check_float(op, "topk_weights", topk_weights);
  check_dim(op, "topk_weights", topk_weights, 2, "[T, K]");
  check_size(op, "topk_weights", topk_weights, 0, s.T, "T");
  s.K = top_k;
  check_size(op, "topk_weights", topk_weights, 1, s.K, "K");
  return s;
}

inline Sizes check_ffn(const Op& op, const FfnOperands& operands, int64_t top_k,
                       const ActivationParams& act) {
  const DType type = check_float(op, "x", operands.x);
  return check_ffn(op, type, operands, top_k, act,
                   [&](const char* name, const Tensor& w, const char* shape) {
                     check_same_dtype(op, name, w, "x", operands.x);
                     check_dim(op, name, w, 3, shape);
                   });
}

// Checks all but the type.
inline void check_bias_shape(const Op& op, const char* name, const OptTensor& bias, int64_t E,
                             int64_t features, const char* shape) {
  if (!bias.has_value()) return;
  check_dim(op, name, *bias, 2, shape);
  check_size(op, name, *bias, 0, E, "E");
  check_size(op, name, *bias, 1, features, "the number of features");
}

inline void check_bias_shapes(const Op& op, const OptTensor& b_gate_up, const OptTensor& b_down,
                              const Sizes& s) {
  check_bias_shape(op, "b_gate_up", b_gate_up, s.E, s.width,
                   is_gated(s.act.kind) ? "[E, 2I]" : "[E, I]");
  check_bias_shape(op, "b_down", b_down, s.E, s.H, "[E, H]");
}

inline void check_bias_type(const Op& op, const char* name, const OptTensor& bias,
                            const Tensor& x) {
  if (bias.has_value()) check_same_dtype(op, name, *bias, "x", x);
}

inline void check_biases(const Op& op, const OptTensor& b_gate_up, const OptTensor& b_down,
                         const Tensor& x, const Sizes& s) {
  check_bias_type(op, "b_gate_up", b_gate_up, x);
  check_bias_type(op, "b_down", b_down, x);
  check_bias_shapes(op, b_gate_up, b_down, s);
}

inline Sizes check_fwd(const Op& op, const FfnInputs& in) {
  check_index(op, "topk_ids", in.topk_ids);
  check_dim(op, "topk_ids", in.topk_ids, 2, "[T, K]");
  const Sizes s =
      check_ffn(op, {in.x, in.w_gate_up, in.w_down, in.topk_weights}, in.topk_ids.size(1), in.act);
  check_size(op, "topk_ids", in.topk_ids, 0, s.T, "T");
  check_biases(op, in.b_gate_up, in.b_down, in.x, s);
  return s;
}

// Checks the tensors that forward saved; the caller checks the values of expert_offsets,
// row_to_slot and slot_to_row.
inline void check_saved(const Op& op, const Sizes& s, const Tensor& grad_y, const Tensor& x,
                        const Tensor& preact, const Tensor& expert_offsets,
                        const Tensor& row_to_slot, const Tensor& slot_to_row) {
  const int64_t N = s.T * s.K;
  check_size(op, "slot_to_row", slot_to_row, 0, s.T, "T");
  check_num_slots(op, "slot_to_row", N);
  check_float(op, "grad_y", grad_y);
  check_result_type(op, "grad_y", grad_y.scalar_type(), x, s.type);
  check_dim(op, "grad_y", grad_y, 2, "[T, H]");
  check_size(op, "grad_y", grad_y, 0, s.T, "T");
  check_size(op, "grad_y", grad_y, 1, s.H, "H");
  check_same_dtype(op, "preact", preact, "x", x);
  check_dim(op, "preact", preact, 2, "[N, 2I]");
  check_size(op, "preact", preact, 0, N, "N");
  check_size(op, "preact", preact, 1, s.width, "the features of w_gate_up");
  check_index(op, "expert_offsets", expert_offsets);
  check_dim(op, "expert_offsets", expert_offsets, 1, "[E+1]");
  check_size(op, "expert_offsets", expert_offsets, 0, s.E + 1, "E+1");
  check_index(op, "row_to_slot", row_to_slot);
  check_dim(op, "row_to_slot", row_to_slot, 1, "[N]");
  check_size(op, "row_to_slot", row_to_slot, 0, N, "N");
}

inline Sizes check_bwd(const Op& op, const FfnBwdInputs& in) {
  check_index(op, "slot_to_row", in.slot_to_row);
  check_dim(op, "slot_to_row", in.slot_to_row, 2, "[T, K]");
  const Sizes s = check_ffn(op, {in.x, in.w_gate_up, in.w_down, in.topk_weights},
                            in.slot_to_row.size(1), in.act);
  check_bias_type(op, "b_down", in.b_down, in.x);
  check_bias_shape(op, "b_down", in.b_down, s.E, s.H, "[E, H]");
  check_saved(op, s, in.grad_y, in.x, in.preact, in.expert_offsets, in.row_to_slot, in.slot_to_row);
  return s;
}

// Returns whether w [E, O, K] is contiguous as [E, K, O], the layout of gpt-oss, Llama 4 and DBRX.
inline bool is_transposed(const Tensor& w) {
  return !w.is_contiguous() && torch::stable::transpose(w, 1, 2).is_contiguous();
}

// Checks a buffer that the gradient of weight w is added to, and returns its type; x has w's type.
inline DType check_main_grad(const Op& op, const char* name, const Tensor& main, const Tensor& x,
                             const Tensor& w, bool may_be_transposed = false) {
  const DType main_type = check_float(op, name, main);
  const ScalarType acc = accumulate_type(x.scalar_type());
  MOE_CHECK(main.scalar_type() == x.scalar_type() || main.scalar_type() == acc, op, ": ", name,
            " must be ", dtype_name(x.scalar_type()), " like the weight, or ", dtype_name(acc),
            ", got ", dtype_name(main.scalar_type()), ".");
  check_dim(op, name, main, 3, "shaped like the weight");
  for (int64_t d = 0; d < 3; ++d) check_size(op, name, main, d, w.size(d), "the weight's size");
  MOE_CHECK(main.is_contiguous() || (may_be_transposed && is_transposed(main)), op, ": ", name,
            " must be contiguous", may_be_transposed ? ", as it is or transposed" : "",
            ", got shape ", shape_string(main), " with other strides.");
  return main_type;
}

using FfnOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using FfnGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

}  // namespace moe_ops::adapter
