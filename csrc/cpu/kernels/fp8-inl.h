// float8_e4m3fn: sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinity, 0x7f is NaN.
// Included by kernels-inl.h, inside its namespace.

// Codes of e4m3 in memory.
struct E4m3 {
  uint8_t bits;
};

// Decodes a code. Its bits, seven of them in place of a float's exponent and mantissa, are the
// value times 2^-120; one exact multiplication rebiases it and normalizes subnormals.
inline float to_float(E4m3 v) {
  const uint32_t magnitude = v.bits & 0x7fu;
  float f = __builtin_bit_cast(float, magnitude << 20) * 0x1p120f;
  uint32_t u = __builtin_bit_cast(uint32_t, f);
  if (magnitude == 0x7fu) u |= 0x7f800000u;
  return __builtin_bit_cast(float, u | (uint32_t{v.bits} & 0x80u) << 24);
}

#if defined(__AVX2__) && MOE_VEC_BYTES >= 32
// Codes as float16: seven bits of them in place of its exponent and mantissa are the number times
// 2^-8, and processors convert subnormal float16 as fast as others.
#if MOE_VEC_BYTES == 64
typedef __m256i Halves;
#define MOE_HALF(name) _mm256_##name
inline Halves e4m3_halves(const E4m3* p) {
  const Halves wide = _mm256_cvtepi8_epi16(load_bytes<__m128i_u>(p));
  return _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(-0x4080));
}
#else
typedef __m128i Halves;
#define MOE_HALF(name) _mm_##name
inline Halves e4m3_halves(const E4m3* p) {
  const Halves wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(-0x4080));
}
#endif
#endif

inline Vec<float> load_as(const E4m3* p) {
#if defined(__AVX2__) && MOE_VEC_BYTES >= 32
  const Halves halves = e4m3_halves(p), most = MOE_HALF(set1_epi16)(0x3f80);
  typedef int16_t Words __attribute__((vector_size(MOE_VEC_BYTES / 2)));
  const auto words = __builtin_bit_cast(Words, halves);
  const Words nan = (words & 0x7fff) == __builtin_bit_cast(Words, most);
  const auto marked = __builtin_bit_cast(Halves, words | (nan & 0x4000));
  return __builtin_bit_cast(Vec<float>, MOE_INT(cvtph_ps)(marked)) * 256.0f;
#else
  using F = Simd<float>;
  F::Uint wide;
  for (int i = 0; i < F::kLanes; ++i) wide[i] = p[i].bits;
  const F::Uint magnitude = wide & 0x7fu;
  const Vec<float> f = __builtin_bit_cast(Vec<float>, magnitude << 20) * 0x1p120f;
  F::Uint u = __builtin_bit_cast(F::Uint, f);
  u |= __builtin_bit_cast(F::Uint, magnitude == 0x7fu) & 0x7f800000u;
  return __builtin_bit_cast(Vec<float>, u | (wide & 0x80u) << 24);
#endif
}

// Returns the values of the codes divided by 256; a NaN becomes 480 / 256.
inline Vec<float> e4m3_over_256(const E4m3* p) {
#if defined(__AVX2__) && MOE_VEC_BYTES >= 32
  return __builtin_bit_cast(Vec<float>, MOE_INT(cvtph_ps)(e4m3_halves(p)));
#else
  return load_as(p) * (1.0f / 256);
#endif
}

// Returns whether one of n codes is NaN.
inline bool has_e4m3_nan(const uint8_t* codes, int64_t n) {
  typedef uint8_t Bytes8 __attribute__((vector_size(MOE_VEC_BYTES)));
  Bytes8 most = {};
  int64_t i = 0;
  for (; i + MOE_VEC_BYTES <= n; i += MOE_VEC_BYTES) {
    const Bytes8 magnitude = load_bytes<Bytes8>(codes + i) & 0x7f;
    most = magnitude > most ? magnitude : most;
  }
  uint8_t largest = 0;
  for (int j = 0; j < MOE_VEC_BYTES; ++j) largest = most[j] > largest ? most[j] : largest;
  for (; i < n; ++i) largest = (codes[i] & 0x7f) > largest ? codes[i] & 0x7f : largest;
  return largest == 0x7f;
}

