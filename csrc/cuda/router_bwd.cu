// The gradient of every router; csrc/cpu/router_bwd.cpp has the derivation. A warp a token, slot k
// in lane k % 32. Slots are handed around, and the lane that holds their expert adds them up in
// order; then the row of grad_logits is written once. For more experts than registers hold, the row
// is written as it is for experts that were not chosen, and the first slot of an expert writes its
// element again, for all slots that name it.
#include "cuda/launch.h"
#include "cuda/router_row.cuh"
#include "cuda/rows.cuh"
#include "moe_ops/router_bwd.h"

namespace moe_ops::cuda {

namespace {

template <class T>
struct Slot {
  int32_t id = -1;  // -1: no expert
  T x = T(0);       // its logit
  T grad = T(0);    // of its weight
};

// The slots of a token up to the last one that is used; the first 64 in registers, further ones
// loaded at each use.
template <class T>
struct Slots {
  const RouterBwdParams& p;
  const RowSource& source;
  int64_t first;  // t * K
  int64_t count;
  int lane;
  Slot<T> held[kSlotRegisters];

  __device__ __forceinline__ Slots(const RouterBwdParams& p, const RowSource& source, int64_t t)
      : p(p), source(source), first(t * p.top_k), lane(static_cast<int>(threadIdx.x % kWarp)) {
#pragma unroll
    for (int b = 0; b < kSlotRegisters; ++b) held[b] = load(b * kWarp + lane);
    // Routers with a slot for every expert leave most of them empty.
    int32_t last = -1;
#pragma unroll
    for (int b = 0; b < kSlotRegisters; ++b) {
      if (held[b].id >= 0) last = b * kWarp + lane;
    }
    for (int64_t k = kSlotRegisters * kWarp + lane; k < p.top_k; k += kWarp) {
      if (id_of(k) >= 0) last = static_cast<int32_t>(k);
    }
    count = static_cast<int64_t>(warp_max(static_cast<uint32_t>(last + 1)));
  }

  __device__ __forceinline__ int32_t id_of(int64_t k) const {
    const int64_t id = index_at(p.topk_ids, first + k);
    return id >= 0 && id < p.num_experts ? static_cast<int32_t>(id) : -1;
  }

  __device__ __forceinline__ Slot<T> load(int64_t k) const {
    Slot<T> s;
    if (k >= p.top_k) return s;
    s.id = id_of(k);
    if (s.id < 0) return s;
    s.x = source.at<T>(s.id);
    s.grad = static_cast<const T*>(p.grad_weights)[first + k];
    return s;
  }

  // Calls fn(k, slot) for this lane's slots, padded with a slot without an expert, so that all
  // lanes call fn equally often.
  template <class Fn>
  __device__ __forceinline__ void for_each_batch(Fn&& fn) const {
#pragma unroll
    for (int b = 0; b < kSlotRegisters; ++b) {
      if (b * kWarp < count) fn(int64_t{b * kWarp + lane}, held[b]);
    }
    for (int64_t k = kSlotRegisters * kWarp; k < count; k += kWarp) fn(k + lane, load(k + lane));
  }

  template <class Fn>
  __device__ __forceinline__ void for_each(Fn&& fn) const {
    for_each_batch([&](int64_t, const Slot<T>& s) {
      if (s.id >= 0) fn(s);
    });
  }

