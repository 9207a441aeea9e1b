// The FFN block as a sequence of launches, no permuted copy of x among them: products gather the
// rows of x and grad_y through row_to_slot.
//
// Forward: (1) pre-activation; (2) h = act; (3) down projection, by rows; (4) weighted sum of a
// token's rows. Backward: (1) u = W_down^T grad_y, unweighted; (2) one pass over pre-activation and
// u: the gradients of pre-activation and routing weights, and weight * h where u was; (3) gradients
// of weights and biases; (4) the gradient of x by rows, where weight * h was; (5) summed by token.
// Where the routing weight scales the input, it enters (3) and (5) instead, and its gradient is
// <gradient of x by rows, x>.
#include <algorithm>

#include "cuda/check.h"
#include "cuda/moe_ffn/act_bwd.h"
#include "moe_ops/gated_act.h"
#include "moe_ops/moe_ffn.h"
#include "moe_ops/moe_linear_reduce.h"
#include "moe_ops/unpermute.h"

namespace moe_ops::cuda {

namespace {

int64_t num_rows(const MoeFfnShape& s) { return s.num_tokens * s.top_k; }
int64_t width(const MoeFfnShape& s) { return s.intermediate_size * (is_gated(s.act.kind) ? 2 : 1); }

// Hands out parts of the workspace, or only counts its bytes.
class Workspace {
 public:
  explicit Workspace(void* base = nullptr) : base_(static_cast<char*>(base)) {}
  void* take(int64_t elements, DType type) {
    void* const part = base_ == nullptr ? nullptr : base_ + used_;
    used_ += round_up<int64_t>(elements * dtype_size(type), 256);
    return part;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

struct ForwardBuffers {
  void *preact, *h, *rows;
};
ForwardBuffers forward_buffers(const MoeFfnParams& p, Workspace& w) {
  const int64_t N = num_rows(p.shape);
  ForwardBuffers b;
  b.preact = p.preact != nullptr ? p.preact : w.take(N * width(p.shape), p.x.type);
  b.h = w.take(N * p.shape.intermediate_size, p.x.type);
  b.rows = w.take(N * p.shape.hidden_size, p.x.type);
  return b;
}

struct BackwardBuffers {
  void* rows;  // [N, max(I, H)]: u, then weight * h, then the gradient of x by rows
  void* grad_preact;
};
BackwardBuffers backward_buffers(const MoeFfnBwdParams& p, Workspace& w) {
  const int64_t N = num_rows(p.shape);
  BackwardBuffers b;
  b.rows = w.take(N * std::max(p.shape.intermediate_size, p.shape.hidden_size), p.x.type);
  b.grad_preact = w.take(N * width(p.shape), p.x.type);
  return b;
}

// Rows of tokens in the permuted order, and rows that lie in it.
DeviceRows by_token(const MoeFfnShape& s, DeviceRows rows) {
  rows.index = s.row_to_slot;
  rows.index_divisor = static_cast<int32_t>(s.top_k);
  return rows;
}
DeviceRows by_row(const MoeFfnShape& s, const void* data, DType type, int64_t features) {
  return {data, type, features, nullptr, 1, num_rows(s)};
}
RowScale routing_scale(const MoeFfnShape& s) {
  return {s.topk_weights, s.row_to_slot, num_rows(s)};
}

// out [N, out_features] = b a.
GroupedGemmParams product(const MoeFfnShape& s, const DeviceRows& a, const ExpertMatrices& b,
                          int64_t out_features, int64_t in_features, void* out) {
  GroupedGemmParams g;
  g.expert_offsets = s.expert_offsets;
  g.num_experts = s.num_experts;
  g.num_rows = num_rows(s);
  g.out_features = out_features;
  g.in_features = in_features;
  g.a = a;
  g.b = b;
  g.out = {out, a.type, out_features, nullptr, 1, g.num_rows};
  g.zero_tail = false;  // Nobody reads rows without an expert.
  return g;
}

Status combine(const MoeFfnShape& s, const void* rows, DType type, bool weighted, void* y,
               Stream stream) {
  UnpermuteParams u{};
  u.rows = rows;
  u.type = u.y_type = type;
  u.row_stride = u.hidden_size = s.hidden_size;
  u.num_tokens = s.num_tokens;
  u.top_k = s.top_k;
  u.num_rows = num_rows(s);
  u.expert_offsets = s.expert_offsets;
  u.num_experts = s.num_experts;
  u.slot_to_row = {s.slot_to_row, false};
  u.topk_weights = weighted ? s.topk_weights : nullptr;
  u.y = y;
  return unpermute(u, stream);
}

Status weight_gradient(const MoeFfnShape& s, const DeviceRows& grad, int64_t out_features,
                       const DeviceRows& a, int64_t in_features, const RowScale& scale, void* out,
                       DType out_type, bool accumulate, Stream stream) {
  if (out == nullptr) return 0;
  GroupedWgradParams w;
  w.expert_offsets = s.expert_offsets;
  w.num_experts = s.num_experts;
  w.num_rows = num_rows(s);
  w.out_features = out_features;
  w.in_features = in_features;
  w.grad = grad;
  w.a = a;
  w.a_scale = scale;
  w.out = out;
  w.out_type = out_type;
  w.accumulate = accumulate;
  return grouped_gemm_wgrad(w, stream);
}

Status bias_gradient(const MoeFfnShape& s, const DeviceRows& grad, int64_t features,
                     const RowScale& scale, void* out, Stream stream) {
  if (out == nullptr) return 0;
  GroupedSumParams b;
  b.expert_offsets = s.expert_offsets;
  b.num_experts = s.num_experts;
  b.num_rows = num_rows(s);
  b.features = features;
  b.rows = grad;
  b.scale = scale;
  b.out = out;
  b.out_type = grad.type;
  return grouped_sum(b, stream);
}

}  // namespace

int64_t moe_ffn_workspace(const MoeFfnParams& p) {
  Workspace w;
  forward_buffers(p, w);
  return w.used();
}

Status moe_ffn(const MoeFfnParams& p, Stream stream) {
  const MoeFfnShape& s = p.shape;
  const DType type = p.x.type;
  const int64_t H = s.hidden_size, I = s.intermediate_size;
  const bool on_input = s.apply_router_weight_on_input;
  Workspace workspace(p.workspace);
  const ForwardBuffers buffers = forward_buffers(p, workspace);

  GroupedGemmParams up = product(s, by_token(s, p.x), p.w_gate_up, width(s), H, buffers.preact);
  up.bias = p.b_gate_up;
  if (on_input) up.a_scale = routing_scale(s);
  up.zero_tail = p.preact != nullptr;
  MOE_TRY(grouped_gemm(up, stream));

  GatedActParams act{};
  act.gate_up = buffers.preact;
  act.type = type;
  act.num_rows = num_rows(s);
  act.intermediate_size = I;
  act.act = s.act;
  act.h = buffers.h;
  act.num_valid_rows = s.expert_offsets + s.num_experts;
  MOE_TRY(gated_act(act, stream));

  GroupedGemmParams down = product(s, by_row(s, buffers.h, type, I), p.w_down, H, I, buffers.rows);
  down.bias = p.b_down;
  MOE_TRY(grouped_gemm(down, stream));
  return combine(s, buffers.rows, type, !on_input, p.y, stream);
}

int64_t moe_ffn_bwd_workspace(const MoeFfnBwdParams& p) {
  Workspace w;
  backward_buffers(p, w);
  return w.used();
}

Status moe_ffn_bwd(const MoeFfnBwdParams& p, Stream stream) {
  const MoeFfnShape& s = p.shape;
  const DType type = p.x.type;
  const int64_t H = s.hidden_size, I = s.intermediate_size, P = width(s);
  const bool on_input = s.apply_router_weight_on_input;
  Workspace workspace(p.workspace);
  const BackwardBuffers buffers = backward_buffers(p, workspace);
  const DeviceRows grad_y = by_token(s, p.grad_y), x = by_token(s, p.x);
  const RowScale routing = routing_scale(s);

  // What each gradient is made of.
  const bool weights_by_x = on_input && p.grad_topk_weights != nullptr;
  const bool weights_by_h = !on_input && p.grad_topk_weights != nullptr;
  const bool need_rows = p.grad_x != nullptr || weights_by_x;
  const bool need_preact = need_rows || p.grad_w_gate_up != nullptr || p.grad_b_gate_up != nullptr;
  const bool need_u = need_preact || weights_by_h;

  if (need_u) {
    MOE_TRY(grouped_gemm(product(s, grad_y, transposed(p.w_down), I, H, buffers.rows), stream));
  }
  if (need_u || p.grad_w_down != nullptr) {
    FfnActBwdParams a{};
    a.expert_offsets = s.expert_offsets;
    a.num_experts = s.num_experts;
    a.num_rows = num_rows(s);
    a.intermediate_size = I;
    a.hidden_size = H;
    a.type = type;
    a.act = s.act;
    a.preact = p.preact;
    a.u = need_u ? buffers.rows : nullptr;
    a.grad_y = grad_y;
    a.b_down = p.b_down;
    a.topk_weights = on_input ? nullptr : s.topk_weights;
    a.row_to_slot = s.row_to_slot;
    a.grad_preact = need_preact ? buffers.grad_preact : nullptr;
    a.weighted_h = p.grad_w_down != nullptr ? buffers.rows : nullptr;
    a.grad_topk_weights = weights_by_h ? p.grad_topk_weights : nullptr;
    MOE_TRY(ffn_act_bwd(a, stream));
  }

  const DeviceRows grad_preact = by_row(s, buffers.grad_preact, type, P);
  MOE_TRY(weight_gradient(s, grad_y, H, by_row(s, buffers.rows, type, I), I, {}, p.grad_w_down,
                          p.grad_w_down_type, p.accumulate_w_down, stream));
  MOE_TRY(weight_gradient(s, grad_preact, P, x, H, on_input ? routing : RowScale{},
                          p.grad_w_gate_up, p.grad_w_gate_up_type, p.accumulate_w_gate_up, stream));
  MOE_TRY(bias_gradient(s, grad_preact, P, {}, p.grad_b_gate_up, stream));
  MOE_TRY(bias_gradient(s, grad_y, H, on_input ? RowScale{} : routing, p.grad_b_down, stream));

  if (!need_rows) return 0;
  MOE_TRY(
      grouped_gemm(product(s, grad_preact, transposed(p.w_gate_up), H, P, buffers.rows), stream));
  if (weights_by_x) {
    MoeLinearReduceBwdParams d{};
    d.expert_offsets = s.expert_offsets;
    d.num_experts = s.num_experts;
    d.num_rows = num_rows(s);
    d.in_features = H;
    d.type = type;
    d.u = buffers.rows;
    d.h = x;
    d.row_to_slot = s.row_to_slot;
    d.grad_topk_weights = p.grad_topk_weights;
    MOE_TRY(moe_linear_reduce_bwd(d, stream));
  }
  if (p.grad_x == nullptr) return 0;
  return combine(s, buffers.rows, type, on_input, p.grad_x, stream);
}

}  // namespace moe_ops::cuda