// Returns the code nearest to f, ties to even. |f| is less than 464.
inline uint8_t to_e4m3(float f) {
  const uint32_t u = __builtin_bit_cast(uint32_t, f);
  const uint32_t a = u & 0x7fffffffu, sign = u >> 24 & 0x80u;
  // Below 2^-6 the step is 2^-9, that of floats from 2^14 on.
  const float shifted = __builtin_bit_cast(float, a) + 0x1p14f;
  const uint32_t small = __builtin_bit_cast(uint32_t, shifted) - 0x46800000u;
  const uint32_t normal = (a + 0x7ffffu + (a >> 20 & 1u) - (120u << 23)) >> 20;
  return static_cast<uint8_t>(sign | (a < 0x3c800000u ? small : normal));
}

inline typename Simd<float>::Uint e4m3_codes(Vec<float> f) {
  using F = Simd<float>;
  const F::Uint u = __builtin_bit_cast(F::Uint, f);
  const F::Uint a = u & 0x7fffffffu, sign = u >> 24 & 0x80u;
  const Vec<float> shifted = __builtin_bit_cast(Vec<float>, a) + 0x1p14f;
  const F::Uint small = __builtin_bit_cast(F::Uint, shifted) - 0x46800000u;
  const F::Uint normal = (a + 0x7ffffu + (a >> 20 & 1u) - (120u << 23)) >> 20;
  const F::Uint is_small = __builtin_bit_cast(F::Uint, a < 0x3c800000u);
  return sign | (is_small & small) | (~is_small & normal);
}

// Quantizes n <= kFp8Block values with one scale (moe_ops/quantize_fp8.h).
float fp8_quantize(const float* x, int64_t n, uint8_t* q) {
  using F = Simd<float>;
  constexpr int W = kLanes<float>;
  // Magnitudes order like their bits, infinity above all numbers and NaN above that.
  F::Int most = {};
  int32_t largest = 0;
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const F::Int a = __builtin_bit_cast(F::Int, load<float>(x + i)) & 0x7fffffff;
    most = a > most ? a : most;
  }
  for (int j = 0; j < W; ++j) largest = most[j] > largest ? most[j] : largest;
  for (; i < n; ++i) {
    const int32_t a = __builtin_bit_cast(int32_t, x[i]) & 0x7fffffff;
    largest = a > largest ? a : largest;
  }
  if (largest >= 0x7f800000) {
    for (i = 0; i < n; ++i) q[i] = kFp8Nan;
    return __builtin_bit_cast(float, 0x7fc00000u);
  }
  const float amax = __builtin_bit_cast(float, largest);
  const float block = amax > kFp8MinAmax ? amax : kFp8MinAmax;
  const float inverse = kFp8Max / block;
  for (i = 0; i + W <= n; i += W) {
    const F::Uint codes = e4m3_codes(load<float>(x + i) * inverse);
#if defined(__AVX512F__) && MOE_VEC_BYTES == 64
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i),
                     _mm512_cvtepi32_epi8(__builtin_bit_cast(__m512i, codes)));
#else
    for (int j = 0; j < W; ++j) q[i + j] = static_cast<uint8_t>(codes[j]);
#endif
  }
  for (; i < n; ++i) q[i] = to_e4m3(x[i] * inverse);
  return block / kFp8Max;
}

void fp8_decode(const uint8_t* q, float* dst, int64_t n) {
  constexpr int W = kLanes<float>;
  const auto* p = reinterpret_cast<const E4m3*>(q);
  int64_t i = 0;
  for (; i + W <= n; i += W) store<float>(dst + i, load_as(p + i));
  for (; i < n; ++i) dst[i] = to_float(p[i]);
}

