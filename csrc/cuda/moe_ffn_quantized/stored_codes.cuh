// Codes of every stored format as numbers that tensor cores multiply, four of a lane at a time.
//
// All codes are exact in float16 and bfloat16, and so is e2m1 times e4m3; float32 activations meet
// codes that were widened from float16.
#pragma once

#include <cute/arch/mma_sm80.hpp>

#include "cuda/fp8.cuh"
#include "cuda/moe_ffn_quantized/codes.cuh"

namespace moe_ops::cuda::quantized {

template <class S>
using Half = std::conditional_t<std::is_same_v<S, float>, fp16, S>;

template <class H>
using HalfPair = std::conditional_t<std::is_same_v<H, bf16>, __nv_bfloat162, __half2>;

template <class H>
__device__ __forceinline__ HalfPair<H> as_pair(uint32_t bits) {
  HalfPair<H> v;
  memcpy(&v, &bits, 4);
  return v;
}

template <class H>
__device__ __forceinline__ uint32_t bits_of(HalfPair<H> v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  return bits;
}

template <class H>
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  return bits_of<H>(__hmul2(as_pair<H>(a), as_pair<H>(b)));
}

// Returns the codes of e2m1 in the lowest four bits of both halves as numbers. Moved to where H has
// its lowest exponent bits and its highest mantissa bit, a code is the number times 2 to the power
// of 1 - bias, subnormals included.
template <class H>
__device__ __forceinline__ uint32_t e2m1_pair(uint32_t v) {
  constexpr int kUp = std::is_same_v<H, bf16> ? 6 : 9;
  constexpr uint32_t kScale = std::is_same_v<H, bf16> ? 0x7e807e80u : 0x74007400u;
  const uint32_t bits = (v << 12 & 0x80008000u) | (v << kUp & (0x00070007u << kUp));
  return multiply_pairs<H>(bits, kScale);
}

// Returns the codes of e4m3 in the upper bytes of both halves as numbers.
template <class H>
__device__ __forceinline__ uint32_t e4m3_pair(uint32_t v) {
  if constexpr (std::is_same_v<H, bf16>) {
    const uint32_t bits = (v & 0x80008000u) | (v >> 4 & 0x07f007f0u);
    const uint32_t numbers = multiply_pairs<H>(bits, 0x7b807b80u);  // 2^120
    // 0x7f came out as 480 and stands for NaN.
    return numbers | __heq2_mask(__habs2(as_pair<H>(numbers)), as_pair<H>(0x43f043f0u));
  } else {
    return fp16_pair(v);
  }
}

// Four codes of a line: two pairs, or four floats.
template <class S>
struct FourCodes {
  uint32_t r[2];
  __device__ __forceinline__ FourCodes(uint32_t first, uint32_t second) : r{first, second} {}
};

template <>
struct FourCodes<float> {
  float r[4];
  __device__ __forceinline__ FourCodes(uint32_t first, uint32_t second) {
    const float2 a = __half22float2(as_pair<fp16>(first)),
                 b = __half22float2(as_pair<fp16>(second));
    r[0] = a.x, r[1] = a.y, r[2] = b.x, r[3] = b.y;
  }
};

// Four numbers of a row, in the order of the codes that they meet. float32 is a sum of two tf32
// terms, which miss 2^-22 of it.
template <class S>
struct FourNumbers {
  uint32_t r[2];
};

template <>
struct FourNumbers<float> {
  uint32_t first[4], rest[4];
  __device__ __forceinline__ FourNumbers() : first{}, rest{} {}
  __device__ __forceinline__ FourNumbers(float a, float b, float c, float d) {
    const float v[4] = {a, b, c, d};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      first[i] = __float_as_uint(v[i]) & 0xffffe000u;
      asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rest[i]) : "f"(v[i] - __uint_as_float(first[i])));
    }
  }
};

// Numbers 0, 1, 2, 3 from x on.
template <class S>
__device__ __forceinline__ FourNumbers<S> in_order(const S* x) {
  const uint2 v = *reinterpret_cast<const uint2*>(x);
  return {{v.x, v.y}};
}

__device__ __forceinline__ FourNumbers<float> in_order(const float* x) {
  const float4 v = *reinterpret_cast<const float4*>(x);
  return {v.x, v.y, v.z, v.w};
}

// Numbers 0, 2, 1, 3 from x on: those of the low (or the high) halves of a word's bytes.
template <class S>
__device__ __forceinline__ FourNumbers<S> even_first(const S* x) {
  const uint2 v = *reinterpret_cast<const uint2*>(x);
  return {{__byte_perm(v.x, v.y, 0x5410), __byte_perm(v.x, v.y, 0x7632)}};
}

__device__ __forceinline__ FourNumbers<float> even_first(const float* x) {
  const float4 v = *reinterpret_cast<const float4*>(x);
  return {v.x, v.z, v.y, v.w};
}

