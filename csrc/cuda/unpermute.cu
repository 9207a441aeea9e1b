// unpermute: a warp sums a stretch of a token's rows. Lanes look up 32 slots at a time and hand row
// and weight around, so an index is read once a warp. Sums run over the slots in order.
//
// unpermute_bwd: a warp a slot; it writes the slot's row of grad_rows and, in the same sweep, takes
// the scalar product for the weight. grad_y is read once a slot, K times in all: the warps of a
// token's slots are neighbors, and all but the first find it in L1 or L2. A launch before it finds
// the first and the last slot of each row: the first one's warp writes the row, those between them
// are looked for, and a row without any is written by the warp of its number: there are as many
// warps as slots, or as rows where these are more.
#include <algorithm>

#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/overlap.cuh"
#include "cuda/rows.cuh"
#include "moe_ops/unpermute.h"

namespace moe_ops::cuda {

namespace {

// --- first and last places

__global__ void name_targets_kernel(IndexMap map, int64_t places, int64_t n, int32_t* named) {
  const int64_t place = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (place >= places) return;
  const int64_t target = index_at(map, place);
  if (target < 0 || target >= n) return;
  atomicMax(named + target, static_cast<int32_t>(places - place));
  atomicMax(named + n + target, static_cast<int32_t>(place + 1));
}

// --- forward

constexpr int kSumStretch = 2;
constexpr int kRowsAtOnce = 4;  // under way together; divides kWarp

// Adds the rows of up to 32 slots from `slot` on to the sums, slot after slot: those from `row` to
// `end`, as the lane of a slot has them, that row_to_slot gives to it.
template <class S, class D, int V>
__device__ void add_all_rows(const UnpermuteParams& p, int64_t slot, int slots, int64_t row,
                             int64_t end, int64_t first, Wide<D, V> (&sum)[kSumStretch]) {
  const int64_t accesses = p.hidden_size / V;
  for (int k = 0; k < slots; ++k) {
    const int64_t begin = __shfl_sync(kAllLanes, row, k), stop = __shfl_sync(kAllLanes, end, k);
    if (begin < 0) continue;
    for (int64_t batch = begin; batch < stop; batch += kWarp) {
      const int64_t mine = batch + lane_id();
      unsigned named =
          __ballot_sync(kAllLanes, mine < stop && index_at(p.row_to_slot, mine) == slot + k);
      for (; named != 0; named &= named - 1) {
        const int64_t r = batch + __ffs(static_cast<int>(named)) - 1;
        const S* const from = static_cast<const S*>(p.rows) + r * p.row_stride;
#pragma unroll
        for (int i = 0; i < kSumStretch; ++i) {
          if (first + i * kWarp >= accesses) continue;
          const Wide<S, V> values = load_wide<V>(from + (first + i * kWarp) * V);
#pragma unroll
          for (int v = 0; v < V; ++v) sum[i].v[v] += values.v[v];
        }
      }
    }
  }
}

// S: type of rows, D: of y, V: elements an access.
template <class S, class D, int V>
__global__ void unpermute_kernel(const UnpermuteParams p) {
  using A = Accumulate<S>;
  await_previous_kernel();
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
    int64_t row = -1, end = 0;
    A weight = A(1);
    if (batch + lane < p.top_k) {
      const int64_t slot = token * p.top_k + batch + lane;
      if (p.named != nullptr) {
        row = p.num_rows - p.named[slot];
        end = p.named[p.num_tokens * p.top_k + slot];
      } else {
        row = index_at(p.slot_to_row, slot);
      }
      if (row < 0 || row >= valid) row = -1;
      if (row >= 0 && weights != nullptr) weight = weights[slot];
    }
    const int slots = static_cast<int>(min(p.top_k - batch, int64_t{kWarp}));
    if (__any_sync(kAllLanes, row >= 0 && end > row + 1)) {
      add_all_rows<S, D, V>(p, token * p.top_k + batch, slots, row, min(end, valid), first, sum);
      continue;
    }
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
  constexpr int V = kVector<S> < kVector<D> ? kVector<S> : kVector<D>;
  const bool aligned = p.hidden_size % V == 0 &&
                       rows_aligned(p.rows, p.row_stride * int64_t{sizeof(S)}, V * sizeof(S)) &&
                       rows_aligned(p.y, p.hidden_size * int64_t{sizeof(D)}, V * sizeof(D));
  const RowGrid g = row_grid(p.num_tokens, p.hidden_size / (aligned ? V : 1), kSumStretch);
  Launch at{g.grid, g.block, stream};
  at.overlaps = true;
  return aligned ? launch_kernel<unpermute_kernel<S, D, V>>(at, p)
                 : launch_kernel<unpermute_kernel<S, D, 1>>(at, p);
}

// --- backward

// Sums the gradient of a row that several slots refer to, in their order. The whole warp calls it.
template <class S, int V>
__device__ void sum_slots(const UnpermuteBwdParams& p, int64_t row, int64_t first, int64_t end,
                          S* to) {
  using A = Accumulate<S>;
  const int lane = lane_id();
  const int64_t accesses = p.hidden_size / V;
  for (int64_t stretch = 0; stretch < accesses; stretch += kWarp) {
    const int64_t i = stretch + lane;
    Wide<S, V> sum = {};
    for (int64_t batch = first; batch < end; batch += kWarp) {
      const int64_t mine = batch + lane;
      unsigned named = __ballot_sync(kAllLanes, mine < end && index_at(p.slot_to_row, mine) == row);
      for (; named != 0 && i < accesses; named &= named - 1) {
        const int64_t slot = batch + __ffs(static_cast<int>(named)) - 1;
        const A weight =
            p.topk_weights == nullptr ? A(1) : static_cast<const A*>(p.topk_weights)[slot];
        const Wide<S, V> grad = load_wide<V>(static_cast<const S*>(p.grad_y) +
                                             slot / p.top_k * p.grad_y_stride + i * V);
#pragma unroll
        for (int v = 0; v < V; ++v) sum.v[v] += weight * grad.v[v];
      }
    }
    if (i < accesses) store_wide<V>(to + i * V, sum);
  }
}

template <class S, int V>
__global__ void unpermute_bwd_kernel(const UnpermuteBwdParams p) {
  using A = Accumulate<S>;
  const int lane = lane_id();
  const int64_t slot = warp_row(), n = p.num_rows, slots = p.num_tokens * p.top_k;
  if (slot >= max(n, slots)) return;
  int64_t row = -1;
  A weight = A(1);
  int32_t end = 0;        // one past the last slot of the row, if this one is its first
  bool tail = false;      // the row has no expert
  bool nameless = false;  // no slot names row number `slot`
  if (lane == 0) {
    nameless = slot < n && p.named[slot] == 0;
    if (slot < slots) row = index_at(p.slot_to_row, slot);
    if (row < 0 || row >= n) row = -1;
    tail = row >= valid_rows(p.expert_offsets, p.num_experts, n);
    if (row >= 0 && slots - p.named[row] == slot) end = p.named[n + row];
    if (row >= 0 && !tail && p.topk_weights != nullptr) {
      weight = static_cast<const A*>(p.topk_weights)[slot];
    }
  }
  row = __shfl_sync(kAllLanes, row, 0);
  weight = __shfl_sync(kAllLanes, weight, 0);
  end = __shfl_sync(kAllLanes, end, 0);
  tail = __any_sync(kAllLanes, tail);
  nameless = __any_sync(kAllLanes, nameless);

  const int64_t accesses = p.hidden_size / V;
  S* const grad_rows = static_cast<S*>(p.grad_rows);
  if (nameless) {
    const Wide<S, V> zero = {};
    for (int64_t i = lane; i < accesses; i += kWarp) {
      store_wide<V>(grad_rows + slot * p.hidden_size + i * V, zero);
    }
  }
  A dot = A(0);
  if (row >= 0) {
    const S* const grad = static_cast<const S*>(p.grad_y) + slot / p.top_k * p.grad_y_stride;
    const S* const from = static_cast<const S*>(p.rows) + row * p.row_stride;
    S* const to = grad_rows + row * p.hidden_size;
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
      if (end > 0) store_wide<V>(to + i * V, out);
    }
    if (!tail && end > slot + 1) sum_slots<S, V>(p, row, slot, end, to);
  }
  if (p.grad_weights == nullptr || slot >= slots) return;
  dot = warp_sum(dot);
  if (lane == 0) static_cast<A*>(p.grad_weights)[slot] = dot;
}

}  // namespace

