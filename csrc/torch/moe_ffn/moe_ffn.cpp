#include "moe_ops/moe_ffn.h"

#include <optional>

#include "cpu/gemm/pack.h"
#include "cpu/runtime/batch_invariant.h"
#include "torch/moe_ffn/checks.h"

namespace moe_ops::adapter {

namespace {

MoeFfnShape make_shape(const Sizes& s, bool on_input, const std::vector<int64_t>& offsets,
                       const int32_t* row_to_slot, const int32_t* slot_to_row,
                       const Tensor& weights) {
  MoeFfnShape shape;
  shape.num_tokens = s.T;
  shape.hidden_size = s.H;
  shape.intermediate_size = s.I;
  shape.num_experts = s.E;
  shape.top_k = s.K;
  shape.act = s.act;
  shape.apply_router_weight_on_input = on_input;
  shape.expert_offsets = offsets.data();
  shape.row_to_slot = row_to_slot;
  shape.slot_to_row = slot_to_row;
  shape.topk_weights = weights.const_data_ptr();
  return shape;
}

// y, and what backward needs of the call.
struct Saved {
  Tensor preact, expert_offsets, row_to_slot, slot_to_row;
};
// Packed copies of the two weights.
struct Packed {
  const Tensor* gate_up;
  const Tensor* down;
};

// A weight and its packed copy.
struct PackedWeight {
  const Tensor* w;
  const Tensor* packed;
  int64_t segments;
  ExpertMatrices* matrices;
};

// Bytes of the packed copy of w.
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

void check_packed(const Op& op, const char* name, const PackedWeight& p) {
  check_device(op, name, *p.packed);
  const int64_t bytes = packed_bytes(op, name, *p.w, p.matrices->type, p.segments);
  MOE_CHECK(p.packed->scalar_type() == ScalarType::Byte && p.packed->dim() == 1 &&
                p.packed->numel() == bytes && p.packed->is_contiguous(),
            op, ": ", name,
            " must be what pack_experts makes of this weight on this machine, uint8 [", bytes,
            "], got ", dtype_name(p.packed->scalar_type()), " of shape ", shape_string(*p.packed),
            ".");
}

// One token reads small experts of fp32 as fast in the weights as they lie, which nobody has to
// check. With more tokens or larger experts, panels are ahead where weights come from memory. The
// two round differently.
bool prefers_weights(const Sizes& s, const MoeFfnParams& p) {
  constexpr int64_t kMostExpertBytes = int64_t{2} << 20;
  return !cpu::batch_invariant() && s.T == 1 && s.type == DType::kFloat32 &&
         p.w_gate_up.stride_k == 1 && p.w_down.stride_k == 1 &&
         (s.width + s.I) * s.H * dtype_size(s.type) <= kMostExpertBytes;
}

// Uses each copy that holds its weight as it is now, judged by a few elements of every expert that
// has rows: weights can be written in ways that no version counter sees. The elements of some
// experts are under way from memory while those of others are compared, and the first ones from
// begin() to finish().
class PanelCheck {
 public:
  PanelCheck(const std::vector<int64_t>& offsets, const PackedWeight& up, const PackedWeight& down)
      : offsets_(offsets), weights_{up, down} {}

  void begin() {
    for (const PackedWeight& p : weights_) p.matrices->panels = p.packed->const_data_ptr();
    while (asked_ < kUnderWay && ask()) {
    }
  }
  void finish() {
    while (ask() || compared_ < asked_) compare();
  }

 private:
  static constexpr int64_t kUnderWay = 4;

  // There is room for one more.
  bool ask() {
    for (; weight_ < 2; ++weight_, expert_ = 0) {
      const PackedWeight& p = weights_[weight_];
      const int64_t E = p.w->size(0);
      while (expert_ < E && offsets_[expert_] == offsets_[expert_ + 1]) ++expert_;
      if (expert_ == E) continue;
      const int64_t slot = asked_++ % kSlots;
      owner_[slot] = &p;
      samples_[slot] = cpu::sample_panels(*p.matrices, p.packed->const_data_ptr(), expert_++,
                                          p.w->size(1), p.w->size(2), p.segments);
      return true;
    }
    return false;
  }
  void compare() {
    const int64_t slot = compared_++ % kSlots;
    if (!cpu::samples_match(samples_[slot])) owner_[slot]->matrices->panels = nullptr;
  }

