// Values of quantized weights as vectors of float32, and the scales of their runs. Included by
// kernels-inl.h, inside its namespace.

// Loads as many bytes as a vector has lanes and widens each to 32 bits.
inline Simd<float>::Int widen_bytes(const uint8_t* p) {
  using F = Simd<float>;
#if defined(__AVX512F__) && MOE_VEC_BYTES == 64
  return __builtin_bit_cast(F::Int, _mm512_cvtepu8_epi32(load_bytes<__m128i_u>(p)));
#elif defined(__AVX2__) && MOE_VEC_BYTES == 32
  return __builtin_bit_cast(
      F::Int, _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  F::Int v;
  for (int i = 0; i < F::kLanes; ++i) v[i] = p[i];
  return v;
#endif
}

inline Simd<float>::Int widen_bytes(const int8_t* p) {
  using F = Simd<float>;
#if defined(__AVX512F__) && MOE_VEC_BYTES == 64
  return __builtin_bit_cast(F::Int, _mm512_cvtepi8_epi32(load_bytes<__m128i_u>(p)));
#elif defined(__AVX2__) && MOE_VEC_BYTES == 32
  return __builtin_bit_cast(
      F::Int, _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  F::Int v;
  for (int i = 0; i < F::kLanes; ++i) v[i] = p[i];
  return v;
#endif
}

#if defined(__AVX2__) && MOE_VEC_BYTES >= 32
// Part `part` of 16 bytes with signs, as many as a vector has lanes, in 32 bits each.
inline Simd<float>::Int widen_part(__m128i bytes, int part) {
#if MOE_VEC_BYTES == 64
  (void)part;
  return __builtin_bit_cast(Simd<float>::Int, _mm512_cvtepi8_epi32(bytes));
#else
  const __m128i half = part == 0 ? bytes : _mm_srli_si128(bytes, 8);
  return __builtin_bit_cast(Simd<float>::Int, _mm256_cvtepi8_epi32(half));
#endif
}
#endif

inline Vec<float> as_float(Simd<float>::Int v) { return __builtin_convertvector(v, Vec<float>); }

// Values of the 16 codes of 4 bits. e2m1 twice: 0, 0.5, 1, 1.5, 2, 3, 4 and 6 with a sign.
struct Unsigned4 {
  static constexpr int8_t kValues[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
};
struct Signed4 {
  static constexpr int8_t kValues[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
};
struct TwiceE2m1 {
  static constexpr int8_t kValues[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
};

// Returns the values of the low or upper nibbles of part `part` of 16 bytes, as many as a vector
// has lanes.
template <class Table>
inline Vec<float> nibbles(const uint8_t* bytes, int part, bool upper) {
#if defined(__AVX512F__) && MOE_VEC_BYTES == 64
  // Only the low four bits of an index count.
  const Vec<float> table = as_float(widen_bytes(Table::kValues));
  const auto codes = widen_bytes(bytes + part * kLanes<float>);
  return __builtin_bit_cast(
      Vec<float>, _mm512_permutexvar_ps(__builtin_bit_cast(__m512i, upper ? codes >> 4 : codes),
                                        __builtin_bit_cast(__m512, table)));
#elif defined(__AVX2__) && MOE_VEC_BYTES == 32
  const auto both = load_bytes<__m128i_u>(bytes);
  const __m128i codes = _mm_and_si128(upper ? _mm_srli_epi16(both, 4) : both, _mm_set1_epi8(15));
  const __m128i values = _mm_shuffle_epi8(load_bytes<__m128i>(Table::kValues), codes);
  return as_float(widen_part(values, part));
#else
  const uint8_t* p = bytes + part * kLanes<float>;
  Simd<float>::Int v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = Table::kValues[upper ? p[i] >> 4 : p[i] & 15];
  return as_float(v);
#endif
}

// --- scales

// A weight is value * scale[r >> shift] + offset[r >> shift] in run r of its row. Offsets, if there
// are any, are zero behind the last run, up to a whole vector.
struct RunScales {
  const float *scale, *offset = nullptr;
};

// Number of runs that share a scale: 2^shift, or the scale is repeated for each of `repeat` runs.
struct ScaleRuns {
  int shift = 0;
  int64_t repeat = 1;
};

// Loads a float16.
inline float half_at(const uint8_t* p) {
#if defined(__F16C__)
  return _cvtsh_ss(load_bytes<uint16_t>(p));
#else
  return to_float(load_bytes<Fp16>(p));
#endif
}

template <class S>
inline void widen_scales(const S* src, int64_t n, float* dst) {
  int64_t i = 0;
  for (; i + kLanes<float> <= n; i += kLanes<float>) store<float>(dst + i, load_as(src + i));
  for (; i < n; ++i) dst[i] = to_float(src[i]);
}

// Loads the scales of groups of codes, with the zero points of 4-bit codes.
inline RunScales group_scales(const CodeRows& rows, ScaleRuns how, int64_t row, int64_t first,
                              int64_t last, float* scales, float* offsets) {
  first >>= how.shift;
  last = ((last - 1) >> how.shift) + 1;
  const auto* src = static_cast<const char*>(rows.scale) + row * rows.ld_scale;
  const float* found = scales;
  if (how.repeat == 1 && rows.scale_type == ScaleType::kFloat32) {
    found = reinterpret_cast<const float*>(src);
  } else {
    const DType type = rows.scale_type == ScaleType::kFloat32    ? DType::kFloat32
                       : rows.scale_type == ScaleType::kBFloat16 ? DType::kBFloat16
                                                                 : DType::kFloat16;
    with_type<float>(type, src, [&]<class S>(const S* s) {
      if (how.repeat == 1) return widen_scales(s + first, last - first, scales + first);
      for (int64_t i = first; i < last; ++i) scales[i] = to_float(s[i / how.repeat]);
    });
  }
  if (rows.zero == nullptr) return {found};
  const uint8_t* zero = rows.zero + row * rows.ld_zero;
  for (int64_t i = first; i < last; ++i) {
    offsets[i] = static_cast<float>(8 - zero[how.repeat == 1 ? i : i / how.repeat]) * found[i];
  }
  store<float>(offsets + last, Vec<float>{});
  return {found, offsets};
}

// Decodes the scales of a record of 8 runs: d and dmin in float16, then 8 scales and 8 minima of 6
// bits in 12 bytes. Those of the last four runs have their upper two bits in the bytes of the first
// four.
inline void q4k_scales(const uint8_t* record, float* scales, float* offsets) {
#if defined(__AVX2__)
  const auto words = load_bytes<__m128i_u>(record);
  const __m128i low =
      _mm_and_si128(_mm_srlv_epi32(_mm_shuffle_epi32(words, 0xed), _mm_setr_epi32(0, 0, 0, 4)),
                    _mm_setr_epi32(0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f));
  const __m128i upper = _mm_and_si128(_mm_srli_epi32(_mm_shuffle_epi32(words, 0x84), 2),
                                      _mm_setr_epi32(0, 0x30303030, 0, 0x30303030));
  const __m128i steps = _mm_or_si128(low, upper), halves = _mm_srli_si128(steps, 8);
  const __m128 d = _mm_cvtph_ps(words), lows = _mm_sub_ps(_mm_setzero_ps(), d);
  const auto put = [](__m128i bytes, __m128 factor, float* dst) {
    _mm256_storeu_ps(dst, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
                                        _mm256_broadcastss_ps(factor)));
  };
  put(steps, d, scales);
  put(halves, _mm_movehdup_ps(lows), offsets);
#else
  const float d = half_at(record), low = -half_at(record + 2);
  const auto a = load_bytes<uint32_t>(record + 4), b = load_bytes<uint32_t>(record + 8),
             c = load_bytes<uint32_t>(record + 12);
  const uint32_t words[4] = {a & 0x3f3f3f3fu, (c & 0x0f0f0f0fu) | (a >> 2 & 0x30303030u),
                             b & 0x3f3f3f3fu, (c >> 4 & 0x0f0f0f0fu) | (b >> 2 & 0x30303030u)};
  for (int i = 0; i < 8; ++i) {
    scales[i] = static_cast<float>(words[i / 4] >> i % 4 * 8 & 63) * d;
    offsets[i] = static_cast<float>(words[2 + i / 4] >> i % 4 * 8 & 63) * low;
  }
#endif
}

// Decodes the scales of a record of 16 runs: their scales in int8, then d in float16.
inline void q6k_scales(const uint8_t* record, float* scales) {
  const Vec<float> d = splat<float>(half_at(record + 16));
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += kLanes<float>) {
    const auto steps = widen_bytes(reinterpret_cast<const int8_t*>(record) + i);
    store<float>(scales + i, as_float(steps) * d);
  }
}
