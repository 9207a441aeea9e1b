// Elementwise: a warp takes a stretch of a row of h.
#include "cuda/activation.cuh"
#include "cuda/dispatch.h"
#include "cuda/gate_up.cuh"
#include "cuda/launch.h"
#include "cuda/rows.cuh"
#include "moe_ops/gated_act.h"

namespace moe_ops::cuda {

namespace {

constexpr int kStretch = 2;

template <Activation A, class S, int V>
__global__ void gated_act_kernel(const GatedActParams p, ActLimits<Accumulate<S>> limits) {
  const int64_t row = warp_row(), size = p.intermediate_size, first = lane_access<kStretch>();
  if (row >= p.num_rows || (p.num_valid_rows != nullptr && row >= *p.num_valid_rows)) return;
  const S* const from = static_cast<const S*>(p.gate_up) + row * size * (is_gated(A) ? 2 : 1);
  S* const to = static_cast<S*>(p.h) + row * size;
#pragma unroll
  for (int i = 0; i < kStretch; ++i) {
    const int64_t c = (first + i * kWarp) * V;
    if (c >= size) return;
    Wide<S, V> gate, up, h;
    load_gate_up<A, S, V>(from, c, size, p.act.interleaved, gate, up);
#pragma unroll
    for (int v = 0; v < V; ++v) h.v[v] = act_forward<A>(gate.v[v], up.v[v], limits);
    store_wide<V>(to + c, h);
  }
}

template <Activation A, class S, int V>
__global__ void gated_act_bwd_kernel(const GatedActBwdParams p, ActLimits<Accumulate<S>> limits) {
  const int64_t row = warp_row(), size = p.intermediate_size, first = lane_access<kStretch>();
  if (row >= p.num_rows) return;
  const int64_t offset = row * size * (is_gated(A) ? 2 : 1);
  const S* const from = static_cast<const S*>(p.gate_up) + offset;
  const S* const grad_h = static_cast<const S*>(p.grad_h) + row * size;
  S* const to = static_cast<S*>(p.grad_gate_up) + offset;
#pragma unroll
  for (int i = 0; i < kStretch; ++i) {
    const int64_t c = (first + i * kWarp) * V;
    if (c >= size) return;
    Wide<S, V> gate, up;
    load_gate_up<A, S, V>(from, c, size, p.act.interleaved, gate, up);
    const Wide<S, V> dh = load_wide<V>(grad_h + c);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const auto grad = act_backward<A>(gate.v[v], up.v[v], dh.v[v], limits);
      gate.v[v] = grad.gate;
      up.v[v] = grad.up;
    }
    store_gate_up<A, S, V>(to, c, size, p.act.interleaved, gate, up);
  }
}

// Returns whether every row of all three starts at a multiple of 16 bytes and consists of whole
// accesses.
template <class S>
bool aligned(int64_t intermediate_size, const void* a, const void* b, const void* c) {
  return intermediate_size % kVector<S> == 0 && rows_aligned(a, 0, 16) && rows_aligned(b, 0, 16) &&
         rows_aligned(c, 0, 16);
}

}  // namespace

Status gated_act(const GatedActParams& p, Stream stream) {
  if (p.num_rows == 0 || p.intermediate_size == 0) return 0;
  return with_type(p.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    return with_activation(p.act.kind, [&](auto kind) {
      constexpr Activation A = kind;
      constexpr int V = kVector<S>;
      const bool fits = aligned<S>(p.intermediate_size, p.gate_up, p.h, p.h);
      const RowGrid g = row_grid(p.num_rows, p.intermediate_size / (fits ? V : 1), kStretch);
      const Launch at{g.grid, g.block, stream};
      const auto limits = act_limits<Accumulate<S>>(p.act);
      return fits ? launch_kernel<gated_act_kernel<A, S, V>>(at, p, limits)
                  : launch_kernel<gated_act_kernel<A, S, 1>>(at, p, limits);
    });
  });
}

Status gated_act_bwd(const GatedActBwdParams& p, Stream stream) {
  if (p.num_rows == 0 || p.intermediate_size == 0) return 0;
  return with_type(p.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    return with_activation(p.act.kind, [&](auto kind) {
      constexpr Activation A = kind;
      constexpr int V = kVector<S>;
      const bool fits = aligned<S>(p.intermediate_size, p.gate_up, p.grad_h, p.grad_gate_up);
      const RowGrid g = row_grid(p.num_rows, p.intermediate_size / (fits ? V : 1), kStretch);
      const Launch at{g.grid, g.block, stream};
      const auto limits = act_limits<Accumulate<S>>(p.act);
      return fits ? launch_kernel<gated_act_bwd_kernel<A, S, V>>(at, p, limits)
                  : launch_kernel<gated_act_bwd_kernel<A, S, 1>>(at, p, limits);
    });
  });
}

}  // namespace moe_ops::cuda