  static constexpr int64_t kSlots = kUnderWay + 1;
  const std::vector<int64_t>& offsets_;
  const PackedWeight weights_[2];
  int64_t weight_ = 0, expert_ = 0, asked_ = 0, compared_ = 0;
  cpu::PanelSamples samples_[kSlots];
  const PackedWeight* owner_[kSlots];
};

// saved: filled for a backward; nullptr in inference, which then makes no tensor but y.
Tensor run_ffn(const Op& op, const Tensor& x, const Tensor& w_gate_up, const Tensor& w_down,
               const Tensor& topk_weights, const Tensor& topk_ids, const OptTensor& b_gate_up,
               const OptTensor& b_down, const std::string& activation, bool interleaved,
               bool on_input, double alpha, double limit, Saved* saved,
               const Packed* packed = nullptr) {
  const ActivationParams act = check_activation(op, activation, interleaved, alpha, limit, false);
  const Sizes s =
      check_fwd(op, x, w_gate_up, w_down, topk_weights, topk_ids, b_gate_up, b_down, act);

  SlotMaps maps;
  const int32_t *row_to_slot, *slot_to_row;
  if (saved != nullptr) {
    std::tie(saved->expert_offsets, saved->row_to_slot, saved->slot_to_row) =
        sorted_slots(op, topk_ids, s.E);
    const auto* ends = static_cast<const int32_t*>(saved->expert_offsets.const_data_ptr());
    maps.offsets.assign(ends, ends + s.E + 1);
    row_to_slot = static_cast<const int32_t*>(saved->row_to_slot.const_data_ptr());
    slot_to_row = static_cast<const int32_t*>(saved->slot_to_row.const_data_ptr());
  } else {
    maps = slot_maps(op, topk_ids, s.E);
    row_to_slot = maps.row_to_slot.get();
    slot_to_row = maps.slot_to_row.get();
  }
  const std::vector<int64_t>& offsets = maps.offsets;
  const Weights up = weights_of(w_gate_up, s.type);
  const Weights down = weights_of(w_down, s.type);
  MoeFfnParams p;
  p.w_gate_up = up.matrices;
  p.w_down = down.matrices;
  std::optional<PanelCheck> panels;
  if (packed != nullptr) {
    const int64_t segments = is_gated(act.kind) && !interleaved ? 2 : 1;
    const PackedWeight packed_up{&up.tensor, packed->gate_up, segments, &p.w_gate_up};
    const PackedWeight packed_down{&down.tensor, packed->down, 1, &p.w_down};
    check_packed(op, "packed_gate_up", packed_up);
    check_packed(op, "packed_down", packed_down);
    if (!prefers_weights(s, p)) {
      panels.emplace(offsets, packed_up, packed_down);
      panels->begin();
    }
  }
  const Tensor src = with_dense_rows(x);
  const Bias up_bias = bias_of(b_gate_up, s.type);
  const Bias down_bias = bias_of(b_down, s.type);
  const Tensor weights = contiguous_as(topk_weights, accumulate_type(x.scalar_type()));
  const int64_t N = s.T * s.K;
  Tensor y = empty_cpu(op, {s.T, s.H}, x.scalar_type());
  if (saved != nullptr) saved->preact = empty_cpu(op, {N, s.width}, x.scalar_type());
  p.shape = make_shape(s, on_input, offsets, row_to_slot, slot_to_row, weights);
  p.x = rows_of(src, s.type);
  p.b_gate_up = up_bias.vectors;
  p.b_down = down_bias.vectors;
  p.y = y.mutable_data_ptr();
  p.preact = saved != nullptr ? saved->preact.mutable_data_ptr() : nullptr;
  if (panels.has_value()) panels->finish();
  cpu::moe_ffn(p, torch_parallel());
  if (saved != nullptr) zero_rows_from(saved->preact, offsets.back());
  return y;
}

Tensor moe_ffn(const Tensor& x, const Tensor& w_gate_up, const Tensor& w_down,
               const Tensor& topk_weights, const Tensor& topk_ids, const OptTensor& b_gate_up,
               const OptTensor& b_down, std::string activation, bool interleaved,
               bool apply_router_weight_on_input, double alpha, double limit) {
  return run_ffn("moe_ffn", x, w_gate_up, w_down, topk_weights, topk_ids, b_gate_up, b_down,
                 activation, interleaved, apply_router_weight_on_input, alpha, limit, nullptr);
}

Tensor moe_ffn_packed(const Tensor& x, const Tensor& w_gate_up, const Tensor& w_down,
                      const Tensor& packed_gate_up, const Tensor& packed_down,
                      const Tensor& topk_weights, const Tensor& topk_ids,
                      const OptTensor& b_gate_up, const OptTensor& b_down, std::string activation,
                      bool interleaved, bool apply_router_weight_on_input, double alpha,
                      double limit) {
  const Packed packed{&packed_gate_up, &packed_down};
  return run_ffn("moe_ffn_packed", x, w_gate_up, w_down, topk_weights, topk_ids, b_gate_up, b_down,
                 activation, interleaved, apply_router_weight_on_input, alpha, limit, nullptr,
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
                       double limit) {
  Saved saved;
  const Tensor y =
      run_ffn("moe_ffn", x, w_gate_up, w_down, topk_weights, topk_ids, b_gate_up, b_down,
              activation, interleaved, apply_router_weight_on_input, alpha, limit, &saved);
  return {y, saved.preact, saved.expert_offsets, saved.row_to_slot, saved.slot_to_row};
}

// main_*: buffers that the weight gradients are added to, or none.
FfnGradients run_bwd(const Op& op, const Tensor& grad_y, const Tensor& x, const Tensor& w_gate_up,
                     const Tensor& w_down, const Tensor& topk_weights, const Tensor& preact,
                     const Tensor& expert_offsets, const Tensor& row_to_slot,
                     const Tensor& slot_to_row, const OptTensor& b_down, std::string activation,
                     bool interleaved, bool apply_router_weight_on_input, double alpha,
                     double limit, bool need_x, bool need_w_gate_up, bool need_w_down,
                     bool need_topk_weights, bool need_b_gate_up, bool need_b_down,
                     const OptTensor& main_w_gate_up, const OptTensor& main_w_down) {
  const ActivationParams act = check_activation(op, activation, interleaved, alpha, limit, false);
  const Sizes s = check_bwd(op, grad_y, x, w_gate_up, w_down, topk_weights, preact, expert_offsets,
                            row_to_slot, slot_to_row, b_down, act);
  const int64_t N = s.T * s.K;
  const std::vector<int64_t> offsets = checked_offsets(op, expert_offsets, N);
  const std::vector<int32_t> rows = checked_map(op, "row_to_slot", row_to_slot, N);
  const std::vector<int32_t> slots = checked_map(op, "slot_to_row", slot_to_row, N);

  const ScalarType type = x.scalar_type(), acc = accumulate_type(type);
  const Tensor gy = with_dense_rows(grad_y);
  const Tensor src = with_dense_rows(x);
  const Tensor pre = dense(preact);
  const Tensor weights = contiguous_as(topk_weights, acc);
  const Weights up = weights_of(w_gate_up, s.type);
  const Weights down = weights_of(w_down, s.type);
  const Bias down_bias = bias_of(b_down, s.type);
  const auto wanted = [&op](bool need, std::initializer_list<int64_t> sizes, ScalarType t) {
    return need ? empty_cpu(op, sizes, t) : empty_cpu(op, {0}, t);
  };
  Tensor grad_x = wanted(need_x, {s.T, s.H}, type);
  Tensor grad_w_gate_up = wanted(need_w_gate_up, {s.E, s.width, s.H}, type);
  Tensor grad_w_down = wanted(need_w_down, {s.E, s.H, s.I}, type);
  Tensor grad_topk_weights = wanted(need_topk_weights, {s.T, s.K}, acc);
  Tensor grad_b_gate_up = wanted(need_b_gate_up, {s.E, s.width}, type);
  Tensor grad_b_down = wanted(need_b_down, {s.E, s.H}, type);
  MoeFfnBwdParams p;
  p.shape =
      make_shape(s, apply_router_weight_on_input, offsets, rows.data(), slots.data(), weights);
  p.grad_y = rows_of(gy, s.type);
  p.x = rows_of(src, s.type);
  p.w_gate_up = up.matrices;
  p.w_down = down.matrices;
  p.b_down = down_bias.vectors;
  p.preact = pre.const_data_ptr();
  p.grad_x = need_x ? grad_x.mutable_data_ptr() : nullptr;
  const auto weight = [&](const char* name, const OptTensor& main, const Tensor& w, bool need,
                          Tensor& grad, void*& out, DType& out_type, bool& accumulate) {
    out = need ? grad.mutable_data_ptr() : nullptr;
    out_type = s.type;
    accumulate = main.has_value();
    if (!accumulate) return;
    const DType main_type = check_main_grad(op, name, *main, x, w);
    out = main->mutable_data_ptr();
    out_type = main_type;
  };
  weight("main_grad of w_gate_up", main_w_gate_up, w_gate_up, need_w_gate_up, grad_w_gate_up,
         p.grad_w_gate_up, p.grad_w_gate_up_type, p.accumulate_w_gate_up);
  weight("main_grad of w_down", main_w_down, w_down, need_w_down, grad_w_down, p.grad_w_down,
         p.grad_w_down_type, p.accumulate_w_down);
  p.grad_topk_weights = need_topk_weights ? grad_topk_weights.mutable_data_ptr() : nullptr;
  p.grad_b_gate_up = need_b_gate_up ? grad_b_gate_up.mutable_data_ptr() : nullptr;
  p.grad_b_down = need_b_down ? grad_b_down.mutable_data_ptr() : nullptr;
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
  return run_bwd("moe_ffn_bwd", grad_y, x, w_gate_up, w_down, topk_weights, preact, expert_offsets,
                 row_to_slot, slot_to_row, b_down, activation, interleaved,
                 apply_router_weight_on_input, alpha, limit, need_x, need_w_gate_up, need_w_down,
                 need_topk_weights, need_b_gate_up, need_b_down, {}, {});
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
  return run_bwd("moe_ffn_bwd_accumulate", grad_y, x, w_gate_up, w_down, topk_weights, preact,
                 expert_offsets, row_to_slot, slot_to_row, b_down, activation, interleaved,
                 apply_router_weight_on_input, alpha, limit, need_x,
                 need_w_gate_up && !main_w_gate_up.has_value(),
                 need_w_down && !main_w_down.has_value(), need_topk_weights, need_b_gate_up,
                 need_b_down, main_w_gate_up, main_w_down);
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
