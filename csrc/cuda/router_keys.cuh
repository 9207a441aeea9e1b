// Keys that rank experts, and the logits they come from.
#pragma once

#include "cuda/vec.cuh"
#include "moe_ops/common.h"

namespace moe_ops::cuda {

// --- keys: unsigned integers in the order of the values they stand for. NaN is below -inf, both
// zeros are equal, and 0 is below everything: experts that are taken, not allowed, not there.

template <class T>
struct KeyType {
  using type = uint32_t;
};
template <>
struct KeyType<double> {
  using type = uint64_t;
};
template <class T>
using Key = typename KeyType<T>::type;

template <class T>
__device__ __forceinline__ Key<T> key_of(T x) {
  constexpr Key<T> kSign = Key<T>(1) << (8 * sizeof(T) - 1);
  Key<T> bits;
  memcpy(&bits, &x, sizeof(T));
  if (x == T(0)) bits = 0;
  const Key<T> key = (bits & kSign) != 0 ? ~bits : bits | kSign;
  return x == x ? key : Key<T>(1);
}

// Returns the value of a key, except for -0; the key of NaN gives a NaN.
template <class T>
__device__ __forceinline__ T value_of(Key<T> key) {
  constexpr Key<T> kSign = Key<T>(1) << (8 * sizeof(T) - 1);
  const Key<T> bits = (key & kSign) != 0 ? key ^ kSign : ~key;
  T x;
  memcpy(&x, &bits, sizeof(T));
  return x;
}

// --- logits

template <class T, class Fn>
__device__ __forceinline__ auto with_logit_type(DType type, Fn&& fn) {
  if constexpr (sizeof(T) == 8) {
    return fn(static_cast<const double*>(nullptr));
  } else {
    if (type == DType::kBFloat16) return fn(static_cast<const bf16*>(nullptr));
    if (type == DType::kFloat16) return fn(static_cast<const fp16*>(nullptr));
    return fn(static_cast<const float*>(nullptr));
  }
}

// Source of a row of logits.
struct RowSource {
  const char* data;  // of the row
  DType type;
  bool aligned;  // to 16 bytes
  int32_t num_experts;

  template <class T>
  __device__ __forceinline__ T at(int32_t e) const {
    return with_logit_type<T>(type, [&]<class S>(const S*) {
      return static_cast<T>(widen(reinterpret_cast<const S*>(data)[e]));
    });
  }
};

__device__ __forceinline__ RowSource row_source(const void* logits, DType type, int64_t stride,
                                                int64_t token, int64_t num_experts) {
  const char* const row = static_cast<const char*>(logits) + token * stride * dtype_size(type);
  return {row, type, reinterpret_cast<uintptr_t>(row) % 16 == 0, static_cast<int32_t>(num_experts)};
}

// Loads N neighboring values from `first` on; values at or past `size` become `fill`.
template <int N, class S, class T>
__device__ __forceinline__ void load_lane(const S* row, int first, int size, bool aligned, T fill,
                                          T (&x)[N]) {
  constexpr int V = N < kVector<S> ? N : kVector<S>;
#pragma unroll
  for (int i = 0; i < N; i += V) {
    if (aligned && first + i + V <= size) {
      const Wide<S, V> part = load_wide<V>(row + first + i);
#pragma unroll
      for (int v = 0; v < V; ++v) x[i + v] = static_cast<T>(part.v[v]);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        x[i + v] = first + i + v < size ? static_cast<T>(widen(row[first + i + v])) : fill;
      }
    }
  }
}

template <int N, class S, class T>
__device__ __forceinline__ void store_lane(S* row, int first, int size, bool aligned,
                                           const T (&x)[N]) {
  constexpr int V = N < kVector<S> ? N : kVector<S>;
#pragma unroll
  for (int i = 0; i < N; i += V) {
    if (aligned && first + i + V <= size) {
      Wide<S, V> part;
#pragma unroll
      for (int v = 0; v < V; ++v) part.v[v] = static_cast<Accumulate<S>>(x[i + v]);
      store_wide<V>(row + first + i, part);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (first + i + v < size) row[first + i + v] = narrow<S>(x[i + v]);
      }
    }
  }
}

}  // namespace moe_ops::cuda
