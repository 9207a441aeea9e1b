// The FFN block with low-rank terms of its frozen weights.
#include <vector>

#include "moe_ops/moe_ffn.h"
#include "torch/moe_ffn/quantized_checks.h"

namespace moe_ops::adapter {

namespace {

// Arguments of a call in either direction; G groups of factors, 1 if all rows share one.
struct Inputs {
  const Tensor& x;                   // [T, H]
  const Tensor& w_gate_up;           // [E, P, H], or as its format says
  const OptTensor& w_gate_up_scale;  // of quantized weights
  const OptTensor& w_gate_up_zero;   // of formats that have zero points
  const Tensor& w_down;              // [E, H, I], or as its format says
  const OptTensor& w_down_scale;
  const OptTensor& w_down_zero;
  const std::string& format;        // names of quantized formats; empty: weights of x's type
  const OptTensor& b_gate_up;       // [E, P] or none
  const OptTensor& b_down;          // [E, H] or none
  const Tensor& topk_weights;       // [T, K]
  const Tensor& topk_ids;           // [T, K]; backward: slot_to_row, of the same shape
  const OptTensor& lora_a_gate_up;  // [G, r, H] or none
  const OptTensor& lora_b_gate_up;  // [G, P, r] or none
  const OptTensor& lora_a_down;     // [G, r, I] or none
  const OptTensor& lora_b_down;     // [G, H, r] or none
  double scaling;
  const OptTensor& adapter_ids;  // [T] or none
  int64_t num_adapters;          // M; 0 without adapter_ids
  ActivationParams act;
  bool on_input;  // apply_router_weight_on_input
};

// Checked weights, and the tensors that they point to.
struct Bank {
  Sizes sizes;
  ExpertMatrices up, down;
  std::vector<Tensor> tensors;
};

Bank bank_of(const Op& op, const Inputs& in) {
  Bank bank;
  if (in.format.empty()) {
    const OptType none;
    bank.sizes = check_fwd(op, {.x = in.x,
                                .w_gate_up = in.w_gate_up,
                                .w_down = in.w_down,
                                .topk_weights = in.topk_weights,
                                .topk_ids = in.topk_ids,
                                .b_gate_up = in.b_gate_up,
                                .b_down = in.b_down,
                                .act = in.act,
                                .on_input = in.on_input,
                                .out_dtype = none});
    const Weights up = weights_of(in.w_gate_up, bank.sizes.type);
    const Weights down = weights_of(in.w_down, bank.sizes.type);
    bank.up = up.matrices;
    bank.down = down.matrices;
    bank.tensors = {up.tensor, down.tensor};
    return bank;
  }
  MOE_CHECK(in.w_gate_up_scale.has_value() && in.w_down_scale.has_value(), op,
            ": w_gate_up_scale and w_down_scale must be given for ", in.format, ", got None.");
  const OptTensor none;
  const QuantizedFfnCall call = check(op, {.x = in.x,
                                           .w_gate_up = in.w_gate_up,
                                           .w_gate_up_scale = *in.w_gate_up_scale,
                                           .w_down = in.w_down,
                                           .w_down_scale = *in.w_down_scale,
                                           .topk_weights = in.topk_weights,
                                           .topk_ids = in.topk_ids,
                                           .x_scale = none,
                                           .b_gate_up = in.b_gate_up,
                                           .b_down = in.b_down,
                                           .act = in.act,
                                           .on_input = in.on_input,
                                           .format = in.format,
                                           .w_gate_up_zero = in.w_gate_up_zero,
                                           .w_down_zero = in.w_down_zero});
  bank.sizes = call.sizes;
  bank.up = matrices_of(call.up.matrices, call.sizes.type);
  bank.down = matrices_of(call.down.matrices, call.sizes.type);
  for (const Quantized* q : {&call.up, &call.down}) {
    bank.tensors.insert(bank.tensors.end(), {q->tensor, q->scale});
    if (q->zero.has_value()) bank.tensors.push_back(*q->zero);
  }
  return bank;
}

// The factors of one weight in the accumulate type.
struct Factors {
  OptTensor a, b;
  LowRankFactors params;
};

// The two factors of a weight, with their names.
struct FactorPair {
  const char *a_name, *b_name;
  const OptTensor &a, &b;
};

Factors factors_of(const Op& op, const FactorPair& pair, int64_t groups, int64_t inputs,
                   int64_t outputs, ScalarType type) {
  const auto& [a_name, b_name, a, b] = pair;
  Factors out;
  MOE_CHECK(a.has_value() == b.has_value(), op, ": ", a_name, " and ", b_name,
            " must both be given or both be None, got one of them.");
  if (!a.has_value()) return out;
  for (const auto& [name, t] : {std::pair{a_name, &*a}, std::pair{b_name, &*b}}) {
    check_float(op, name, *t);
    check_dim(op, name, *t, 3, t == &*a ? "[G, r, inputs]" : "[G, outputs, r]");
    MOE_CHECK(t->size(0) == groups || t->size(0) == 1, op, ": ", name,
              " must have one factor for each of ", groups, " or one for all, got shape ",
              shape_string(*t), ".");
  }
  const int64_t rank = a->size(1);
  MOE_CHECK(rank >= 1, op, ": ", a_name, " must have a rank of at least 1, got shape ",
            shape_string(*a), ".");
  check_size(op, a_name, *a, 2, inputs, "the inputs of its weight");
  check_size(op, b_name, *b, 1, outputs, "the outputs of its weight");
  check_size(op, b_name, *b, 2, rank, "the rank");
  out.a = contiguous_as(*a, type);
  out.b = contiguous_as(*b, type);
  out.params = {rank, out.a->const_data_ptr(), out.b->const_data_ptr(), a->size(0) != groups,
                b->size(0) != groups};
  return out;
}

// The low-rank terms of a call.
struct Terms {
  Factors gate_up, down;
  std::vector<int64_t> adapters;  // [T]; empty: one adapter for all tokens
  int64_t groups = 0;

