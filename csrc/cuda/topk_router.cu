// A warp a token:
//   1. logits into registers; softmax over all experts where selection or weights need it
//   2. keys; groups that lose the competition struck out
//   3. K times: the best key of the warp, struck out
//   4. weights of the chosen, a slot a lane
// For E <= 1024 (256 in fp64) and K <= 64 nothing but the row, and the K logits once more, is read.
// Larger ones take keys in a workspace, and K sweeps over a lane's part of them.
#include "cuda/launch.h"
#include "cuda/overlap.cuh"
#include "cuda/router_row.cuh"
#include "moe_ops/topk_router.h"

namespace moe_ops::cuda {

namespace {

bool in_registers(const TopkRouterParams& p) {
  return p.num_experts <= register_experts(p.type) && p.top_k <= kSlotRegisters * kWarp;
}

// The slots of a token, slot k in lane k % 32: in registers, or in the outputs.
template <class T>
struct RegisterSlots {
  int32_t ids[kSlotRegisters];
  T weights[kSlotRegisters];

  __device__ __forceinline__ RegisterSlots(int32_t*, T*) {}

  __device__ __forceinline__ void set(int64_t first, int lane, int64_t top_k, int32_t id) {
#pragma unroll
    for (int b = 0; b < kSlotRegisters; ++b) {
      if (first == b * kWarp && first + lane < top_k) ids[b] = id;
    }
  }

  // Sets weight = fn(id, weight).
  template <class Fn>
  __device__ __forceinline__ void update(int lane, int64_t top_k, Fn&& fn) {
#pragma unroll
    for (int b = 0; b < kSlotRegisters; ++b) {
      if (b * kWarp + lane < top_k) weights[b] = fn(ids[b], weights[b]);
    }
  }

  __device__ __forceinline__ void store(int lane, int64_t top_k, int32_t* id, T* weight) const {
#pragma unroll
    for (int b = 0; b < kSlotRegisters; ++b) {
      if (b * kWarp + lane < top_k) {
        id[b * kWarp + lane] = ids[b];
        weight[b * kWarp + lane] = weights[b];
      }
    }
  }
};

template <class T>
struct MemorySlots {
  int32_t* ids;
  T* weights;

  __device__ MemorySlots(int32_t* ids, T* weights) : ids(ids), weights(weights) {}

  __device__ void set(int64_t first, int lane, int64_t top_k, int32_t id) {
    if (first + lane < top_k) ids[first + lane] = id;
  }

  template <class Fn>
  __device__ void update(int lane, int64_t top_k, Fn&& fn) {
    for (int64_t k = lane; k < top_k; k += kWarp) weights[k] = fn(ids[k], weights[k]);
  }

  __device__ void store(int, int64_t, int32_t*, T*) const {}
};

template <class Row>
__global__ void topk_router_kernel(const TopkRouterParams p, void* workspace) {
  using T = typename Row::Value;
  using Slots = std::conditional_t<Row::kInRegisters, RegisterSlots<T>, MemorySlots<T>>;
  await_previous_kernel();
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const bool softmax = is_softmax(p.score_func);
  const bool grouped = p.num_groups > 1;
  const T* const bias = static_cast<const T*>(p.expert_bias);
  // All score functions are monotone, so without a bias or a sum of scores the logits themselves
  // rank the experts, and do so without the ties that rounding makes of nearby scores.
  const bool score_keys =
      !p.topk_first && (bias != nullptr || (grouped && p.group_score == GroupScore::kTop2Sum));
  const bool over_all = softmax && !p.topk_first;
  const T scale = static_cast<T>(p.routed_scaling_factor);
  Key<T>* const keys = static_cast<Key<T>*>(workspace) +
                       (Row::kInRegisters ? 0 : router_warp() * (p.num_experts + p.num_groups));

  for (int64_t t = router_warp(); t < p.num_tokens; t += router_step()) {
    const RowSource source = row_source(p.router_logits, p.type, p.logits_stride, t, p.num_experts);
    Row row;
    row.load(source, keys);
    Softmax<T> all{T(0), T(1)};
    if (over_all) all = softmax_of(row);
    row.make_keys(bias, [&](T x) {
      if (!score_keys) return x;
      return softmax ? all(x) : score_of(p.score_func, x);
    });
    if (grouped) {
      row.limit_groups({static_cast<int32_t>(p.num_groups), static_cast<int32_t>(p.num_topk_groups),
                        p.group_score == GroupScore::kTop2Sum},
                       keys + p.num_experts);
    }

    int32_t* const ids = p.topk_ids + t * p.top_k;
    T* const weights = static_cast<T*>(p.topk_weights) + t * p.top_k;
    Slots slots(ids, weights);
    Best<T> mine = row.lane_best();
    for (int64_t first = 0; first < p.top_k; first += kWarp) {
      int32_t chosen = 0;
      for (int k = 0; k < kWarp && first + k < p.top_k; ++k) {
        const int32_t id = warp_best(mine).id;
        if (row.strike(id)) mine = row.lane_best();
        if (lane == k) chosen = id;
      }
      slots.set(first, lane, p.top_k, chosen);
    }

    if (!softmax) {
      slots.update(lane, p.top_k,
                   [&](int32_t id, T) { return score_of(p.score_func, source.at<T>(id)); });
    } else if (over_all) {
      slots.update(lane, p.top_k, [&](int32_t id, T) { return all(source.at<T>(id)); });
    } else {
      Softmax<T> few{-std::numeric_limits<T>::infinity(), T(0)};
      slots.update(lane, p.top_k, [&](int32_t id, T) {
        const T x = source.at<T>(id);
        few.max = max_number(few.max, x);
        return x;
      });
      few.max = warp_max_number(few.max);
      slots.update(lane, p.top_k, [&](int32_t, T x) {
        const T e = few.exponential(x);
        few.sum += e;
        return e;
      });
      few.sum = warp_sum(few.sum);
      slots.update(lane, p.top_k, [&](int32_t, T e) { return e / few.sum; });
    }
    T total = T(1);
    if (p.renormalize) {
      total = T(0);
      slots.update(lane, p.top_k, [&](int32_t, T w) {
        total += w;
        return w;
      });
      total = warp_sum(total) + T(1e-20);
    }
    slots.update(lane, p.top_k,
                 [&](int32_t, T w) { return (p.renormalize ? w / total : w) * scale; });
    slots.store(lane, p.top_k, ids, weights);
  }
}

template <class T>
Status route(const TopkRouterParams& p, void* workspace, Stream stream) {
  return with_row<T>(p.num_experts, in_registers(p), [&]<class Row>(Row*) {
    const auto blocks = static_cast<unsigned>(router_blocks(p.num_tokens, Row::kInRegisters));
    Launch at{blocks, kRouterWarps * kWarp, stream};
    at.overlaps = true;
    return launch_kernel<topk_router_kernel<Row>>(at, p, workspace);
  });
}

}  // namespace

int64_t topk_router_workspace(const TopkRouterParams& p) {
  if (in_registers(p)) return 0;
  return router_blocks(p.num_tokens, false) * kRouterWarps * (p.num_experts + p.num_groups) *
         dtype_size(accumulate_type(p.type));
}

Status topk_router(const TopkRouterParams& p, void* workspace, Stream stream) {
  if (p.num_tokens == 0) return 0;
  return p.type == DType::kFloat64 ? route<double>(p, workspace, stream)
                                   : route<float>(p, workspace, stream);
}

}  // namespace moe_ops::cuda
