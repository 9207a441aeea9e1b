// A warp a row: one pass over the pre-activation and u, everything else on the way.
#include "cuda/activation.cuh"
#include "cuda/dispatch.h"
#include "cuda/gate_up.cuh"
#include "cuda/launch.h"
#include "cuda/moe_ffn/act_bwd.h"
#include "cuda/row_experts.cuh"
#include "cuda/rows.cuh"

namespace moe_ops::cuda {

namespace {

template <Activation A, class S, int V>
__global__ void ffn_act_bwd_kernel(const FfnActBwdParams p, ActLimits<Accumulate<S>> limits) {
  using Acc = Accumulate<S>;
  const int64_t r = warp_row();
  if (r >= p.num_rows) return;
  const int lane = lane_id();
  const int64_t slot = p.row_to_slot[r];
  const bool known = slot >= 0 && slot < p.num_rows;
  auto* const grad_weight = p.grad_topk_weights == nullptr || !known
                                ? nullptr
                                : static_cast<Acc*>(p.grad_topk_weights) + slot;
  if (r >= valid_rows(p.expert_offsets, p.num_experts, p.num_rows)) {
    if (grad_weight != nullptr && lane == 0) *grad_weight = Acc(0);
    return;
  }
  Acc weight = Acc(1);
  if (p.topk_weights != nullptr) {
    weight = known ? static_cast<const Acc*>(p.topk_weights)[slot] : Acc(0);
  }
  const int64_t size = p.intermediate_size, width = size * (is_gated(A) ? 2 : 1);
  const S* const preact = static_cast<const S*>(p.preact) + r * width;
  const S* const u = p.u == nullptr ? nullptr : static_cast<const S*>(p.u) + r * size;
  S* const grad = p.grad_preact == nullptr ? nullptr : static_cast<S*>(p.grad_preact) + r * width;
  S* const weighted = p.weighted_h == nullptr ? nullptr : static_cast<S*>(p.weighted_h) + r * size;

  Acc dot = Acc(0);
#pragma unroll 2
  for (int64_t c = lane * V; c < size; c += kWarp * V) {
    Wide<S, V> gate, up, dh = {};
    load_gate_up<A, S, V>(preact, c, size, p.act.interleaved, gate, up);
    if (u != nullptr) dh = load_wide<V>(u + c);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const ActGrads<Acc> g = act_backward<A>(gate.v[v], up.v[v], dh.v[v], limits);
      dot += g.h * dh.v[v];
      gate.v[v] = weight * g.gate;
      up.v[v] = weight * g.up;
      dh.v[v] = weight * g.h;
    }
    if (grad != nullptr) store_gate_up<A, S, V>(grad, c, size, p.act.interleaved, gate, up);
    if (weighted != nullptr) store_wide<V>(weighted + c, dh);
  }
  if (grad_weight == nullptr) return;
  if (p.b_down.data != nullptr) {
    dot += bias_dot<S>(p.b_down, p.grad_y, p.expert_offsets, p.num_experts, r, p.hidden_size, lane);
  }
  dot = warp_sum(dot);
  if (lane == 0) *grad_weight = dot;
}

}  // namespace

Status ffn_act_bwd(const FfnActBwdParams& p, Stream stream) {
  if (p.num_rows == 0) return 0;
  return with_type(p.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    return with_activation(p.act.kind, [&](auto kind) {
      constexpr Activation A = kind;
      constexpr int V = kVector<S>;
      const bool aligned = p.intermediate_size % V == 0 && rows_aligned(p.preact, 0, 16) &&
                           rows_aligned(p.u, 0, 16) && rows_aligned(p.grad_preact, 0, 16) &&
                           rows_aligned(p.weighted_h, 0, 16);
      const RowGrid g = row_grid(p.num_rows, 1, 1);
      const Launch at{g.grid, g.block, stream};
      const auto limits = act_limits<Accumulate<S>>(p.act);
      return aligned ? launch_kernel<ffn_act_bwd_kernel<A, S, V>>(at, p, limits)
                     : launch_kernel<ffn_act_bwd_kernel<A, S, 1>>(at, p, limits);
    });
  });
}

}  // namespace moe_ops::cuda