  Terms(const Op& op, const Inputs& in, const Sizes& s)
      : groups(s.E * std::max<int64_t>(in.num_adapters, 1)) {
    const ScalarType type = accumulate_type(in.x.scalar_type());
    gate_up =
        factors_of(op, {"lora_a_gate_up", "lora_b_gate_up", in.lora_a_gate_up, in.lora_b_gate_up},
                   groups, s.H, s.width, type);
    down = factors_of(op, {"lora_a_down", "lora_b_down", in.lora_a_down, in.lora_b_down}, groups,
                      s.I, s.H, type);
    MOE_CHECK(in.adapter_ids.has_value() == (in.num_adapters > 0), op,
              ": adapter_ids must be given with num_adapters >= 1, and only then.");
    if (!in.adapter_ids.has_value()) return;
    check_num_slots(op, "topk_ids", s.T * s.K);
    check_num_experts(op, groups);
    check_index(op, "adapter_ids", *in.adapter_ids);
    check_dim(op, "adapter_ids", *in.adapter_ids, 1, "[T]");
    check_size(op, "adapter_ids", *in.adapter_ids, 0, s.T, "T");
    adapters.resize(static_cast<size_t>(s.T));
    for_each_index(*in.adapter_ids, [&](int64_t t, int64_t id) {
      adapters[t] = id >= 0 && id < in.num_adapters ? id : -1;
    });
  }

  // Returns the ids [T, K] that sort slots by group; rows without an adapter join the first one.
  Tensor group_ids(const Op& op, const Tensor& topk_ids, const Sizes& s) const {
    if (adapters.empty()) return topk_ids;
    Tensor out = empty_cpu(op, {s.T, s.K}, ScalarType::Int);
    auto* ids = static_cast<int32_t*>(out.mutable_data_ptr());
    const int64_t per_expert = groups / s.E;
    for_each_index(topk_ids, [&](int64_t i, int64_t e) {
      const int64_t adapter = std::max<int64_t>(adapters[i / s.K], 0);
      ids[i] = e >= 0 && e < s.E ? static_cast<int32_t>(e * per_expert + adapter) : -1;
    });
    return out;
  }

