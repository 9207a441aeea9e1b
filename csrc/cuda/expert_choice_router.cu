// Three launches, as on the CPU:
//   1. a warp a token: scores into topk_weights [T,E], which is read as a plain matrix until 3
//   2. a block an expert: the capacity-th best key of its column by radix selection, eight bits a
//      sweep, and which token is the last to win a tie. The column is kept in shared memory where
//      it fits
//   3. a warp a token: a comparison with those two says who chose the token; the row is compacted
//   in
//      place, 32 experts at a time
// Atomics only count.
#include <algorithm>

#include "cuda/check.h"
#include "cuda/router_row.cuh"
#include "cuda/runtime.h"
#include "moe_ops/expert_choice_router.h"

namespace moe_ops::cuda {

namespace {

// An expert takes the tokens with a key above `key`, and those with an equal key up to `token`.
struct Threshold {
  uint64_t key;
  int64_t token;
};

// --- 1

template <class Row>
__global__ void score_kernel(const ExpertChoiceRouterParams p) {
  using T = typename Row::Value;
  const int64_t t = router_warp();
  if (t >= p.num_tokens) return;
  Row row;
  row.load(row_source(p.router_logits, p.type, p.logits_stride, t, p.num_experts), nullptr);
  Softmax<T> softmax{T(0), T(1)};
  const bool over_all = is_softmax(p.score_func);
  if (over_all) softmax = softmax_of(row);
  const auto score = [&](T x) { return over_all ? softmax(x) : score_of(p.score_func, x); };
  T* const out = static_cast<T*>(p.topk_weights) + t * p.num_experts;
  if constexpr (Row::kInRegisters) {
#pragma unroll
    for (T& x : row.x) x = score(x);
    row.store(out, row.x);
  } else {
    row.for_each([&](int32_t e, T x) { out[e] = score(x); });
  }
}

// --- 2

constexpr int kMaxThreads = 512;
constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    threshold_kernel(const ExpertChoiceRouterParams p, Threshold* thresholds, bool keep_column) {
  extern __shared__ uint64_t shared[];
  __shared__ int32_t counts[kDigits];
  __shared__ int32_t digit, above;  // the digit of the key; keys with a higher one
  __shared__ int32_t warp_counts[kMaxThreads / kWarp];
  Key<T>* const column = reinterpret_cast<Key<T>*>(shared);
  const T* const scores = static_cast<const T*>(p.topk_weights) + blockIdx.x;
  const int lane = static_cast<int>(threadIdx.x % kWarp), warp = threadIdx.x / kWarp;
  const int threads = static_cast<int>(blockDim.x);
  if (keep_column) {
    for (int64_t t = threadIdx.x; t < p.num_tokens; t += threads) {
      column[t] = key_of(scores[t * p.num_experts]);
    }
  }
  // A thread meets the same tokens each time, so it needs no barrier to see its keys.
  const auto key_at = [&](int64_t t) {
    return keep_column ? column[t] : key_of(scores[t * p.num_experts]);
  };

  Key<T> key = 0;             // the digits found so far, and zeros
  int64_t rank = p.capacity;  // of the key among those that share these digits, from 1
  for (int shift = 8 * sizeof(Key<T>) - kDigitBits; shift >= 0; shift -= kDigitBits) {
    for (int d = threadIdx.x; d < kDigits; d += threads) counts[d] = 0;
    __syncthreads();
    // Digits above this one; a shift by all bits is not defined.
    const Key<T> mask =
        shift + kDigitBits == 8 * sizeof(Key<T>) ? Key<T>(0) : ~Key<T>(0) << (shift + kDigitBits);
    for (int64_t t = threadIdx.x; t < p.num_tokens; t += threads) {
      const Key<T> k = key_at(t);
      if ((k & mask) == key) atomicAdd(counts + static_cast<int>(k >> shift & (kDigits - 1)), 1);
    }
    __syncthreads();
    // The first warp finds the digit, from the highest down: lane l has eight of them.
    if (warp == 0) {
      constexpr int kMine = kDigits / kWarp;
      const int highest = kDigits - 1 - lane * kMine;
      int32_t mine = 0;
#pragma unroll
      for (int i = 0; i < kMine; ++i) mine += counts[highest - i];
      int32_t before = warp_exclusive_sum(mine, lane);
      if (before < rank && rank <= before + mine) {
        int d = highest;
        while (before + counts[d] < rank) before += counts[d--];
        digit = d;
        above = before;
      }
    }
    __syncthreads();
    key |= static_cast<Key<T>>(digit) << shift;
    rank -= above;
  }

  // The rank-th token, in order, that has this key.
  for (int64_t first = 0; first < p.num_tokens; first += threads) {
    const int64_t t = first + threadIdx.x;
    const bool equal = t < p.num_tokens && key_at(t) == key;
    const unsigned equals = __ballot_sync(kAllLanes, equal);
    if (lane == 0) warp_counts[warp] = __popc(equals);
    const int here = __syncthreads_count(equal);
    if (rank <= here) {
      int64_t nth = __popc(equals & lanes_below(lane)) + 1;
      for (int w = 0; w < warp; ++w) nth += warp_counts[w];
      if (equal && nth == rank) thresholds[blockIdx.x] = {key, t};
      return;
    }
    rank -= here;  // Counts are read in the last round only, so the next one may write them.
  }
}

// --- 3

template <class T>
__global__ void slot_kernel(const ExpertChoiceRouterParams p, const Threshold* thresholds) {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int64_t t = router_warp();
  if (t >= p.num_tokens) return;
  const int32_t num_experts = static_cast<int32_t>(p.num_experts);
  const T scale = static_cast<T>(p.routed_scaling_factor);
  T* const weights = static_cast<T*>(p.topk_weights) + t * num_experts;
  int32_t* const ids = p.topk_ids + t * num_experts;
  int32_t n = 0;
  for (int32_t first = 0; first < num_experts; first += kWarp) {
    const int32_t e = first + lane;
    bool taken = e < num_experts;
    const T score = taken ? weights[e] : T(0);
    if (taken && thresholds != nullptr) {
      const Threshold h = thresholds[e];
      const uint64_t key = key_of(score);
      taken = key > h.key || (key == h.key && t <= h.token);
    }
    const unsigned all = __ballot_sync(kAllLanes, taken);
    // At or before the places that were read by now.
    const int32_t place = n + __popc(all & lanes_below(lane));
    if (taken) {
      ids[place] = e;
      weights[place] = score * scale;
    }
    n += __popc(all);
  }
  __syncwarp();
  for (int32_t k = n + lane; k < num_experts; k += kWarp) {
    ids[k] = -1;
    weights[k] = T(0);
  }
}

template <class T>
Status find_thresholds(const ExpertChoiceRouterParams& p, Threshold* thresholds, Stream stream) {
  constexpr int64_t kOwnBytes = 4096;  // bound of the kernel's static shared memory
  const int64_t bytes = p.num_tokens * static_cast<int64_t>(sizeof(Key<T>));
  const bool keep = bytes + kOwnBytes <= device_info().max_shared_bytes;
  const size_t shared = keep ? static_cast<size_t>(bytes) : 0;
  if (shared > 40 * 1024) {
    MOE_CUDA_TRY(cudaFuncSetAttribute(threshold_kernel<T>,
                                      cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(shared)));
  }
  const auto threads =
      static_cast<unsigned>(round_up<int64_t>(std::min<int64_t>(p.num_tokens, kMaxThreads), kWarp));
  threshold_kernel<T>
      <<<static_cast<unsigned>(p.num_experts), threads, shared, stream>>>(p, thresholds, keep);
  return launched();
}

template <class T>
Status route(const ExpertChoiceRouterParams& p, Threshold* thresholds, Stream stream) {
  const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(p.num_tokens, kRouterWarps));
  constexpr unsigned kBlock = kRouterWarps * kWarp;
  MOE_CUDA_TRY(static_cast<cudaError_t>(
      with_row<T>(p.num_experts, p.num_experts <= register_experts(p.type), [&]<class Row>(Row*) {
        score_kernel<Row><<<blocks, kBlock, 0, stream>>>(p);
        return launched();
      })));
  if (thresholds != nullptr) {
    MOE_CUDA_TRY(static_cast<cudaError_t>(find_thresholds<T>(p, thresholds, stream)));
  }
  slot_kernel<T><<<blocks, kBlock, 0, stream>>>(p, thresholds);
  return launched();
}

bool limited(const ExpertChoiceRouterParams& p) { return p.capacity < p.num_tokens; }

}  // namespace

int64_t expert_choice_router_workspace(const ExpertChoiceRouterParams& p) {
  return limited(p) ? p.num_experts * static_cast<int64_t>(sizeof(Threshold)) : 0;
}

Status expert_choice_router(const ExpertChoiceRouterParams& p, void* workspace, Stream stream) {
  if (p.num_tokens == 0) return 0;
  auto* const thresholds = limited(p) ? static_cast<Threshold*>(workspace) : nullptr;
  return p.type == DType::kFloat64 ? route<double>(p, thresholds, stream)
                                   : route<float>(p, thresholds, stream);
}

}  // namespace moe_ops::cuda
