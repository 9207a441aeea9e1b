// One row of router logits in one warp: keys that rank experts, and taking the best one out. Two
// forms with the same members, so that each router has one text:
//   RegisterRow  E <= 1024 (256 in fp64): lane l holds experts l*N to l*N + N - 1 in registers
//   MemoryRow    any E: logits are read again at each use, keys lie in a workspace
#pragma once

#include <limits>

#include "cuda/reduce.cuh"
#include "cuda/router_keys.cuh"
#include "cuda/router_score.cuh"

namespace moe_ops::cuda {

constexpr int kRouterWarps = 4;  // a block
constexpr int64_t register_experts(DType type) { return type == DType::kFloat64 ? 256 : 1024; }
constexpr int kSlotRegisters = 2;  // of a lane: 64 slots a token

// --- the best key and its expert

template <class T>
struct Best {
  Key<T> key;
  int32_t id;
};

// Returns the best over all lanes; among equal keys, the smallest id.
template <class T>
__device__ __forceinline__ Best<T> warp_best(const Best<T>& mine) {
  const Key<T> key = warp_max(mine.key);
  const uint32_t id = warp_min(mine.key == key ? static_cast<uint32_t>(mine.id) : 0xffffffffu);
  return {key, static_cast<int32_t>(id)};
}

struct GroupRule {
  int32_t num_groups, num_kept;
  bool top2_sum;  // score of a group: sum of its two best keys' values; otherwise the best
};

// The two best keys of some, and the key of a group that has them.
template <class T>
struct TopTwo {
  Key<T> first = 0, second = 0;

  __device__ __forceinline__ void add(Key<T> key) {
    second = max(second, min(first, key));
    first = max(first, key);
  }
  __device__ __forceinline__ void merge(const TopTwo& other) {
    second = max(min(first, other.first), max(second, other.second));
    first = max(first, other.first);
  }
  __device__ __forceinline__ Key<T> group_key(const GroupRule& rule) const {
    return rule.top2_sum ? key_of(value_of<T>(first) + value_of<T>(second)) : first;
  }
};

template <class T, int N>
struct RegisterRow {
  static constexpr bool kInRegisters = true;
  using Value = T;
  int lane;
  int32_t num_experts;
  T x[N];
  Key<T> key[N];

  __device__ __forceinline__ int first_id() const { return lane * N; }

  // Sets what is known without reading the row.
  __device__ __forceinline__ void place(const RowSource& source) {
    lane = static_cast<int>(threadIdx.x % kWarp);
    num_experts = source.num_experts;
  }

  __device__ __forceinline__ void load(const RowSource& source, Key<T>*) {
    place(source);
    with_logit_type<T>(source.type, [&]<class S>(const S*) {
      load_lane<N>(reinterpret_cast<const S*>(source.data), first_id(), num_experts, source.aligned,
                   -std::numeric_limits<T>::infinity(), x);
    });
  }