  // Returns the factor of each row's low-rank products, [N]: `scaling`, or 0 without an adapter.
  Tensor row_scale(const Op& op, const Sizes& s, const Tensor& row_to_slot, double scaling,
                   ScalarType type) const {
    Tensor out = empty_cpu(op, {s.T * s.K}, type);
    const int32_t* slots = int32_data(row_to_slot);
    const auto fill = [&](auto* to) {
      for (int64_t r = 0; r < s.T * s.K; ++r) {
        const bool plain = !adapters.empty() && adapters[slots[r] / s.K] < 0;
        to[r] = plain ? 0 : scaling;
      }
    };
    type == ScalarType::Double ? fill(static_cast<double*>(out.mutable_data_ptr()))
                               : fill(static_cast<float*>(out.mutable_data_ptr()));
    return out;
  }

  // low_gate_up, low_down: [N, r] in the accumulate type; the backward only reads them.
  LowRankParams params(const Tensor& group_offsets, const Tensor& row_scale,
                       const Tensor& low_gate_up, const Tensor& low_down) const {
    LowRankParams p;
    p.gate_up = gate_up.params;
    p.down = down.params;
    p.group_offsets = int32_data(group_offsets);
    p.num_groups = groups;
    p.row_scale = row_scale.const_data_ptr();
    p.low_gate_up = const_cast<void*>(low_gate_up.const_data_ptr());
    p.low_down = const_cast<void*>(low_down.const_data_ptr());
    return p;
  }
};

// Returns the offsets of experts among those of groups.
Tensor expert_offsets_of(const Op& op, const Tensor& group_offsets, const Sizes& s) {
  const int64_t per_expert = (group_offsets.numel() - 1) / s.E;
  if (per_expert == 1) return group_offsets;
  Tensor out = empty_cpu(op, {s.E + 1}, ScalarType::Int);
  auto* to = static_cast<int32_t*>(out.mutable_data_ptr());
  for (int64_t e = 0; e <= s.E; ++e) to[e] = int32_data(group_offsets)[e * per_expert];
  return out;
}

// y, preact, low_gate_up, low_down, group_offsets, row_to_slot, slot_to_row
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs moe_ffn_lora_fwd(const Tensor& x, const Tensor& w_gate_up, const OptTensor& w_gate_up_scale,
                         const OptTensor& w_gate_up_zero, const Tensor& w_down,
                         const OptTensor& w_down_scale, const OptTensor& w_down_zero,
                         std::string format, const OptTensor& b_gate_up, const OptTensor& b_down,
                         const Tensor& topk_weights, const Tensor& topk_ids,
                         const OptTensor& lora_a_gate_up, const OptTensor& lora_b_gate_up,
                         const OptTensor& lora_a_down, const OptTensor& lora_b_down, double scaling,
                         const OptTensor& adapter_ids, int64_t num_adapters, std::string activation,
                         bool interleaved, bool apply_router_weight_on_input, double alpha,
                         double limit, bool training) {
  constexpr const char* kOp = "moe_ffn_lora";
  const Inputs in = {.x = x,
                     .w_gate_up = w_gate_up,
                     .w_gate_up_scale = w_gate_up_scale,
                     .w_gate_up_zero = w_gate_up_zero,
                     .w_down = w_down,
                     .w_down_scale = w_down_scale,
                     .w_down_zero = w_down_zero,
                     .format = format,
                     .b_gate_up = b_gate_up,
                     .b_down = b_down,
                     .topk_weights = topk_weights,
                     .topk_ids = topk_ids,
                     .lora_a_gate_up = lora_a_gate_up,
                     .lora_b_gate_up = lora_b_gate_up,
                     .lora_a_down = lora_a_down,
                     .lora_b_down = lora_b_down,
                     .scaling = scaling,
                     .adapter_ids = adapter_ids,
                     .num_adapters = num_adapters,
                     .act = check_activation(kOp, activation, interleaved, alpha, limit, false),
                     .on_input = apply_router_weight_on_input};
  Bank bank = bank_of(kOp, in);
  const Sizes& s = bank.sizes;
  const ScalarType acc = accumulate_type(x.scalar_type());
  // Float32 tokens ask for accuracy: while training, they are not rounded to integers.
  if (training && s.type == DType::kFloat32) {
    bank.up.quant.exact = bank.down.quant.exact = true;
  }
  const Terms terms(kOp, in, s);
  const SortedSlots slots = sorted_slots(kOp, terms.group_ids(kOp, topk_ids, s), terms.groups);
  const Tensor offsets = expert_offsets_of(kOp, slots.expert_offsets, s);
  const Tensor row_scale = terms.row_scale(kOp, s, slots.row_to_slot, scaling, acc);
  const Tensor src = with_dense_rows(x), weights = contiguous_as(topk_weights, acc);
  const Bias up_bias = bias_of(b_gate_up, s.type), down_bias = bias_of(b_down, s.type);
  const int64_t N = s.T * s.K;
  Tensor y = empty_cpu(kOp, {s.T, s.H}, x.scalar_type());
  Tensor preact = empty_cpu(kOp, {training ? N : 0, s.width}, x.scalar_type());
  Tensor low_gate_up = empty_cpu(kOp, {N, terms.gate_up.params.rank}, acc);
  Tensor low_down = empty_cpu(kOp, {N, terms.down.params.rank}, acc);
  const LowRankParams low_rank =
      terms.params(slots.expert_offsets, row_scale, low_gate_up, low_down);
  MoeFfnParams p;
  p.desc = desc_of(s, routing_of(offsets, slots.row_to_slot, slots.slot_to_row), weights,
                   apply_router_weight_on_input);
  p.x = rows_of(src, s.type);
  p.w_gate_up = bank.up;
  p.w_down = bank.down;
  p.b_gate_up = up_bias.vectors;
  p.b_down = down_bias.vectors;
  p.y = y.mutable_data_ptr();
  p.y_type = s.type;
  p.preact = data_if(training, preact);
  p.low_rank = &low_rank;
  cpu::moe_ffn(p, torch_parallel());
  zero_rows_from(low_gate_up, num_valid_rows(offsets));
  zero_rows_from(low_down, num_valid_rows(offsets));
  return {
      y, preact, low_gate_up, low_down, slots.expert_offsets, slots.row_to_slot, slots.slot_to_row};
}

// Checks rank-r rows that the forward returned.
void check_low(const Op& op, const char* name, const Tensor& low, int64_t rows, int64_t rank,
               ScalarType type) {
  MOE_CHECK(
      low.scalar_type() == type && low.dim() == 2 && low.size(0) == rows && low.size(1) == rank, op,
      ": ", name, " must be what the forward returned, ", dtype_name(type), " [", rows, ", ", rank,
      "], got ", dtype_name(low.scalar_type()), " of shape ", shape_string(low), ".");
}

// Gradients of x, topk_weights, and of both factors of both weights.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients moe_ffn_lora_bwd(
    const Tensor& grad_y, const Tensor& x, const Tensor& w_gate_up,
    const OptTensor& w_gate_up_scale, const OptTensor& w_gate_up_zero, const Tensor& w_down,
    const OptTensor& w_down_scale, const OptTensor& w_down_zero, std::string format,
    const OptTensor& b_gate_up, const OptTensor& b_down, const Tensor& topk_weights,
    const OptTensor& lora_a_gate_up, const OptTensor& lora_b_gate_up, const OptTensor& lora_a_down,
    const OptTensor& lora_b_down, double scaling, const OptTensor& adapter_ids,
    int64_t num_adapters, const Tensor& preact, const Tensor& low_gate_up, const Tensor& low_down,
    const Tensor& group_offsets, const Tensor& row_to_slot, const Tensor& slot_to_row,
    std::string activation, bool interleaved, bool apply_router_weight_on_input, double alpha,
    double limit, bool need_x, bool need_topk_weights, bool need_a_gate_up, bool need_b_gate_up,
    bool need_a_down, bool need_b_down) {
  constexpr const char* kOp = "moe_ffn_lora_bwd";
  const Inputs in = {.x = x,
                     .w_gate_up = w_gate_up,
                     .w_gate_up_scale = w_gate_up_scale,
                     .w_gate_up_zero = w_gate_up_zero,
                     .w_down = w_down,
                     .w_down_scale = w_down_scale,
                     .w_down_zero = w_down_zero,
                     .format = format,
                     .b_gate_up = b_gate_up,
                     .b_down = b_down,
                     .topk_weights = topk_weights,
                     .topk_ids = slot_to_row,
                     .lora_a_gate_up = lora_a_gate_up,
                     .lora_b_gate_up = lora_b_gate_up,
                     .lora_a_down = lora_a_down,
                     .lora_b_down = lora_b_down,
                     .scaling = scaling,
                     .adapter_ids = adapter_ids,
                     .num_adapters = num_adapters,
                     .act = check_activation(kOp, activation, interleaved, alpha, limit, false),
                     .on_input = apply_router_weight_on_input};
  const Bank bank = bank_of(kOp, in);
  const Sizes& s = bank.sizes;
  const ScalarType type = x.scalar_type(), acc = accumulate_type(type);
  const int64_t N = s.T * s.K;
  const Terms terms(kOp, in, s);
  const int64_t up_rank = terms.gate_up.params.rank, down_rank = terms.down.params.rank;
  const Tensor groups = checked_offsets(kOp, group_offsets, N);
  check_size(kOp, "group_offsets", groups, 0, terms.groups + 1, "G+1");
  const Tensor offsets = expert_offsets_of(kOp, groups, s);
  check_saved(kOp, s, grad_y, x, preact, offsets, row_to_slot, slot_to_row);
  check_low(kOp, "low_gate_up", low_gate_up, N, up_rank, acc);
  check_low(kOp, "low_down", low_down, N, down_rank, acc);
  const Tensor rows = checked_map(kOp, "row_to_slot", row_to_slot, N);
  const Tensor slots = checked_map(kOp, "slot_to_row", slot_to_row, N);
  const Tensor row_scale = terms.row_scale(kOp, s, rows, scaling, acc);
  const Tensor gy = with_dense_rows(grad_y), src = with_dense_rows(x), pre = dense(preact);
  const Tensor low_up = dense(low_gate_up), low_h = dense(low_down);
  const Tensor weights = contiguous_as(topk_weights, acc);
  const Bias down_bias = bias_of(b_down, s.type);
  const auto size = [&](bool shared) { return shared ? 1 : terms.groups; };
  const LowRankFactors &up = terms.gate_up.params, &down = terms.down.params;
  Tensor grad_x = empty_cpu_if(need_x, kOp, {s.T, s.H}, type);
  Tensor grad_topk_weights = empty_cpu_if(need_topk_weights, kOp, {s.T, s.K}, acc);
  Tensor a_up = empty_cpu_if(need_a_gate_up, kOp, {size(up.a_shared), up_rank, s.H}, acc);
  Tensor b_up = empty_cpu_if(need_b_gate_up, kOp, {size(up.b_shared), s.width, up_rank}, acc);
  Tensor a_down = empty_cpu_if(need_a_down, kOp, {size(down.a_shared), down_rank, s.I}, acc);
  Tensor b_out = empty_cpu_if(need_b_down, kOp, {size(down.b_shared), s.H, down_rank}, acc);
  const LowRankParams low_rank = terms.params(groups, row_scale, low_up, low_h);
  MoeFfnBwdParams p{};
  p.desc = desc_of(s, routing_of(offsets, rows, slots), weights, apply_router_weight_on_input);
  p.grad_y = rows_of(gy, check_float(kOp, "grad_y", gy));
  p.x = rows_of(src, s.type);
  p.w_gate_up = bank.up;
  p.w_down = bank.down;
  p.b_down = down_bias.vectors;
  p.preact = pre.const_data_ptr();
  p.grad_x = data_if(need_x, grad_x);
  p.grad_topk_weights = data_if(need_topk_weights, grad_topk_weights);
  p.low_rank = &low_rank;
  p.grad_low_rank = {data_if(need_a_gate_up, a_up), data_if(need_b_gate_up, b_up),
                     data_if(need_a_down, a_down), data_if(need_b_down, b_out)};
  cpu::moe_ffn_bwd(p, torch_parallel());
  return {grad_x, grad_topk_weights, a_up, b_up, a_down, b_out};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) {
  m.impl("moe_ffn_lora_fwd", MOE_BOX(moe_ffn_lora_fwd));
  m.impl("moe_ffn_lora_bwd", MOE_BOX(moe_ffn_lora_bwd));
}

}  // namespace moe_ops::adapter