#if defined(__AVX512BF16__) && MOE_VEC_BYTES == 64
// The bfloat16 of each code without its sign, as a table of its low bytes and one of the others.
struct E4m3Halves {
  uint8_t low[128] = {}, upper[128] = {};
  constexpr E4m3Halves() {
    for (int code = 1; code < 128; ++code) {
      int exponent = code >> 3, fraction = code & 7;
      if (exponent == 0) {  // Moves the highest bit to the place that numbers do not store.
        for (exponent = 1; fraction < 8; --exponent) fraction *= 2;
        fraction -= 8;
      }
      const int bits = code == kFp8Nan ? 0x7fc0 : (exponent + 120) << 7 | fraction << 4;
      low[code] = static_cast<uint8_t>(bits);
      upper[code] = static_cast<uint8_t>(bits >> 8);
    }
  }
};
constexpr E4m3Halves kE4m3Halves;

// Decodes 64 codes to bfloat16, which represents every e4m3 value. Of each 16 codes, `first` has
// the first 8 and `second` the others.
struct E4m3Decoder {
  __m512i low[2], upper[2];
  inline E4m3Decoder() {
    for (int i = 0; i < 2; ++i) {
      low[i] = load_bytes<__m512i_u>(kE4m3Halves.low + 64 * i);
      upper[i] = load_bytes<__m512i_u>(kE4m3Halves.upper + 64 * i);
    }
  }
  inline __attribute__((always_inline)) void operator()(__m512i codes, __m512i& first,
                                                        __m512i& second) const {
    const __m512i sign = _mm512_set1_epi8(-128);
    const __m512i low_bytes = _mm512_permutex2var_epi8(low[0], codes, low[1]);
    __m512i bytes = _mm512_permutex2var_epi8(upper[0], codes, upper[1]);
    bytes = _mm512_ternarylogic_epi64(bytes, codes, sign, 0xf8);  // bytes | (codes & sign)
    first = _mm512_unpacklo_epi8(low_bytes, bytes);
    second = _mm512_unpackhi_epi8(low_bytes, bytes);
  }
};

// Returns the mask of the first n of 64 elements.
inline __mmask64 first_of_64(int64_t n) {
  return n >= 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1;
}

void fp8_decode_bf16(const uint8_t* q, uint16_t* dst, int64_t n) {
  const E4m3Decoder decode;
  // Eighths of 64 codes in an order in which the halves of 16 are 32 consecutive codes.
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  __m512i first, second;
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {  // Loads wait for masked stores.
    decode(_mm512_permutexvar_epi64(order, load_bytes<__m512i_u>(q + i)), first, second);
    _mm512_storeu_si512(dst + i, first);
    _mm512_storeu_si512(dst + i + 32, second);
  }
  if (i == n) return;
  const __mmask64 mask = first_of_64(n - i);
  decode(_mm512_permutexvar_epi64(order, _mm512_maskz_loadu_epi8(mask, q + i)), first, second);
  _mm512_mask_storeu_epi16(dst + i, static_cast<__mmask32>(mask), first);
  _mm512_mask_storeu_epi16(dst + i + 32, static_cast<__mmask32>(mask >> 32), second);
}
#endif