  template <class Fn>
  __device__ __forceinline__ T sum(Fn&& fn) const {
    T total = T(0);
    for_each([&](const Slot<T>& s) { total += fn(s); });
    return warp_sum(total);
  }
};

// Computes out[e] = value(x[e], the sum of term(slot) over the slots of e).
template <class S, class T, int N, class Term, class Value>
__device__ __forceinline__ void write_row(const RegisterRow<T, N>& row, const Slots<T>& slots,
                                          S* out, Term&& term, Value&& value) {
  T grad[N] = {};
  slots.for_each_batch([&](int64_t k, const Slot<T>& s) {
    const T mine = s.id >= 0 ? term(s) : T(0);
    const int n = static_cast<int>(min(slots.count - (k - slots.lane), int64_t{kWarp}));
    for (int l = 0; l < n; ++l) {
      const int32_t id = __shfl_sync(kAllLanes, s.id, l);
      const T other = __shfl_sync(kAllLanes, mine, l);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (row.first_id() + i == id) grad[i] += other;
      }
    }
  });
#pragma unroll
  for (int i = 0; i < N; ++i) grad[i] = value(row.x[i], grad[i]);
  row.store(out, grad);
}

template <class S, class T, class Term, class Value>
__device__ void write_row(const MemoryRow<T>& row, const Slots<T>& slots, S* out, Term&& term,
                          Value&& value) {
  row.for_each([&](int32_t e, T x) { out[e] = narrow<S>(value(x, T(0))); });
  __syncwarp();
  slots.for_each_batch([&](int64_t k, const Slot<T>& s) {
    bool first_of_id = s.id >= 0;
    T total = T(0);
    for (int64_t other = 0; first_of_id && other < slots.count; ++other) {
      if (slots.id_of(other) != s.id) continue;
      first_of_id = other >= k;
      total += term(slots.load(other));
    }
    if (first_of_id) out[s.id] = narrow<S>(value(s.x, total));
  });
}

template <class Row>
__global__ void router_bwd_kernel(const RouterBwdParams p) {
  using T = typename Row::Value;
  const int64_t t = router_warp();
  if (t >= p.num_tokens) return;
  const bool softmax = is_softmax(p.score_func);
  const bool over_all = softmax && !p.topk_first;
  const T scale = static_cast<T>(p.routed_scaling_factor);
  const RowSource source = row_source(p.router_logits, p.type, p.logits_stride, t, p.num_experts);
  const Slots<T> slots(p, source, t);
  Row row;

  // Scores: over all experts, or over the chosen.
  Softmax<T> scores{-std::numeric_limits<T>::infinity(), T(0)};
  if (over_all) {
    row.load(source, nullptr);
    scores = softmax_of(row);
  } else {
    row.place(source);
    if (softmax) {
      slots.for_each([&](const Slot<T>& s) { scores.max = max_number(scores.max, s.x); });
      scores.max = warp_max_number(scores.max);
      scores.sum = slots.sum([&](const Slot<T>& s) { return scores.exponential(s.x); });
    }
  }
  const auto score = [&](const Slot<T>& s) {
    return softmax ? scores(s.x) : score_of(p.score_func, s.x);
  };

  T r = T(1), mean_grad = T(0), mean = T(0);  // R, A and D of the derivation
  if (p.renormalize) {
    const T total = slots.sum(score);
    r = total + T(1e-20);
    mean_grad = slots.sum([&](const Slot<T>& s) { return s.grad * (score(s) / r); });
    mean = scale * mean_grad * ((r - total) / r);
  } else if (softmax) {
    mean = slots.sum([&](const Slot<T>& s) { return score(s) * (s.grad * scale); });
  }
  const bool everywhere = over_all && mean != T(0);  // NaN is not 0
  const auto term = [&](const Slot<T>& s) {
    const T grad = p.renormalize ? scale * (s.grad - mean_grad) / r : s.grad * scale;
    if (everywhere) return grad;
    return softmax ? score(s) * (grad - mean) : slope_of(p.score_func, s.x) * grad;
  };
  const T inverse = T(1) / scores.sum;
  const auto value = [&](T x, T grad) {
    return everywhere ? scores.exponential(x) * inverse * (grad - mean) : grad;
  };
  with_logit_type<T>(p.type, [&]<class S>(const S*) {
    write_row(row, slots, static_cast<S*>(p.grad_logits) + t * p.num_experts, term, value);
  });
}

template <class T>
Status route_bwd(const RouterBwdParams& p, Stream stream) {
  return with_row<T>(
      p.num_experts, p.num_experts <= register_experts(p.type), [&]<class Row>(Row*) {
        const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(p.num_tokens, kRouterWarps));
        return launch_kernel<router_bwd_kernel<Row>>({blocks, kRouterWarps * kWarp, stream}, p);
      });
}

}  // namespace

Status router_bwd(const RouterBwdParams& p, Stream stream) {
  if (p.num_tokens == 0) return 0;
  return p.type == DType::kFloat64 ? route_bwd<double>(p, stream) : route_bwd<float>(p, stream);
}

}  // namespace moe_ops::cuda