// Numbers m, m + 4, m + 2, m + 6 from x on, for both m: those of a word's eight codes.
template <class S>
__device__ __forceinline__ void nibble_order(const S* x, FourNumbers<S> (&r)[2]) {
  const uint4 v = *reinterpret_cast<const uint4*>(x);
  r[0] = {{__byte_perm(v.x, v.z, 0x5410), __byte_perm(v.y, v.w, 0x5410)}};
  r[1] = {{__byte_perm(v.x, v.z, 0x7632), __byte_perm(v.y, v.w, 0x7632)}};
}

__device__ __forceinline__ void nibble_order(const float* x, FourNumbers<float> (&r)[2]) {
  const float4 a = *reinterpret_cast<const float4*>(x), b = reinterpret_cast<const float4*>(x)[1];
  r[0] = {a.x, b.x, a.z, b.z};
  r[1] = {a.y, b.y, a.w, b.w};
}

// Adds 16 codes of each of 16 lines times 16 numbers of 8 rows; a lane has four of lines g and
// g + 8, and four of a row.
template <class S>
__device__ __forceinline__ void multiply(float (&c)[4], const FourCodes<S>& low,
                                         const FourCodes<S>& high, const FourNumbers<S>& x) {
  if constexpr (std::is_same_v<S, float>) {
    using Mma = cute::SM80_16x8x8_F32TF32TF32F32_TN;
    const auto bits = [](float v) { return __float_as_uint(v); };
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
#pragma unroll
      for (int term = 0; term < 2; ++term) {
        const uint32_t (&b)[4] = term == 0 ? x.rest : x.first;
        Mma::fma(c[0], c[1], c[2], c[3], bits(low.r[i]), bits(high.r[i]), bits(low.r[i + 1]),
                 bits(high.r[i + 1]), b[i], b[i + 1], c[0], c[1], c[2], c[3]);
      }
    }
  } else {
    using Mma = std::conditional_t<std::is_same_v<S, bf16>, cute::SM80_16x8x16_F32BF16BF16F32_TN,
                                   cute::SM80_16x8x16_F32F16F16F32_TN>;
    Mma::fma(c[0], c[1], c[2], c[3], low.r[0], high.r[0], low.r[1], high.r[1], x.r[0], x.r[1], c[0],
             c[1], c[2], c[3]);
  }
}

// --- words of codes. `zero` is what is taken off a code.

template <class S>
__device__ __forceinline__ FourCodes<S> int8_codes(uint32_t word) {
  using H = Half<S>;
  return {signed_pair<H>(__byte_perm(word, kMagic<H>, 0x4140)),
          signed_pair<H>(__byte_perm(word, kMagic<H>, 0x4342))};
}

template <class S>
__device__ __forceinline__ FourCodes<S> e4m3_codes(uint32_t word) {
  using H = Half<S>;
  return {e4m3_pair<H>(__byte_perm(word, 0, 0x1404)), e4m3_pair<H>(__byte_perm(word, 0, 0x3424))};
}

// The lower (m = 0) or upper halves of a word's bytes, in the order 0, 2, 1, 3.
template <class S>
__device__ __forceinline__ FourCodes<S> int4_codes(uint32_t word, int m, uint32_t zero) {
  using H = Half<S>;
  constexpr uint32_t kHigh = kMagic<H> & 0xff00ff00u;
  const uint32_t base = kHigh | zero * 0x00010001u;
  return {subtract<H>(low_nibbles(word >> (4 * m), kHigh), base),
          subtract<H>(low_nibbles(word >> (4 * m + 8), kHigh), base)};
}

template <class S>
__device__ __forceinline__ FourCodes<S> e2m1_codes(uint32_t word, int m) {
  using H = Half<S>;
  return {e2m1_pair<H>(word >> (4 * m)), e2m1_pair<H>(word >> (4 * m + 8))};
}

template <class S>
__device__ __forceinline__ FourCodes<S> scaled_e2m1_codes(uint32_t word, int m, uint32_t scale) {
  using H = Half<S>;
  return {multiply_pairs<H>(e2m1_pair<H>(word >> (4 * m)), scale),
          multiply_pairs<H>(e2m1_pair<H>(word >> (4 * m + 8)), scale)};
}

// Codes of six bits, whose upper two are in the bits `shift` and `shift` + 1 of the bytes of
// `high`.
template <class S>
__device__ __forceinline__ FourCodes<S> six_bit_codes(uint32_t word, int m, uint32_t high,
                                                      int shift) {
  using H = Half<S>;
  constexpr uint32_t kHigh = kMagic<H> & 0xff00ff00u;
  constexpr uint32_t kZero = kHigh | 0x00200020u;
  const uint32_t upper = high >> shift;
  return {subtract<H>(low_nibbles(word >> (4 * m), kHigh | (upper << 4 & 0x00300030u)), kZero),
          subtract<H>(low_nibbles(word >> (4 * m + 8), kHigh | (upper >> 4 & 0x00300030u)), kZero)};
}

}  // namespace moe_ops::cuda::quantized