  // Calls fn(id, x) for all existing experts.
  template <class Fn>
  __device__ __forceinline__ void for_each(Fn&& fn) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (first_id() + i < num_experts) fn(first_id() + i, x[i]);
    }
  }

  // Makes keys of ranked(x) + bias[id]; bias may be nullptr.
  template <class Fn>
  __device__ __forceinline__ void make_keys(const T* bias, Fn&& ranked) {
    T added[N] = {};
    if (bias != nullptr) {
      load_lane<N>(bias, first_id(), num_experts, reinterpret_cast<uintptr_t>(bias) % 16 == 0, T(0),
                   added);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      key[i] = first_id() + i < num_experts ? key_of<T>(ranked(x[i]) + added[i]) : 0;
    }
  }

  // Stores this lane's values to out[id], rounded to S.
  template <class S>
  __device__ __forceinline__ void store(S* out, const T (&values)[N]) const {
    store_lane<N>(out, first_id(), num_experts, reinterpret_cast<uintptr_t>(out) % 16 == 0, values);
  }

  __device__ __forceinline__ Best<T> lane_best() const {
    Best<T> best{key[0], first_id()};
#pragma unroll
    for (int i = 1; i < N; ++i) {
      if (key[i] > best.key) best = {key[i], first_id() + i};
    }
    return best;
  }

  // Takes the expert out; true in the lane that had it.
  __device__ __forceinline__ bool strike(int32_t id) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (first_id() + i == id) key[i] = 0;
    }
    return id / N == lane;
  }

  // Strikes the experts of all but the best groups out.
  __device__ __forceinline__ void limit_groups(const GroupRule& rule, Key<T>*) {
    const int size = num_experts / rule.num_groups;
    const int lanes = size / N;  // of a group, where it has whole ones
    if (size % N == 0 && (lanes & (lanes - 1)) == 0) {
      limit_lane_groups(rule, lanes);
    } else {
      limit_any_groups(rule, size);
    }
  }

 private:
  // Groups of a power of two of lanes, as DeepSeek's are.
  __device__ __forceinline__ void limit_lane_groups(const GroupRule& rule, int lanes) {
    TopTwo<T> top;
#pragma unroll
    for (int i = 0; i < N; ++i) top.add(key[i]);
    for (int step = 1; step < lanes; step *= 2) {
      TopTwo<T> other;
      other.first = __shfl_xor_sync(kAllLanes, top.first, step);
      other.second = __shfl_xor_sync(kAllLanes, top.second, step);
      top.merge(other);
    }
    const int group = lane / lanes;
    Best<T> mine{group < rule.num_groups ? top.group_key(rule) : 0, group};
    bool kept = false;
    for (int k = 0; k < rule.num_kept; ++k) {
      if (warp_best(mine).id == group) {
        kept = true;
        mine.key = 0;
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) key[i] = kept ? key[i] : 0;
  }

  // Limits the experts to the best groups; group g is ranked in lane g % 32, place g / 32.
  __device__ __forceinline__ void limit_any_groups(const GroupRule& rule, int size) {
    Key<T> group_key[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      group_key[j] = 0;
      for (int l = 0; l < kWarp && j * kWarp + l < rule.num_groups; ++l) {
        const int begin = (j * kWarp + l) * size;
        TopTwo<T> top;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const int id = first_id() + i;
          if (id >= begin && id < begin + size) top.add(key[i]);
        }
#pragma unroll
        for (int step = kWarp / 2; step > 0; step /= 2) {
          TopTwo<T> other;
          other.first = __shfl_xor_sync(kAllLanes, top.first, step);
          other.second = __shfl_xor_sync(kAllLanes, top.second, step);
          top.merge(other);
        }
        if (l == lane) group_key[j] = top.group_key(rule);
      }
    }
    uint32_t kept = 0;  // bit j: the group in place j
    for (int k = 0; k < rule.num_kept; ++k) {
      Best<T> mine{group_key[0], lane};
#pragma unroll
      for (int j = 1; j < N; ++j) {
        if (group_key[j] > mine.key) mine = {group_key[j], j * kWarp + lane};
      }
      const int32_t id = warp_best(mine).id;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if (j * kWarp + lane == id) {
          group_key[j] = 0;
          kept |= 1u << j;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int group = (first_id() + i) / size;
      const uint32_t bits = __shfl_sync(kAllLanes, kept, group % kWarp);
      if (group >= rule.num_groups || (bits >> (group / kWarp) & 1) == 0) key[i] = 0;
    }
  }
};

template <class T>
struct MemoryRow {
  static constexpr bool kInRegisters = false;
  using Value = T;
  int lane;
  int32_t num_experts;
  RowSource source;
  Key<T>* key;  // [E], of this warp; each lane uses its own but where a __syncwarp stands before

  __device__ void place(const RowSource& from) {
    lane = static_cast<int>(threadIdx.x % kWarp);
    num_experts = from.num_experts;
    source = from;
  }

  __device__ void load(const RowSource& from, Key<T>* workspace) {
    place(from);
    key = workspace;
  }

  template <class Fn>
  __device__ void for_each(Fn&& fn) const {
    for (int32_t e = lane; e < num_experts; e += kWarp) fn(e, source.at<T>(e));
  }

  template <class Fn>
  __device__ void make_keys(const T* bias, Fn&& ranked) {
    for (int32_t e = lane; e < num_experts; e += kWarp) {
      const T value = ranked(source.at<T>(e));
      key[e] = key_of<T>(bias != nullptr ? value + bias[e] : value);
    }
  }

