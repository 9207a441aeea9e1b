// The FFN block as a sequence of launches, no permuted copy of x among them: products gather the
// rows of x and grad_y through row_to_slot.
//
// Forward: slots sorted by expert, for few tokens by (1) itself; (1) pre-activation; (2) h = act;
// (3) down projection, by rows; (4) weighted sum of a token's rows. Backward: (1) u = W_down^T
// grad_y, unweighted; (2) one pass over pre-activation and u: the gradients of pre-activation and
// routing weights, and weight * h where u was; (3) gradients of weights and biases; (4) the
// gradient of x by rows, where weight * h was; (5) summed by token. Where the routing weight scales
// the input, it enters (3) and (5) instead, and its gradient is <gradient of x by rows, x>.
//
// Forward (1) and (2), and backward (1) and (2), are one kernel each where stages.h has one.
#include <algorithm>

#include "cuda/check.h"
#include "cuda/moe_ffn/act_bwd.h"
#include "cuda/moe_ffn/stages.h"
#include "cuda/routed_rows.h"
#include "cuda/slot_gradients.h"
#include "moe_ops/gated_act.h"
#include "moe_ops/moe_ffn.h"

namespace moe_ops::cuda {

namespace {

int64_t num_partials(const MoeFfnDesc& s) {
  return ceil_div(s.intermediate_size, kFfnPartialColumns);
}

// Returns the parameters of forward (1) and (2) as one stage, without the address of h.
FfnUpParams up_stage(const MoeFfnParams& p) {
  const MoeFfnDesc& s = p.desc;
  const Routing& r = s.routing;
  FfnUpParams u;
  u.expert_offsets = r.expert_offsets;
  u.num_experts = r.num_experts;
  u.num_rows = r.num_slots();
  u.hidden_size = s.hidden_size;
  u.intermediate_size = s.intermediate_size;
  u.act = s.act;
  u.x = by_token(r, p.x);
  if (s.apply_router_weight_on_input) u.x_scale = routing_scale(r, s.topk_weights);
  u.w = p.w_gate_up;
  u.bias = p.b_gate_up;
  u.preact = p.preact;
  return u;
}

// Returns the parameters of backward (1) and (2) as one stage, without its outputs.
FfnDownBwdParams down_bwd_stage(const MoeFfnBwdParams& p) {
  const MoeFfnDesc& s = p.desc;
  const Routing& r = s.routing;
  FfnDownBwdParams d;
  d.expert_offsets = r.expert_offsets;
  d.num_experts = r.num_experts;
  d.num_rows = r.num_slots();
  d.hidden_size = s.hidden_size;
  d.intermediate_size = s.intermediate_size;
  d.act = s.act;
  d.grad_y = by_token(r, p.grad_y);
  d.weight = routing_scale(r, s.topk_weights);
  d.weight_on_input = s.apply_router_weight_on_input;
  d.w = p.w_down;
  d.preact = p.preact;
  return d;
}

struct ForwardBuffers {
  void* preact;  // nullptr: nobody asks for it
  void *h, *rows;
};
ForwardBuffers forward_buffers(const MoeFfnParams& p, Workspace& w) {
  const int64_t N = p.desc.routing.num_slots();
  ForwardBuffers b;
  b.preact = p.preact;
  if (b.preact == nullptr && !supports(up_stage(p)))
    b.preact = w.take(N * p.desc.width(), p.x.type);
  b.h = w.take(N * p.desc.intermediate_size, p.x.type);
  b.rows = w.take(N * p.desc.hidden_size, p.x.type);
  return b;
}

struct BackwardBuffers {
  void* rows;  // [N, max(I, H)]: u, then weight * h, then the gradient of x by rows
  void* grad_preact;
  void* weighted_grad_preact;  // weight * grad_preact, where the fused stage makes it
  float* partial;              // of the fused stage
};
BackwardBuffers backward_buffers(const MoeFfnBwdParams& p, Workspace& w) {
  const int64_t N = p.desc.routing.num_slots();
  BackwardBuffers b;
  b.rows = w.take(N * std::max(p.desc.intermediate_size, p.desc.hidden_size), p.x.type);
  b.grad_preact = w.take(N * p.desc.width(), p.x.type);
  b.weighted_grad_preact = nullptr;
  b.partial = nullptr;
  if (supports(down_bwd_stage(p))) {
    if (!p.desc.apply_router_weight_on_input) {
      b.partial = static_cast<float*>(w.take(N * num_partials(p.desc), DType::kFloat32));
    } else if (p.grad_w_gate_up != nullptr) {
      b.weighted_grad_preact = w.take(N * p.desc.width(), p.x.type);
    }
  }
  return b;
}

// Returns the parameters of out [N, out_features] = b a.
GroupedGemmParams product_by_row(const Routing& r, const DeviceRows& a, const ExpertMatrices& b,
                                 int64_t out_features, int64_t in_features, void* out) {
  GroupedGemmParams g =
      product(r, a, b, out_features, in_features, to_row(r, out, a.type, out_features));
  g.zero_tail = false;  // Nobody reads rows without an expert.
  return g;
}

}  // namespace

int64_t moe_ffn_workspace(const MoeFfnParams& p) {
  Workspace w;
  forward_buffers(p, w);
  return w.used();
}

Status moe_ffn(const MoeFfnParams& p, Stream stream) {
  const MoeFfnDesc& s = p.desc;
  const Routing& r = s.routing;
  const DType type = p.x.type;
  const int64_t H = s.hidden_size, I = s.intermediate_size;
  const bool on_input = s.apply_router_weight_on_input;
  Workspace workspace(p.workspace);
  const ForwardBuffers buffers = forward_buffers(p, workspace);

  FfnUpParams fused = up_stage(p);
  fused.h = buffers.h;
  const bool has_kernel = supports(fused);
  if (has_kernel && sorts_few(fused)) {
    fused.sort = {r.topk_ids, static_cast<int>(r.num_slots()), static_cast<int>(r.top_k),
                  p.sort.expert_offsets, p.sort.slot_to_row};
  } else {
    MOE_TRY(sort_by_expert(p.sort, stream));
  }
  if (has_kernel) {
    MOE_TRY(ffn_up(fused, stream));
  } else {
    GroupedGemmParams up =
        product_by_row(r, by_token(r, p.x), p.w_gate_up, s.width(), H, buffers.preact);
    up.bias = p.b_gate_up;
    if (on_input) up.a_scale = routing_scale(r, s.topk_weights);
    up.zero_tail = p.preact != nullptr;
    MOE_TRY(grouped_gemm(up, stream));

    GatedActParams act{};
    act.gate_up = buffers.preact;
    act.type = type;
    act.num_rows = r.num_slots();
    act.intermediate_size = I;
    act.act = s.act;
    act.h = buffers.h;
    act.num_valid_rows = r.expert_offsets + r.num_experts;
    MOE_TRY(gated_act(act, stream));
  }

  const DeviceRows h = by_row(r, buffers.h, type, I);
  FfnDownParams few;
  few.expert_offsets = r.expert_offsets;
  few.num_experts = r.num_experts;
  few.num_rows = r.num_slots();
  few.num_tokens = r.num_tokens;
  few.hidden_size = H;
  few.intermediate_size = I;
  few.h = h;
  few.w = p.w_down;
  few.bias = p.b_down;
  few.out = buffers.rows;
  if (p.preact == nullptr && supports(few)) {
    MOE_TRY(ffn_down(few, stream));
  } else {
    GroupedGemmParams down = product_by_row(r, h, p.w_down, H, I, buffers.rows);
    down.bias = p.b_down;
    MOE_TRY(grouped_gemm(down, stream));
  }
  return combine(r, buffers.rows, type, H, on_input ? nullptr : s.topk_weights, p.y, p.y_type,
                 stream);
}

int64_t moe_ffn_bwd_workspace(const MoeFfnBwdParams& p) {
  Workspace w;
  backward_buffers(p, w);
  return w.used();
}

Status moe_ffn_bwd(const MoeFfnBwdParams& p, Stream stream) {
  const MoeFfnDesc& s = p.desc;
  const Routing& r = s.routing;
  const DType type = p.x.type;
  const int64_t H = s.hidden_size, I = s.intermediate_size, P = s.width();
  const bool on_input = s.apply_router_weight_on_input;
  Workspace workspace(p.workspace);
  const BackwardBuffers buffers = backward_buffers(p, workspace);
  const DeviceRows grad_y = by_token(r, p.grad_y), x = by_token(r, p.x);
  const RowScale routing = routing_scale(r, s.topk_weights);

  // Determines the operands that the requested gradients need.
  const bool weights_by_x = on_input && p.grad_topk_weights != nullptr;
  const bool weights_by_h = !on_input && p.grad_topk_weights != nullptr;
  const bool need_rows = p.grad_x != nullptr || weights_by_x;
  const bool need_preact = need_rows || p.grad_w_gate_up != nullptr || p.grad_b_gate_up != nullptr;
  const bool need_u = need_preact || weights_by_h;

  FfnDownBwdParams fused = down_bwd_stage(p);
  fused.dpre = need_preact ? buffers.grad_preact : nullptr;
  fused.dpre_weighted = buffers.weighted_grad_preact;
  fused.h = p.grad_w_down != nullptr ? buffers.rows : nullptr;
  fused.partial = weights_by_h ? buffers.partial : nullptr;
  if (need_u && supports(fused)) {
    MOE_TRY(ffn_down_bwd(fused, stream));
    if (weights_by_h) {
      FfnRouterGradParams g;
      g.expert_offsets = r.expert_offsets;
      g.num_experts = r.num_experts;
      g.num_rows = r.num_slots();
      g.hidden_size = H;
      g.num_partials = num_partials(s);
      g.partial = buffers.partial;
      g.grad_y = grad_y;
      g.b_down = p.b_down;
      g.row_to_slot = r.row_to_slot;
      g.grad_topk_weights = static_cast<float*>(p.grad_topk_weights);
      MOE_TRY(ffn_router_grad(g, stream));
    }
  } else {
    if (need_u) {
      MOE_TRY(grouped_gemm(product_by_row(r, grad_y, transposed(p.w_down), I, H, buffers.rows),
                           stream));
    }
    if (need_u || p.grad_w_down != nullptr) {
      FfnActBwdParams a{};
      a.expert_offsets = r.expert_offsets;
      a.num_experts = r.num_experts;
      a.num_rows = r.num_slots();
      a.intermediate_size = I;
      a.hidden_size = H;
      a.type = type;
      a.act = s.act;
      a.preact = p.preact;
      a.u = need_u ? buffers.rows : nullptr;
      a.grad_y = grad_y;
      a.b_down = p.b_down;
      a.topk_weights = on_input ? nullptr : s.topk_weights;
      a.row_to_slot = r.row_to_slot;
      a.grad_preact = need_preact ? buffers.grad_preact : nullptr;
      a.weighted_h = p.grad_w_down != nullptr ? buffers.rows : nullptr;
      a.grad_topk_weights = weights_by_h ? p.grad_topk_weights : nullptr;
      MOE_TRY(ffn_act_bwd(a, stream));
    }
  }

  const DeviceRows weighted_h = by_row(r, buffers.rows, type, I);
  const WeightGradient of_down{p.grad_w_down, p.grad_w_down_type, p.accumulate_w_down,
                               p.transpose_grad_w_down};
  MOE_TRY(weight_gradient(r, grad_y, H, weighted_h, I, {}, of_down, stream));
  const DeviceRows grad_preact = by_row(r, buffers.grad_preact, type, P);
  const bool weighted = buffers.weighted_grad_preact != nullptr;
  const DeviceRows by_x = weighted ? by_row(r, buffers.weighted_grad_preact, type, P) : grad_preact;
  const RowScale scale = on_input && !weighted ? routing : RowScale{};
  const WeightGradient of_up{p.grad_w_gate_up, p.grad_w_gate_up_type, p.accumulate_w_gate_up,
                             p.transpose_grad_w_gate_up};
  MOE_TRY(weight_gradient(r, by_x, P, x, H, scale, of_up, stream));
  MOE_TRY(bias_gradient(r, grad_preact, P, {}, p.grad_b_gate_up, stream));
  MOE_TRY(bias_gradient(r, grad_y, H, on_input ? RowScale{} : routing, p.grad_b_down, stream));

  if (!need_rows) return 0;
  MOE_TRY(grouped_gemm(product_by_row(r, grad_preact, transposed(p.w_gate_up), H, P, buffers.rows),
                       stream));
  if (weights_by_x) {
    SlotGradientsParams d;
    d.routing = r;
    d.in_features = H;
    d.type = type;
    d.u = buffers.rows;
    d.h = x;
    d.grad_topk_weights = p.grad_topk_weights;
    MOE_TRY(slot_gradients(d, stream));
  }
  if (p.grad_x == nullptr) return 0;
  return combine(r, buffers.rows, type, H, on_input ? s.topk_weights : nullptr, p.grad_x, type,
                 stream);
}

}  // namespace moe_ops::cuda