Status name_targets(const IndexMap& map, int64_t places, int64_t n, int32_t* named, Stream stream) {
  if (n == 0) return 0;
  constexpr int kThreads = 256;
  MOE_CUDA_TRY(cudaMemsetAsync(named, 0, 2 * n * sizeof(int32_t), stream));
  if (places == 0) return 0;
  const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(places, kThreads));
  return launch_kernel<name_targets_kernel>({blocks, kThreads, stream}, map, places, n, named);
}

Status unpermute(const UnpermuteParams& p, Stream stream) {
  if (p.num_tokens == 0 || p.hidden_size == 0) return 0;
  if (p.type == p.y_type) {
    return with_type(p.type, [&](auto tag) {
      using S = typename decltype(tag)::type;
      return launch<S, S>(p, stream);
    });
  }
  if (p.type == DType::kFloat32) {
    return p.y_type == DType::kBFloat16 ? launch<float, bf16>(p, stream)
                                        : launch<float, fp16>(p, stream);
  }
  return p.type == DType::kBFloat16 ? launch<bf16, float>(p, stream)
                                    : launch<fp16, float>(p, stream);
}

Status unpermute_bwd(const UnpermuteBwdParams& p, Stream stream) {
  const int64_t slots = p.num_tokens * p.top_k, warps = std::max(p.num_rows, slots);
  if (warps == 0) return 0;
  MOE_TRY(name_targets(p.slot_to_row, slots, p.num_rows, p.named, stream));
  return with_type(p.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    constexpr int V = kVector<S>;
    const int64_t size = sizeof(S);
    const bool aligned = p.hidden_size % V == 0 && rows_aligned(p.rows, p.row_stride * size, 16) &&
                         rows_aligned(p.grad_y, p.grad_y_stride * size, 16) &&
                         rows_aligned(p.grad_rows, p.hidden_size * size, 16);
    const RowGrid g = row_grid(warps, 1, 1);
    const Launch at{g.grid, g.block, stream};
    return aligned ? launch_kernel<unpermute_bwd_kernel<S, V>>(at, p)
                   : launch_kernel<unpermute_bwd_kernel<S, 1>>(at, p);
  });
}

}  // namespace moe_ops::cuda
