// moe_linear_reduce as a sequence of launches: a product by slot, and the weighted sum of a token's
// rows. Its backward is a product by token; the last step, slot_gradients, is a warp a row.
#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/routed_rows.h"
#include "cuda/row_experts.cuh"
#include "cuda/rows.cuh"
#include "cuda/slot_gradients.h"
#include "moe_ops/moe_linear_reduce.h"

namespace moe_ops::cuda {

namespace {

// S: the element type; V: elements an access to u, h and grad_h.
template <class S, int V>
__global__ void slot_gradients_kernel(const SlotGradientsParams p) {
  using A = Accumulate<S>;
  const int64_t r = warp_row();
  const Routing& routing = p.routing;
  const int64_t num_rows = routing.num_slots();
  if (r >= num_rows) return;
  const int lane = lane_id();
  const int64_t slot = routing.row_to_slot[r];
  if (slot < 0 || slot >= num_rows) return;
  const bool valid = r < valid_rows(routing.expert_offsets, routing.num_experts, num_rows);
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
    dot += bias_dot<S>(p.bias, p.grad_y, routing.expert_offsets, routing.num_experts, r,
                       p.hidden_size, lane);
  }
  dot = warp_sum(dot);
  if (lane == 0) static_cast<A*>(p.grad_topk_weights)[slot] = dot;
}

}  // namespace

Status slot_gradients(const SlotGradientsParams& p, Stream stream) {
  const int64_t num_rows = p.routing.num_slots();
  if (num_rows == 0 || (p.grad_h == nullptr && p.grad_topk_weights == nullptr)) return 0;
  return with_type(p.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    constexpr int V = kVector<S>;
    const int64_t size = sizeof(S);
    const bool aligned = p.in_features % V == 0 && rows_aligned(p.u, 0, 16) &&
                         rows_aligned(p.h.data, p.h.stride * size, 16) &&
                         rows_aligned(p.grad_h, 0, 16);
    const RowGrid g = row_grid(num_rows, 1, 1);
    const Launch at{g.grid, g.block, stream};
    return aligned ? launch_kernel<slot_gradients_kernel<S, V>>(at, p)
                   : launch_kernel<slot_gradients_kernel<S, 1>>(at, p);
  });
}

int64_t moe_linear_reduce_workspace(const MoeLinearReduceParams& p) {
  Workspace w;
  w.take(p.routing.num_slots() * p.hidden_size, p.w.type);
  return w.used();
}

Status moe_linear_reduce(const MoeLinearReduceParams& p, Stream stream) {
  const Routing& r = p.routing;
  const DType type = p.w.type;
  const int64_t H = p.hidden_size, D = p.in_features;
  void* const rows = Workspace(p.workspace).take(r.num_slots() * H, type);
  GroupedGemmParams g = product(r, by_slot(r, p.h, type, D), p.w, H, D, to_row(r, rows, type, H));
  g.bias = p.bias;
  g.zero_tail = false;  // Nobody reads rows without an expert.
  MOE_TRY(grouped_gemm(g, stream));
  return combine(r, rows, type, H, p.topk_weights, p.y, type, stream);
}

int64_t moe_linear_reduce_bwd_workspace(const MoeLinearReduceBwdParams& p) {
  Workspace w;
  if (p.grad_topk_weights != nullptr) w.take(p.routing.num_slots() * p.in_features, p.w.type);
  return w.used();
}

Status moe_linear_reduce_bwd(const MoeLinearReduceBwdParams& p, Stream stream) {
  const Routing& r = p.routing;
  const DType type = p.w.type;
  const int64_t H = p.hidden_size, D = p.in_features;
  const DeviceRows grad_y = by_token(r, p.grad_y), h = by_slot(r, p.h, type, D);
  const RowScale scale = routing_scale(r, p.topk_weights);
  if (p.grad_topk_weights != nullptr) {
    void* const u = Workspace(p.workspace).take(r.num_slots() * D, type);
    GroupedGemmParams g = product(r, grad_y, transposed(p.w), D, H, to_row(r, u, type, D));
    g.zero_tail = false;
    MOE_TRY(grouped_gemm(g, stream));
    SlotGradientsParams q;
    q.routing = r;
    q.in_features = D;
    q.hidden_size = H;
    q.type = type;
    q.u = u;
    q.h = h;
    q.grad_y = grad_y;
    q.bias = p.bias;
    q.topk_weights = p.topk_weights;
    q.grad_h = p.grad_h;
    q.grad_topk_weights = p.grad_topk_weights;
    MOE_TRY(slot_gradients(q, stream));
  } else if (p.grad_h != nullptr) {
    // Weighted and put into their slots by the product itself.
    GroupedGemmParams g = product(r, grad_y, transposed(p.w), D, H, to_slot(r, p.grad_h, type, D));
    g.a_scale = scale;
    MOE_TRY(grouped_gemm(g, stream));
  }
  MOE_TRY(weight_gradient(r, grad_y, H, h, D, scale, {p.grad_w, type}, stream));
  return bias_gradient(r, grad_y, H, scale, p.grad_bias, stream);
}

}  // namespace moe_ops::cuda