// Multiplies F weight rows with M tokens, vectors along k, like gemv_tiles; a block of k is summed
// separately, then scaled and added. S: E4m3, or float for codes that are widened already.
template <class S, int F, int M>
void fp8_dot_tile(const Fp8DotParams& p, int feature) {
  constexpr int W = kLanes<float>;
  const S* w = static_cast<const S*>(p.w) + feature * p.ldw;
  const float* const* w_scale = p.w_scale + feature;
  const float* const* x_scale = p.x_scale;
  const float* x = p.x;
  const int64_t k = p.k, ldw = p.ldw, ldx = p.ldx, ldo = p.ldo, out_step = p.out_step;
  float* out = p.out + feature * out_step;
  Vec<float> sum[F][M];
#pragma GCC unroll 4
  for (int f = 0; f < F; ++f) {
#pragma GCC unroll 4
    for (int t = 0; t < M; ++t) sum[f][t] = Vec<float>{};
  }
  for (int64_t k0 = 0; k0 < k; k0 += kFp8Block) {
    const int64_t end = k - k0 < kFp8Block ? k : k0 + kFp8Block;
    Vec<float> acc[F][M];
#pragma GCC unroll 4
    for (int f = 0; f < F; ++f) {
#pragma GCC unroll 4
      for (int t = 0; t < M; ++t) acc[f][t] = Vec<float>{};
    }
    int64_t i = k0;
    for (; i + W <= end; i += W) {
#pragma GCC unroll 4
      for (int f = 0; f < F; ++f) {
        const Vec<float> wv = load_as(w + f * ldw + i);
#pragma GCC unroll 4
        for (int t = 0; t < M; ++t) {
          acc[f][t] = add_one_of<float, F * M>(acc[f][t], wv, load<float>(x + t * ldx + i));
        }
      }
    }
    if (i < end) {
      for (int f = 0; f < F; ++f) {
        S tail[W] = {};
        for (int64_t j = i; j < end; ++j) tail[j - i] = w[f * ldw + j];
        const Vec<float> wv = load_as(tail);
        for (int t = 0; t < M; ++t) {
          acc[f][t] = add_one_of<float, F * M>(acc[f][t], wv, load<float>(x + t * ldx + i));
        }
      }
    }
    const int64_t block = k0 / kFp8Block;
#pragma GCC unroll 4
    for (int f = 0; f < F; ++f) {
#pragma GCC unroll 4
      for (int t = 0; t < M; ++t) {
        const Vec<float> scale = splat<float>(w_scale[f][block] * x_scale[t][block]);
        sum[f][t] = add_one_of<float, F * M>(sum[f][t], acc[f][t], scale);
      }
    }
  }
  lane_sums<float, F, M>([&](int f, int t) { return sum[f][t]; },
                         [&](int f, int t, float s) { out[t * ldo + f * out_step] = s; });
}

// Sums and blocks of both are 16 of 32 registers with AVX-512, 8 of 16 with less.
constexpr int kFp8DotRows = MOE_VEC_BYTES == 64 ? 4 : 2;

template <class S>
void fp8_dot(const Fp8DotParams& p) {
  constexpr int F = kFp8DotRows;
  int f = 0;
  for (; f + F <= p.features; f += F) {
    p.tokens == 2 ? fp8_dot_tile<S, F, 2>(p, f) : fp8_dot_tile<S, F, 1>(p, f);
  }
  for (; f < p.features; ++f) {
    p.tokens == 2 ? fp8_dot_tile<S, 1, 2>(p, f) : fp8_dot_tile<S, 1, 1>(p, f);
  }
}

void fp8_promote(const Fp8PromoteParams& p) {
  constexpr int W = kLanes<float>;
  const int64_t rows = p.rows, cols = p.cols, ld_block = p.ld_block, ld_sums = p.ld_sums;
  const float *block = p.block, *row_scale = p.row_scale, *col_scale = p.col_scale;
  float* sums = p.sums;
  const bool accumulate = p.accumulate;
  for (int64_t i = 0; i < rows; ++i) {
    const Vec<float> scale = splat<float>(row_scale[i]);
    const float* src = block + i * ld_block;
    float* dst = sums + i * ld_sums;
    for (int64_t j = 0; j < cols; j += W) {
      const Vec<float> factor = scale * load<float>(col_scale + j);
      const Vec<float> sum = accumulate ? load<float>(dst + j) : Vec<float>{};
      store<float>(dst + j, sum + load<float>(src + j) * factor);
    }
  }
}

Fp8Kernels fp8_table() {
  Fp8Kernels k = {};
  k.quantize = &fp8_quantize;
  k.decode = &fp8_decode;
#if defined(__AVX512BF16__) && MOE_VEC_BYTES == 64
  k.decode_bf16 = &fp8_decode_bf16;
#endif
  k.dot = &fp8_dot<E4m3>;
  k.dot_widened = &fp8_dot<float>;
  k.promote = &fp8_promote;
  return k;
}
