// Element types on the device, and accesses of up to 16 bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "moe_ops/common.h"

namespace moe_ops::cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;

// Type in which elements of type S are summed.
template <class S>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <class S>
using Accumulate = typename AccumulateOf<S>::type;

__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(bf16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float widen(fp16 v) { return __half2float(v); }

// Rounds to nearest.
template <class S>
__device__ __forceinline__ S narrow(Accumulate<S> v) {
  if constexpr (sizeof(S) > 2) {
    return v;
  } else if constexpr (sizeof(S) == 2) {
    S out;
    if constexpr (__is_same(S, bf16)) {
      out = __float2bfloat16_rn(v);
    } else {
      out = __float2half_rn(v);
    }
    return out;
  }
}

// The register type of an access of so many bytes.
template <int Bytes>
struct RawOf;
template <>
struct RawOf<16> {
  using type = uint4;
};
template <>
struct RawOf<8> {
  using type = uint2;
};
template <>
struct RawOf<4> {
  using type = uint32_t;
};
template <>
struct RawOf<2> {
  using type = uint16_t;
};
template <>
struct RawOf<1> {
  using type = uint8_t;
};
template <int Bytes>
using Raw = typename RawOf<Bytes>::type;

// Elements in a 16-byte access.
template <class S>
constexpr int kVector = 16 / static_cast<int>(sizeof(S));

// N elements of S in the accumulate type. One access where `p` is aligned to all of them.
template <class S, int N>
struct Wide {
  Accumulate<S> v[N];
};

// N elements of S in their memory format: loads in flight together take fewer registers that way.
template <class S, int N>
struct Packed {
  Raw<N * sizeof(S)> raw;
};

template <int N, class S>
__device__ __forceinline__ Packed<S, N> load_packed(const S* p) {
  return {*reinterpret_cast<const Raw<N * sizeof(S)>*>(p)};
}

template <class S, int N>
__device__ __forceinline__ Wide<S, N> unpack(const Packed<S, N>& packed) {
  const Raw<N * sizeof(S)>& raw = packed.raw;
  Wide<S, N> out;
  if constexpr (__is_same(S, bf16) && N % 2 == 0) {
    // A bf16 is the upper half of a float.
    uint32_t words[N / 2];
    memcpy(words, &raw, sizeof(raw));
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      out.v[2 * i] = __uint_as_float(words[i] << 16);
      out.v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  } else {
    S s[N];
    memcpy(s, &raw, sizeof(raw));
#pragma unroll
    for (int i = 0; i < N; ++i) out.v[i] = widen(s[i]);
  }
  return out;
}

template <int N, class S>
__device__ __forceinline__ Wide<S, N> load_wide(const S* p) {
  return unpack(load_packed<N>(p));
}

// Rounds to nearest.
template <class S, int N>
__device__ __forceinline__ Packed<S, N> pack(const Wide<S, N>& values) {
  Packed<S, N> packed;
  if constexpr (sizeof(S) == 2 && N % 2 == 0) {
    uint32_t words[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      if constexpr (__is_same(S, bf16)) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(values.v[2 * i], values.v[2 * i + 1]);
        memcpy(&words[i], &pair, 4);
      } else {
        const __half2 pair = __floats2half2_rn(values.v[2 * i], values.v[2 * i + 1]);
        memcpy(&words[i], &pair, 4);
      }
    }
    memcpy(&packed.raw, words, sizeof(packed.raw));
  } else {
    S s[N];
#pragma unroll
    for (int i = 0; i < N; ++i) s[i] = narrow<S>(values.v[i]);
    memcpy(&packed.raw, s, sizeof(packed.raw));
  }
  return packed;
}

template <int N, class S>
__device__ __forceinline__ void store_wide(S* p, const Wide<S, N>& values) {
  *reinterpret_cast<Raw<N * sizeof(S)>*>(p) = pack(values).raw;
}

// Returns whether rows `stride` bytes apart from `p` on all start at a multiple of `bytes`.
inline bool rows_aligned(const void* p, int64_t stride, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0 && stride % bytes == 0;
}

}  // namespace moe_ops::cuda
