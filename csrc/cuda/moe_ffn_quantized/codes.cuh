// Codes of 8 and 4 bits as numbers of the activations' type, which holds them exactly.
#pragma once

#include "cuda/vec.cuh"

namespace moe_ops::cuda::quantized {

// The magic byte m of a type: the 16-bit number m << 8 | c is base + c for c from 0 to 128, with a
// base of 128 in bfloat16 and of 1024 in float16.
template <class S>
constexpr uint32_t kMagic = std::is_same_v<S, bf16> ? 0x43434343u : 0x64646464u;

template <class S>
__device__ __forceinline__ uint32_t subtract(uint32_t a, uint32_t b) {
  using Pair = std::conditional_t<std::is_same_v<S, bf16>, __nv_bfloat162, __half2>;
  Pair x, y;
  memcpy(&x, &a, 4);
  memcpy(&y, &b, 4);
  x = __hsub2(x, y);
  memcpy(&a, &x, 4);
  return a;
}

// Returns the lowest four bits of both halves, or'ed with `bits`, in one instruction; the compiler
// would emit two.
__device__ __forceinline__ uint32_t low_nibbles(uint32_t v, uint32_t bits) {
  uint32_t r;
  asm("lop3.b32 %0, %1, 0x000f000f, %2, 0xea;" : "=r"(r) : "r"(v), "r"(bits));
  return r;
}

// Returns two bytes, each below the magic byte, as two signed numbers. In a byte, the lower seven
// bits count up and the highest one subtracts 128: (base + low) - (base + high).
template <class S>
__device__ __forceinline__ uint32_t signed_pair(uint32_t v) {
  return subtract<S>(v & 0xff7fff7fu, v & 0xff80ff80u);
}

// Expands eight codes to 16-bit pairs. 8 bits: two words in their order, (0, 1), (2, 3), (4, 5),
// (6, 7). 4 bits: one word as (0, 4), (1, 5), (2, 6), (3, 7), the order that takes one step a pair;
// code and what it multiplies may be in any order as long as it is the same.
template <class S>
__device__ __forceinline__ void expand8(uint32_t first, uint32_t second, uint32_t (&r)[4]) {
  r[0] = signed_pair<S>(__byte_perm(first, kMagic<S>, 0x4140));
  r[1] = signed_pair<S>(__byte_perm(first, kMagic<S>, 0x4342));
  r[2] = signed_pair<S>(__byte_perm(second, kMagic<S>, 0x4140));
  r[3] = signed_pair<S>(__byte_perm(second, kMagic<S>, 0x4342));
}

template <class S>
__device__ __forceinline__ void expand4(uint32_t word, uint32_t (&r)[4]) {
  constexpr uint32_t kHigh = kMagic<S> & 0xff00ff00u;
  // base + 8
  constexpr uint32_t kZero = kHigh | 0x00080008u;
#pragma unroll
  for (int i = 0; i < 4; ++i) r[i] = subtract<S>(low_nibbles(word >> (4 * i), kHigh), kZero);
}

// Expands the eight bytes to floats, in their order.
__device__ __forceinline__ void expand8(uint32_t first, uint32_t second, float (&v)[8]) {
  // 2^23 + c + 128 for a signed byte c.
  first ^= 0x80808080u;
  second ^= 0x80808080u;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t word = i < 4 ? first : second;
    v[i] = __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7540u + i % 4)) - 8388736.0f;
  }
}

__device__ __forceinline__ void expand4(uint32_t word, float (&v)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i)
    v[i] = __uint_as_float((word >> (4 * i) & 15u) | 0x4b000000u) - 8388616.0f;
}

}  // namespace moe_ops::cuda::quantized
