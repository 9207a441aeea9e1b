// Reductions over a warp. Sums run in one fixed order: the bits do not depend on the schedule.
#pragma once

#include <cstdint>

namespace moe_ops::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Returns the sum of all lanes, in every lane. Width: only within groups of so many lanes.
template <int Width = kWarp, class T>
__device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int step = Width / 2; step > 0; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
  return v;
}

// Returns the maximum, ignoring NaN.
__device__ __forceinline__ float max_number(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double max_number(double a, double b) { return fmax(a, b); }

template <class T>
__device__ __forceinline__ T warp_max_number(T v) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    v = max_number(v, __shfl_xor_sync(kAllLanes, v, step));
  }
  return v;
}

// Integers: one instruction from sm_80 on.
__device__ __forceinline__ uint32_t warp_max(uint32_t v) { return __reduce_max_sync(kAllLanes, v); }
__device__ __forceinline__ uint32_t warp_min(uint32_t v) { return __reduce_min_sync(kAllLanes, v); }
__device__ __forceinline__ uint64_t warp_max(uint64_t v) {
  const auto high = static_cast<uint32_t>(v >> 32);
  const uint32_t best = warp_max(high);
  const uint32_t low = warp_max(high == best ? static_cast<uint32_t>(v) : 0u);
  return static_cast<uint64_t>(best) << 32 | low;
}

// Returns the sum of the lanes below this one.
__device__ __forceinline__ int32_t warp_exclusive_sum(int32_t v, int lane) {
  int32_t sum = v;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int32_t below = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += below;
  }
  return sum - v;
}

__device__ __forceinline__ unsigned lanes_below(int lane) { return (1u << lane) - 1u; }

}  // namespace moe_ops::cuda
