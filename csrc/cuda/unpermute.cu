// unpermute: a warp sums a stretch of a token's rows. Lanes look up 32 slots at a time and hand row
// and weight around, so an index is read once a warp. Sums run over the slots in order.
//
// unpermute_bwd: a warp a slot; it writes the slot's row of grad_rows and, in the same sweep, takes
// the scalar product for the weight. grad_y is read once a slot, K times in all: the warps of a
// token's slots are neighbours, and all but the first find it in L1 or L2.
#include "cuda/check.h"
#include "cuda/dispatch.h"
#include "cuda/rows.cuh"
#include "moe_ops/unpermute.h"

namespace moe_ops::cuda {

namespace {

// --- forward

constexpr int kSumStretch = 2;
constexpr int kRowsAtOnce = 4;  // under way together; divides kWarp

// S: type of rows, D: of y, V: elements an access.
template <class S, class D, int V>
__global__ void unpermute_kernel(const UnpermuteParams p) {
  using A = Accumulate<S>;
  const int lane = lane_id();
  const int64_t token = warp_row();
  if (token >= p.num_tokens) return;
  int64_t valid = 0;
  if (lane == 0) valid = valid_rows(p.expert_offsets, p.num_experts, p.num_rows);
  valid = __shfl_sync(kAllLanes, valid, 0);
  const A* const weights = static_cast<const A*>(p.topk_weights);
  const int64_t accesses = p.hidden_size / V, first = lane_access<kSumStretch>();

  Wide<D, V> sum[kSumStretch] = {};
  for (int64_t batch = 0; batch < p.top_k; batch += kWarp) {
    int64_t row = -1;
    A weight = A(1);
    if (batch + lane < p.top_k) {
      const int64_t slot = token * p.top_k + batch + lane;
      row = index_at(p.slot_to_row, slot);
      if (row < 0 || row >= valid) row = -1;
      if (row >= 0 && p.row_to_slot.data != nullptr && index_at(p.row_to_slot, row) != slot) {
        row = -1;
      }
      if (row >= 0 && weights != nullptr) weight = weights[slot];
    }
    const int slots = static_cast<int>(min(p.top_k - batch, int64_t{kWarp}));
    for (int k = 0; k < slots; k += kRowsAtOnce) {
      Packed<S, V> x[kRowsAtOnce][kSumStretch] = {};
#pragma unroll
      for (int j = 0; j < kRowsAtOnce; ++j) {
        const int64_t r = __shfl_sync(kAllLanes, row, k + j);
        if (r < 0) continue;
        const S* const from = static_cast<const S*>(p.rows) + r * p.row_stride;
#pragma unroll
        for (int i = 0; i < kSumStretch; ++i) {
          if (first + i * kWarp < accesses)
            x[j][i] = load_packed<V>(from + (first + i * kWarp) * V);
        }
      }
#pragma unroll
      for (int j = 0; j < kRowsAtOnce; ++j) {
        const A w = __shfl_sync(kAllLanes, weight, k + j);
#pragma unroll
        for (int i = 0; i < kSumStretch; ++i) {
          const Wide<S, V> values = unpack(x[j][i]);
#pragma unroll
          for (int v = 0; v < V; ++v) sum[i].v[v] += w * values.v[v];
        }
      }
    }
  }
  D* const to = static_cast<D*>(p.y) + token * p.hidden_size;
#pragma unroll
  for (int i = 0; i < kSumStretch; ++i) {
    if (first + i * kWarp < accesses) store_wide<V>(to + (first + i * kWarp) * V, sum[i]);
  }
}

template <class S, class D>
Status launch(const UnpermuteParams& p, Stream stream) {
  constexpr int V = kVector<S>;
  const bool aligned = p.hidden_size % V == 0 &&
                       rows_aligned(p.rows, p.row_stride * int64_t{sizeof(S)}, 16) &&
                       rows_aligned(p.y, p.hidden_size * int64_t{sizeof(D)}, V * sizeof(D));
  const RowGrid g = row_grid(p.num_tokens, p.hidden_size / (aligned ? V : 1), kSumStretch);
  if (aligned) {
    unpermute_kernel<S, D, V><<<g.grid, g.block, 0, stream>>>(p);
  } else {
    unpermute_kernel<S, D, 1><<<g.grid, g.block, 0, stream>>>(p);
  }
  return launched();
}

// --- backward

template <class S, int V>
__global__ void unpermute_bwd_kernel(const UnpermuteBwdParams p) {
  using A = Accumulate<S>;
  const int lane = lane_id();
  const int64_t slot = warp_row();
  if (slot >= p.num_tokens * p.top_k) return;
  int64_t row = -1;
  A weight = A(1);
  bool tail = false;  // the row has no expert
  if (lane == 0) {
    row = index_at(p.slot_to_row, slot);
    if (row < 0 || row >= p.num_rows) row = -1;
    tail = row >= valid_rows(p.expert_offsets, p.num_experts, p.num_rows);
    if (row >= 0 && !tail && p.topk_weights != nullptr) {
      weight = static_cast<const A*>(p.topk_weights)[slot];
    }
  }
  row = __shfl_sync(kAllLanes, row, 0);
  weight = __shfl_sync(kAllLanes, weight, 0);
  tail = __any_sync(kAllLanes, tail);

  const int64_t accesses = p.hidden_size / V;
  A dot = A(0);
  if (row >= 0) {
    const S* const grad = static_cast<const S*>(p.grad_y) + slot / p.top_k * p.grad_y_stride;
    const S* const from = static_cast<const S*>(p.rows) + row * p.row_stride;
    S* const to = static_cast<S*>(p.grad_rows) + row * p.hidden_size;
#pragma unroll 4
    for (int64_t i = lane; i < accesses; i += kWarp) {
      Wide<S, V> out = {};
      if (!tail) {
        out = load_wide<V>(grad + i * V);
        if (p.grad_weights != nullptr) {
          const Wide<S, V> x = load_wide<V>(from + i * V);
#pragma unroll
          for (int v = 0; v < V; ++v) dot += x.v[v] * out.v[v];
        }
#pragma unroll
        for (int v = 0; v < V; ++v) out.v[v] *= weight;
      }
      store_wide<V>(to + i * V, out);
    }
  }
  if (p.grad_weights == nullptr) return;
  dot = warp_sum(dot);
  if (lane == 0) static_cast<A*>(p.grad_weights)[slot] = dot;
}

}  // namespace

Status unpermute(const UnpermuteParams& p, Stream stream) {
  if (p.num_tokens == 0 || p.hidden_size == 0) return 0;
  if (p.type == p.y_type) {
    return with_type(p.type, [&](auto tag) {
      using S = typename decltype(tag)::type;
      return launch<S, S>(p, stream);
    });
  }
  return p.y_type == DType::kBFloat16 ? launch<float, bf16>(p, stream)
                                      : launch<float, fp16>(p, stream);
}

Status unpermute_bwd(const UnpermuteBwdParams& p, Stream stream) {
  if (p.num_tokens * p.top_k == 0) return 0;
  return with_type(p.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    constexpr int V = kVector<S>;
    const int64_t size = sizeof(S);
    const bool aligned = p.hidden_size % V == 0 && rows_aligned(p.rows, p.row_stride * size, 16) &&
                         rows_aligned(p.grad_y, p.grad_y_stride * size, 16) &&
                         rows_aligned(p.grad_rows, p.hidden_size * size, 16);
    const RowGrid g = row_grid(p.num_tokens * p.top_k, 1, 1);
    if (aligned) {
      unpermute_bwd_kernel<S, V><<<g.grid, g.block, 0, stream>>>(p);
    } else {
      unpermute_bwd_kernel<S, 1><<<g.grid, g.block, 0, stream>>>(p);
    }
    return launched();
  });
}

}  // namespace moe_ops::cuda