  __device__ Best<T> lane_best() const { return best_of(key, num_experts); }

  __device__ bool strike(int32_t id) {
    if (id % kWarp != lane) return false;
    key[id] = 0;
    return true;
  }

  __device__ void limit_groups(const GroupRule& rule, Key<T>* group_key) {
    const int32_t size = num_experts / rule.num_groups;
    __syncwarp();
    for (int32_t g = lane; g < rule.num_groups; g += kWarp) {
      TopTwo<T> top;
      for (int32_t i = 0; i < size; ++i) top.add(key[g * size + i]);
      group_key[g] = top.group_key(rule);
    }
    Best<T> mine = best_of(group_key, rule.num_groups);
    for (int32_t k = 0; k < rule.num_kept; ++k) {
      const int32_t id = warp_best(mine).id;
      if (id % kWarp == lane) {
        group_key[id] = 0;
        mine = best_of(group_key, rule.num_groups);
      }
    }
    __syncwarp();
    // Selected groups are marked: the groups that still have a key were not selected.
    for (int32_t e = lane; e < num_experts; e += kWarp) {
      if (group_key[e / size] != 0) key[e] = 0;
    }
    __syncwarp();
  }

 private:
  __device__ Best<T> best_of(const Key<T>* keys, int32_t n) const {
    Best<T> best{0, lane};
    for (int32_t i = lane; i < n; i += kWarp) {
      if (keys[i] > best.key) best = {keys[i], i};
    }
    return best;
  }
};

// --- softmax over a row: e^(x - max) / sum

template <class T>
struct Softmax {
  T max, sum;

  __device__ __forceinline__ T exponential(T x) const { return exp_of(x - max); }
  __device__ __forceinline__ T operator()(T x) const { return exponential(x) / sum; }
};

template <class Row>
__device__ __forceinline__ Softmax<typename Row::Value> softmax_of(const Row& row) {
  using T = typename Row::Value;
  Softmax<T> s{-std::numeric_limits<T>::infinity(), T(0)};
  row.for_each([&](int32_t, T x) { s.max = max_number(s.max, x); });
  s.max = warp_max_number(s.max);
  row.for_each([&](int32_t, T x) { s.sum += s.exponential(x); });
  s.sum = warp_sum(s.sum);
  return s;
}

// --- launching: the form of the row for E experts, and how many blocks

// Calls fn with a null pointer to the row type.
template <class T, class Fn>
Status with_row(int64_t num_experts, bool in_registers, Fn&& fn) {
  if (!in_registers) return fn(static_cast<MemoryRow<T>*>(nullptr));
  if (num_experts <= 32) return fn(static_cast<RegisterRow<T, 1>*>(nullptr));
  if (num_experts <= 64) return fn(static_cast<RegisterRow<T, 2>*>(nullptr));
  if (num_experts <= 128) return fn(static_cast<RegisterRow<T, 4>*>(nullptr));
  if constexpr (sizeof(T) == 8) {
    return fn(static_cast<RegisterRow<T, 8>*>(nullptr));
  } else {
    if (num_experts <= 256) return fn(static_cast<RegisterRow<T, 8>*>(nullptr));
    if (num_experts <= 512) return fn(static_cast<RegisterRow<T, 16>*>(nullptr));
    return fn(static_cast<RegisterRow<T, 32>*>(nullptr));
  }
}

// A warp a token; with a workspace, kMemoryBlocks at most, each for many tokens.
constexpr int64_t kMemoryBlocks = 512;

inline int64_t router_blocks(int64_t num_tokens, bool in_registers) {
  const int64_t blocks = ceil_div<int64_t>(num_tokens, kRouterWarps);
  return in_registers || blocks < kMemoryBlocks ? blocks : kMemoryBlocks;
}

__device__ __forceinline__ int64_t router_warp() {
  return static_cast<int64_t>(blockIdx.x) * kRouterWarps + threadIdx.x / kWarp;
}

__device__ __forceinline__ int64_t router_step() {
  return static_cast<int64_t>(gridDim.x) * kRouterWarps;
}

}  // namespace moe_ops::cuda
