// peer_ffn: a warp a slot takes the products of its expert's vectors with the token, then a warp a
// stretch of a token's row adds up the vectors of w_down. Warps of a token's slots are neighbors,
// so that its row is found in L1; a vector is read once, in whole lines.
//
// peer_ffn_bwd: the same two passes the other way round, then a warp a stretch of each row of the
// gradients of the tables, from its slots, sorted. No atomics: sums run in the order of slots.
#include "cuda/activation.cuh"
#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/rows.cuh"
#include "moe_ops/peer_ffn.h"

namespace moe_ops::cuda {

namespace {

// swiglu_oai's usual ones.
constexpr double kAlpha = 1.702, kLimit = 7.0;
constexpr int kSumStretch = 2;
constexpr int kRowsAtOnce = 4;  // under way together; divides kWarp

template <class Fn>
__device__ void with_activation_on_device(Activation kind, const Fn& fn) {
  switch (kind) {
#define MOE_OPS_CASE(name, kind) \
  case Activation::kind:         \
    return fn(Constant<Activation::kind>{});
    MOE_OPS_ACTIVATIONS(MOE_OPS_CASE)
#undef MOE_OPS_CASE
  }
}

template <class S>
__device__ const S* vector_at(const NeuronTable& table, int64_t expert, int64_t g) {
  return static_cast<const S*>(table.data) + expert * table.stride_e + g * table.stride_g;
}

template <class S>
__device__ const S* row_at(const Rows& rows, int64_t t) {
  return static_cast<const S*>(rows.data) + t * rows.stride;
}

// Returns the expert of a slot, or -1.
__device__ int64_t expert_of(const Routing& routing, int64_t slot) {
  const int64_t id = index_at(routing.topk_ids, slot);
  return id >= 0 && id < routing.num_experts ? id : -1;
}

// Returns a . b of n elements, computed by a warp, in all its lanes.
template <class S, int V>
__device__ Accumulate<S> warp_dot(const S* a, const S* b, int64_t n) {
  Accumulate<S> sum = 0;
#pragma unroll 4
  for (int64_t i = lane_id(); i < n / V; i += kWarp) {
    const Wide<S, V> left = load_wide<V>(a + i * V), right = load_wide<V>(b + i * V);
#pragma unroll
    for (int v = 0; v < V; ++v) sum += left.v[v] * right.v[v];
  }
  return warp_sum(sum);
}

// --- by slot

// factors [T, K]: of the vectors of w_down in y.
template <class S, int V>
__global__ void products_kernel(const PeerFfnDesc d, void* preact, void* factors) {
  using A = Accumulate<S>;
  const int64_t slot = warp_row(), K = d.routing.top_k, G = d.vectors();
  if (slot >= d.routing.num_slots()) return;
  const int64_t t = slot / K, expert = expert_of(d.routing, slot);
  A dots[2] = {};
  if (expert >= 0) {
    for (int64_t g = 0; g < G; ++g) {
      dots[g] =
          warp_dot<S, V>(vector_at<S>(d.w_gate_up, expert, g), row_at<S>(d.x, t), d.hidden_size);
    }
  }
  if (lane_id() != 0) return;
  A* const kept = static_cast<A*>(preact) + t * G * K + slot % K;
  for (int64_t g = 0; g < G; ++g) kept[g * K] = dots[g];
  A factor = 0;
  if (expert >= 0) {
    with_activation_on_device(d.act, [&](auto kind) {
      constexpr Activation act = decltype(kind)::value;
      factor = act_forward<act>(dots[0], dots[1], {A(kAlpha), A(kLimit)}) *
               static_cast<const A*>(d.topk_weights)[slot];
    });
  }
  static_cast<A*>(factors)[slot] = factor;
}

// factors [T, G + 1, K]: of x in the gradients of w_gate_up (and of its vectors in that of x), then
// of grad_y in that of w_down.
template <class S, int V>
__global__ void product_gradients_kernel(const PeerFfnBwdParams p) {
  using A = Accumulate<S>;
  const PeerFfnDesc& d = p.desc;
  const int64_t slot = warp_row(), K = d.routing.top_k, G = d.vectors();
  if (slot >= d.routing.num_slots()) return;
  const int64_t t = slot / K, k = slot % K, expert = expert_of(d.routing, slot);
  A dot = 0;
  if (expert >= 0) {
    dot = warp_dot<S, V>(vector_at<S>(d.w_down, expert, 0), row_at<S>(p.grad_y, t), d.hidden_size);
  }
  if (lane_id() != 0) return;
  ActGrads<A> grads = {};
  A weight = 0;
  if (expert >= 0) {
    weight = static_cast<const A*>(d.topk_weights)[slot];
    const A* const preact = static_cast<const A*>(p.preact) + t * G * K + k;
    with_activation_on_device(d.act, [&](auto kind) {
      constexpr Activation act = decltype(kind)::value;
      grads = act_backward<act>(preact[0], is_gated(act) ? preact[K] : A(0), dot * weight,
                                {A(kAlpha), A(kLimit)});
    });
  }
  A* const factors = static_cast<A*>(p.workspace) + t * (G + 1) * K + k;
  factors[0] = grads.gate;
  if (G == 2) factors[K] = grads.up;
  factors[G * K] = grads.h * weight;
  if (p.grad_topk_weights != nullptr) static_cast<A*>(p.grad_topk_weights)[slot] = grads.h * dot;
}

// --- sums of rows

// Computes sum += factor * row over the first `count` lanes in their order; each lane has a row, or
// none.
template <class S, int V>
__device__ void add_rows(const S* row, Accumulate<S> factor, int count, int64_t first,
                         int64_t accesses, Wide<S, V> (&sum)[kSumStretch]) {
  const auto address = reinterpret_cast<unsigned long long>(row);
  for (int k = 0; k < count; k += kRowsAtOnce) {
    Packed<S, V> x[kRowsAtOnce][kSumStretch] = {};
#pragma unroll
    for (int j = 0; j < kRowsAtOnce; ++j) {
      const auto* from = reinterpret_cast<const S*>(__shfl_sync(kAllLanes, address, k + j));
      if (from == nullptr) continue;
#pragma unroll
      for (int i = 0; i < kSumStretch; ++i) {
        if (first + i * kWarp < accesses) x[j][i] = load_packed<V>(from + (first + i * kWarp) * V);
      }
    }
#pragma unroll
    for (int j = 0; j < kRowsAtOnce; ++j) {
      const Accumulate<S> w = __shfl_sync(kAllLanes, factor, k + j);
#pragma unroll
      for (int i = 0; i < kSumStretch; ++i) {
        const Wide<S, V> values = unpack(x[j][i]);
#pragma unroll
        for (int v = 0; v < V; ++v) sum[i].v[v] += w * values.v[v];
      }
    }
  }
}

template <class S, int V>
__device__ void store_sums(S* to, int64_t first, int64_t accesses,
                           const Wide<S, V> (&sum)[kSumStretch]) {
#pragma unroll
  for (int i = 0; i < kSumStretch; ++i) {
    if (first + i * kWarp < accesses) store_wide<V>(to + (first + i * kWarp) * V, sum[i]);
  }
}

// Computes out[t] = the sum over vectors g and slots k of factors[t * stride + g * K + k] *
// table[id, g].
template <class S, int V>
__global__ void vector_sums_kernel(const Routing routing, const NeuronTable table, int64_t vectors,
                                   int64_t hidden_size, const void* factors, int64_t stride,
                                   void* out) {
  using A = Accumulate<S>;
  const int64_t t = warp_row(), K = routing.top_k;
  if (t >= routing.num_tokens) return;
  const int64_t accesses = hidden_size / V, first = lane_access<kSumStretch>();
  Wide<S, V> sum[kSumStretch] = {};
  for (int64_t g = 0; g < vectors; ++g) {
    for (int64_t batch = 0; batch < K; batch += kWarp) {
      const int64_t k = batch + lane_id(), expert = k < K ? expert_of(routing, t * K + k) : -1;
      const bool valid = expert >= 0;
      const A factor = valid ? static_cast<const A*>(factors)[t * stride + g * K + k] : A(0);
      add_rows<S, V>(valid ? vector_at<S>(table, expert, g) : nullptr, factor,
                     static_cast<int>(min(K - batch, int64_t{kWarp})), first, accesses, sum);
    }
  }
  store_sums<S, V>(static_cast<S*>(out) + t * hidden_size, first, accesses, sum);
}

// Computes out[row, g] = the sum over slots of the row of factors[t * stride + g * K + k] *
// tokens[t].
template <class S, int V>
__global__ void table_gradients_kernel(const Routing rows, const Rows tokens, int64_t vectors,
                                       int64_t hidden_size, const void* factors, int64_t stride,
                                       void* out) {
  using A = Accumulate<S>;
  const int64_t vector = warp_row(), row = vector / vectors, g = vector % vectors;
  if (row >= rows.num_experts) return;
  const int64_t accesses = hidden_size / V, first = lane_access<kSumStretch>();
  const int64_t K = rows.top_k, N = rows.num_slots();
  const int64_t begin = max(int64_t{rows.expert_offsets[row]}, int64_t{0});
  const int64_t end = min(int64_t{rows.expert_offsets[row + 1]}, N);
  Wide<S, V> sum[kSumStretch] = {};
  for (int64_t batch = begin; batch < end; batch += kWarp) {
    const int64_t mine = batch + lane_id();
    const int64_t slot = mine < end ? rows.row_to_slot[mine] : -1;
    const bool valid = slot >= 0 && slot < N;
    const int64_t t = slot / K;
    const A factor = valid ? static_cast<const A*>(factors)[t * stride + g * K + slot % K] : A(0);
    add_rows<S, V>(valid ? row_at<S>(tokens, t) : nullptr, factor,
                   static_cast<int>(min(end - batch, int64_t{kWarp})), first, accesses, sum);
  }
  store_sums<S, V>(static_cast<S*>(out) + vector * hidden_size, first, accesses, sum);
}

// --- launches

// Returns whether rows of n elements consist of whole 16-byte accesses from `data` on, for every
// multiple of the strides.
template <class S>
bool is_aligned(int64_t n, const void* data, int64_t stride, int64_t other_stride = 0) {
  constexpr int64_t size = sizeof(S);
  return n % kVector<S> == 0 && rows_aligned(data, stride * size, 16) &&
         other_stride * size % 16 == 0;
}
template <class S>
bool is_aligned(int64_t n, const Rows& rows) {
  return is_aligned<S>(n, rows.data, rows.stride);
}
template <class S>
bool is_aligned(int64_t n, const NeuronTable& table) {
  return is_aligned<S>(n, table.data, table.stride_e, table.stride_g);
}

template <class S>
Status sum_vectors(const PeerFfnDesc& d, const NeuronTable& table, int64_t vectors,
                   const void* factors, int64_t stride, void* out, Stream stream) {
  const int64_t H = d.hidden_size;
  if (H == 0) return 0;
  constexpr int V = kVector<S>;
  const bool fits = is_aligned<S>(H, table) && is_aligned<S>(H, out, H);
  const RowGrid g = row_grid(d.routing.num_tokens, H / (fits ? V : 1), kSumStretch);
  const Launch at{g.grid, g.block, stream};
  return fits ? launch_kernel<vector_sums_kernel<S, V>>(at, d.routing, table, vectors, H, factors,
                                                        stride, out)
              : launch_kernel<vector_sums_kernel<S, 1>>(at, d.routing, table, vectors, H, factors,
                                                        stride, out);
}

template <class S>
Status sum_tokens(const Routing& rows, const Rows& tokens, int64_t vectors, int64_t H,
                  const void* factors, int64_t stride, void* out, Stream stream) {
  if (out == nullptr || H == 0 || rows.num_experts == 0) return 0;
  constexpr int V = kVector<S>;
  const bool fits = is_aligned<S>(H, tokens) && is_aligned<S>(H, out, H);
  const RowGrid g = row_grid(rows.num_experts * vectors, H / (fits ? V : 1), kSumStretch);
  const Launch at{g.grid, g.block, stream};
  return fits ? launch_kernel<table_gradients_kernel<S, V>>(at, rows, tokens, vectors, H, factors,
                                                            stride, out)
              : launch_kernel<table_gradients_kernel<S, 1>>(at, rows, tokens, vectors, H, factors,
                                                            stride, out);
}

}  // namespace

Status peer_ffn(const PeerFfnParams& p, Stream stream) {
  const PeerFfnDesc& d = p.desc;
  const int64_t N = d.routing.num_slots(), H = d.hidden_size;
  if (d.routing.num_tokens == 0) return 0;
  return with_type(d.type, [&](auto tag) -> Status {
    using S = typename decltype(tag)::type;
    if (N > 0) {
      const RowGrid g = row_grid(N, 1, 1);
      const Launch at{g.grid, g.block, stream};
      const bool fits = is_aligned<S>(H, d.x) && is_aligned<S>(H, d.w_gate_up);
      MOE_TRY((fits ? launch_kernel<products_kernel<S, kVector<S>>>(at, d, p.preact, p.workspace)
                    : launch_kernel<products_kernel<S, 1>>(at, d, p.preact, p.workspace)));
    }
    return sum_vectors<S>(d, d.w_down, 1, p.workspace, d.routing.top_k, p.y, stream);
  });
}

Status peer_ffn_bwd(const PeerFfnBwdParams& p, Stream stream) {
  const PeerFfnDesc& d = p.desc;
  const int64_t N = d.routing.num_slots(), H = d.hidden_size, K = d.routing.top_k;
  const int64_t G = d.vectors(), stride = (G + 1) * K;
  return with_type(d.type, [&](auto tag) -> Status {
    using S = typename decltype(tag)::type;
    if (N > 0) {
      const RowGrid g = row_grid(N, 1, 1);
      const Launch at{g.grid, g.block, stream};
      const bool fits = is_aligned<S>(H, p.grad_y) && is_aligned<S>(H, d.w_down);
      MOE_TRY((fits ? launch_kernel<product_gradients_kernel<S, kVector<S>>>(at, p)
                    : launch_kernel<product_gradients_kernel<S, 1>>(at, p)));
    }
    if (p.grad_x != nullptr && d.routing.num_tokens > 0) {
      MOE_TRY(sum_vectors<S>(d, d.w_gate_up, G, p.workspace, stride, p.grad_x, stream));
    }
    const auto* down = static_cast<const Accumulate<S>*>(p.workspace) + G * K;
    MOE_TRY(sum_tokens<S>(p.rows, d.x, G, H, p.workspace, stride, p.grad_w_gate_up, stream));
    return sum_tokens<S>(p.rows, p.grad_y, 1, H, down, stride, p.grad_w_down, stream);
  });
}

}  // namespace moe_ops::cuda
