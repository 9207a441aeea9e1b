// The last step of moe_linear_reduce's backward: a warp a row r, with s = row_to_slot[r]:
//   grad_topk_weights[s] = <h[r], u[r]> + <bias[e(r)], grad_y[r]>
//   grad_h[s] = topk_weights[s] * u[r]
// Rows without an expert give their slots zeros.
#include "cuda/check.h"
#include "cuda/dispatch.h"
#include "cuda/row_experts.cuh"
#include "cuda/rows.cuh"
#include "moe_ops/moe_linear_reduce.h"

namespace moe_ops::cuda {

namespace {

// S: the element type; V: elements an access to u, h and grad_h.
template <class S, int V>
__global__ void moe_linear_reduce_bwd_kernel(const MoeLinearReduceBwdParams p) {
  using A = Accumulate<S>;
  const int64_t r = warp_row();
  if (r >= p.num_rows) return;
  const int lane = lane_id();
  const int64_t slot = p.row_to_slot[r];
  if (slot < 0 || slot >= p.num_rows) return;
  const bool valid = r < valid_rows(p.expert_offsets, p.num_experts, p.num_rows);
  const int64_t accesses = p.in_features / V;
  const S* const u = static_cast<const S*>(p.u) + r * p.in_features;
  S* const grad_h =
      p.grad_h == nullptr ? nullptr : static_cast<S*>(p.grad_h) + slot * p.in_features;
  const S* h = nullptr;
  if (valid && p.grad_topk_weights != nullptr) h = row_pointer<S>(p.h, static_cast<int>(r));
  A weight = A(0);
  if (valid && grad_h != nullptr) weight = static_cast<const A*>(p.topk_weights)[slot];

  A dot = A(0);
#pragma unroll 4
  for (int64_t i = lane; i < accesses; i += kWarp) {
    Wide<S, V> grad = {};
    if (valid) {
      grad = load_wide<V>(u + i * V);
      if (h != nullptr) {
        const Wide<S, V> x = load_wide<V>(h + i * V);
#pragma unroll
        for (int v = 0; v < V; ++v) dot += x.v[v] * grad.v[v];
      }
#pragma unroll
      for (int v = 0; v < V; ++v) grad.v[v] *= weight;
    }
    if (grad_h != nullptr) store_wide<V>(grad_h + i * V, grad);
  }
  if (p.grad_topk_weights == nullptr) return;
  if (valid && p.bias.data != nullptr) {
    dot += bias_dot<S>(p.bias, p.grad_y, p.expert_offsets, p.num_experts, r, p.hidden_size, lane);
  }
  dot = warp_sum(dot);
  if (lane == 0) static_cast<A*>(p.grad_topk_weights)[slot] = dot;
}

}  // namespace

Status moe_linear_reduce_bwd(const MoeLinearReduceBwdParams& p, Stream stream) {
  if (p.num_rows == 0 || (p.grad_h == nullptr && p.grad_topk_weights == nullptr)) return 0;
  return with_type(p.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    constexpr int V = kVector<S>;
    const int64_t size = sizeof(S);
    const bool aligned = p.in_features % V == 0 && rows_aligned(p.u, 0, 16) &&
                         rows_aligned(p.h.data, p.h.stride * size, 16) &&
                         rows_aligned(p.grad_h, 0, 16);
    const RowGrid g = row_grid(p.num_rows, 1, 1);
    const auto kernel =
        aligned ? moe_linear_reduce_bwd_kernel<S, V> : moe_linear_reduce_bwd_kernel<S, 1>;
    kernel<<<g.grid, g.block, 0, stream>>>(p);
    return launched();
  });
}

}  // namespace moe_ops::cuda
