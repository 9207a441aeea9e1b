// float8_e4m3fn on the device, in integer operations: the same text for every card, and the bits of
// the CPU kernels.
#pragma once

#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"
#include "moe_ops/common.h"

namespace moe_ops::cuda {

// Returns the code nearest to f, ties to even. |f| is less than 464.
__device__ __forceinline__ uint32_t e4m3_code(float f) {
  const uint32_t u = __float_as_uint(f);
  const uint32_t a = u & 0x7fffffffu, sign = u >> 24 & 0x80u;
  // Below 2^-6 the step is 2^-9, that of floats from 2^14 on.
  const uint32_t small = __float_as_uint(__fadd_rn(__uint_as_float(a), 0x1p14f)) - 0x46800000u;
  const uint32_t normal = (a + 0x7ffffu + (a >> 20 & 1u) - (120u << 23)) >> 20;
  return sign | (a < 0x3c800000u ? small : normal);
}

// Scale of a block whose largest magnitude has the bits `most`. Magnitudes have the order of their
// bits, with infinity above all numbers and NaN above infinity.
struct Fp8Scale {
  float inverse;  // what numbers are multiplied by; NaN where one of them is not finite
  float scale;
};

__device__ __forceinline__ Fp8Scale fp8_scale(uint32_t most) {
  const float nan = __uint_as_float(0x7fc00000u);
  if (most >= 0x7f800000u) return {nan, nan};
  const float amax = fmaxf(__uint_as_float(most), kFp8MinAmax);
  return {__fdiv_rn(kFp8Max, amax), __fdiv_rn(amax, kFp8Max)};
}

__device__ __forceinline__ uint32_t fp8_code(float v, const Fp8Scale& s) {
  return s.inverse == s.inverse ? e4m3_code(__fmul_rn(v, s.inverse)) : kFp8Nan;
}

// A lane's part of a block of 128: four codes, the first in the low byte, and the block's scale.
struct Fp8Lane {
  uint32_t codes;
  float scale;
};

// Quantizes a warp's 4 x 32 elements to one block of codes (moe_ops/quantize_fp8.h).
__device__ __forceinline__ Fp8Lane quantize_fp8_block(const float (&v)[4]) {
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) most = max(most, __float_as_uint(v[i]) & 0x7fffffffu);
  const Fp8Scale s = fp8_scale(warp_max(most));
  Fp8Lane out{0, s.scale};
#pragma unroll
  for (int i = 0; i < 4; ++i) out.codes |= fp8_code(v[i], s) << (8 * i);
  return out;
}

// Stores a lane's codes at columns c to c + 4 of a row, as far as they are below `columns`.
template <bool kAligned>
__device__ __forceinline__ void store_codes(uint8_t* row, int64_t c, int64_t columns,
                                            uint32_t codes) {
  if constexpr (kAligned) {
    if (c < columns) *reinterpret_cast<uint32_t*>(row + c) = codes;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (c + i < columns) row[c + i] = static_cast<uint8_t>(codes >> (8 * i));
    }
  }
}

// Four bytes of codes as two pairs of float16, which holds every number of e4m3.
struct Fp16Pairs {
  uint32_t low, high;  // bytes 0 and 1, bytes 2 and 3
};

__device__ __forceinline__ uint32_t fp16_pair(uint32_t spread) {
  // `spread` has a code in the upper byte of either half. Moved down by one bit, exponent and
  // mantissa are the number times 2^-8 in float16; subnormals are subnormals there.
  const uint32_t shifted = (spread & 0x80008000u) | (spread >> 1 & 0x3f803f80u);
  __half2 v;
  memcpy(&v, &shifted, 4);
  v = __hmul2(v, __half2half2(__ushort_as_half(0x5c00)));  // 256
  uint32_t bits;
  memcpy(&bits, &v, 4);
  // 0x7f came out as 480 and stands for NaN.
  const __half2 limit = __half2half2(__ushort_as_half(0x5f80));
  return bits | __heq2_mask(__habs2(v), limit);
}

__device__ __forceinline__ Fp16Pairs fp16_pairs(uint32_t codes) {
  return {fp16_pair(__byte_perm(codes, 0, 0x1404)), fp16_pair(__byte_perm(codes, 0, 0x3424))};
}

}  // namespace moe_ops::cuda
