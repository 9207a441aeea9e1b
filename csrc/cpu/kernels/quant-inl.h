// Weights of 8 and 4 bits: the part of kernels-inl.h that multiplies and widens them. Included
// there, inside its namespace; NOTES.md has the arithmetic.

constexpr int64_t kVec = MOE_VEC_BYTES;
typedef int8_t SignedLanes __attribute__((vector_size(MOE_VEC_BYTES / 4)));

// How far ahead of itself a product asks for weights, in bytes.
constexpr int64_t kAhead8 = 1024, kAhead4 = 4096;

// A row of tokens in integers, as quant_dot reads it. A unit is what a vector of weights covers:
//   codes    [units][steps] int8; 4 bits: the even k of a unit, then the odd ones, because the low
//            nibbles of a vector of weights are even k and the high nibbles odd ones
//   offsets  [units][kVec / 4] int32: what the sums of a unit start from, in each lane.
//   Instructions
//            multiply unsigned by signed bytes, so weights come with a bias: minus bias times the
//            codes of the lane
//   scales   [units][kVec / 4] of the codes, one a lane: a lane's codes are of one block
template <int kBits>
struct TokenLayout {
  static constexpr int64_t kSteps = kVec * 8 / kBits;
  static constexpr int64_t kWhole = kSteps < kQuantBlock ? kQuantBlock : kSteps;
  int64_t units;  // of whole blocks
  explicit TokenLayout(int64_t k) : units((k + kWhole - 1) / kWhole * (kWhole / kSteps)) {}
  int64_t offsets() const { return units * kSteps; }
  int64_t scales() const { return offsets() + units * kVec; }
  int64_t bytes() const { return scales() + units * kVec; }
};

int64_t quant_token_bytes(int bits, int64_t k) {
  return bits == 4 ? TokenLayout<4>(k).bytes() : TokenLayout<8>(k).bytes();
}

template <class T>
inline T load_bytes(const void* p) {
  T v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

// 32 floats as codes. Half an integer goes to the even one.
inline void round_codes(const float* x, float inverse, int8_t* codes) {
  using F = Simd<float>;
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  for (int i = 0; i < 32; i += F::kLanes) {
    const Vec<float> shifted = load<float>(x + i) * inverse + kMagic;
    const F::Int code =
        __builtin_bit_cast(F::Int, shifted) - __builtin_bit_cast(int32_t, float{kMagic});
    const SignedLanes bytes = __builtin_convertvector(code, SignedLanes);
    __builtin_memcpy(codes + i, &bytes, sizeof(bytes));
  }
}

// The largest of 32 absolute values; NaN if one is not finite.
inline float largest(const float* x) {
  Vec<float> most = {}, probe = {};
  for (int i = 0; i < 32; i += kLanes<float>) {
    const Vec<float> v = load<float>(x + i), a = v < 0.0f ? -v : v;
    most = a > most ? a : most;
    probe += v * 0.0f;
  }
  float result = 0;
  for (int i = 0; i < kLanes<float>; ++i) result = most[i] > result ? most[i] : result;
  return result + horizontal_sum<float>(probe);
}

template <int kBits>
void quantize_tokens(int64_t k, const float* x, char* row) {
  static_assert(kQuantBlock == 32, "a block is what largest and round_codes take");
  typedef int8_t Half __attribute__((vector_size(16)));
  constexpr Half kEven = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  constexpr int64_t kLane = kBits == 4 ? 8 : 4;  // steps of k in a lane
  constexpr int kBias = kBits == 4 ? 8 : 128;
  using Layout = TokenLayout<kBits>;
  const Layout layout(k);
  auto* codes = reinterpret_cast<int8_t*>(row);
  auto* offsets = reinterpret_cast<int32_t*>(row + layout.offsets());
  auto* scales = reinterpret_cast<float*>(row + layout.scales());
  const int64_t padded = layout.units * Layout::kSteps;
  for (int64_t k0 = 0; k0 < padded; k0 += 32) {
    alignas(32) int8_t natural[32] = {};
    float scale = 0;
    if (k0 < k) {  // Past the last block there may be no memory behind x.
      const float most = largest(x + k0);
      scale = most / 127.0f;
      round_codes(x + k0, most > 0.0f ? 127.0f / most : 0.0f, natural);
    }
    if constexpr (kBits == 8) {
      __builtin_memcpy(codes + k0, natural, 32);
    } else {
      const Half a = load_bytes<Half>(natural), b = load_bytes<Half>(natural + 16);
      const Half even = __builtin_shuffle(a, b, kEven), odd = __builtin_shuffle(a, b, kEven + 1);
      int8_t* unit = codes + k0 / Layout::kSteps * Layout::kSteps + k0 % Layout::kSteps / 2;
      __builtin_memcpy(unit, &even, 16);
      __builtin_memcpy(unit + kVec, &odd, 16);
    }
    for (int64_t lane = 0; lane < 32 / kLane; ++lane) {
      int32_t sum = 0;
      for (int64_t i = 0; i < kLane; ++i) sum += natural[lane * kLane + i];
      offsets[k0 / kLane + lane] = -kBias * sum;
      scales[k0 / kLane + lane] = scale;
    }
  }
}

void quant_tokens(int bits, int64_t k, const float* x, void* row) {
  if (bits == 4) {
    quantize_tokens<4>(k, x, static_cast<char*>(row));
  } else {
    quantize_tokens<8>(k, x, static_cast<char*>(row));
  }
}

// --- products of integers

#if defined(__AVX2__) && MOE_VEC_BYTES >= 32
#if MOE_VEC_BYTES == 64
typedef __m512i Bytes;
#define MOE_INT(name) _mm512_##name
inline Bytes load_weights(const void* p) { return _mm512_loadu_si512(p); }
inline Bytes bits_and(Bytes a, Bytes b) { return _mm512_and_si512(a, b); }
inline Vec<float> as_floats(Bytes v) {
  return __builtin_bit_cast(Vec<float>, _mm512_cvtepi32_ps(v));
}
#else
typedef __m256i Bytes;
#define MOE_INT(name) _mm256_##name
inline Bytes load_weights(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
inline Bytes bits_and(Bytes a, Bytes b) { return _mm256_and_si256(a, b); }
inline Vec<float> as_floats(Bytes v) {
  return __builtin_bit_cast(Vec<float>, _mm256_cvtepi32_ps(v));
}
#endif

#if !defined(__AVX512VNNI__)
// Neighbouring 16-bit sums in 32 bits. They hold two products of 128 * 127, or four of 15 * 127.
inline Bytes add_pairs(Bytes v) { return MOE_INT(madd_epi16)(v, MOE_INT(set1_epi16)(1)); }
#endif

// Scales of a vector of 4-bit weights that starts at scale index s, one a lane of 8 steps of k.
template <int kGroup>
inline Vec<float> lane_scales(const float* scale, int64_t unit) {
  constexpr int64_t kSteps = 2 * kVec;
  if constexpr (kGroup >= kSteps) {
    return splat<float>(scale[unit * kSteps / kGroup]);
  } else {
    constexpr int64_t kCount = kSteps / kGroup;
    const float* p = scale + unit * kCount;
#if MOE_VEC_BYTES == 64
    if constexpr (kCount == 4) {
      const __m512i index = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
      const __m512 four = _mm512_castps128_ps512(_mm_loadu_ps(p));
      return __builtin_bit_cast(Vec<float>, _mm512_permutexvar_ps(index, four));
    } else {
      const __m512i index = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
      const __m512d two = _mm512_set1_pd(load_bytes<double>(p));
      return __builtin_bit_cast(Vec<float>, _mm512_permutevar_ps(_mm512_castpd_ps(two), index));
    }
#else
    const __m256i index = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    const __m256d two = _mm256_set1_pd(load_bytes<double>(p));
    return __builtin_bit_cast(Vec<float>, _mm256_permutevar_ps(_mm256_castpd_ps(two), index));
#endif
  }
}

// F rows of 4-bit weights with M rows of tokens.
template <int kGroup, int F, int M>
struct Dot4 {
  static inline void unit(const uint8_t* w, int64_t ldw, const float* scale, int64_t ld_scale,
                          const char* codes, const char* offsets, const char* scales,
                          int64_t row_bytes, int64_t scale_unit, Vec<float> (&acc)[F][M]) {
    const Bytes mask = MOE_INT(set1_epi8)(15);
#pragma GCC unroll 4
    for (int f = 0; f < F; ++f) {
      const Bytes both = load_weights(w + f * ldw);
      const Bytes even = bits_and(both, mask);
      const Bytes odd = bits_and(MOE_INT(srli_epi16)(both, 4), mask);
      const Vec<float> ws = lane_scales<kGroup>(scale + f * ld_scale, scale_unit);
#pragma GCC unroll 4
      for (int t = 0; t < M; ++t) {
        const char* c = codes + t * row_bytes;
        Bytes sum = load_weights(offsets + t * row_bytes);
#if defined(__AVX512VNNI__)
        sum = _mm512_dpbusd_epi32(sum, even, load_weights(c));
        sum = _mm512_dpbusd_epi32(sum, odd, load_weights(c + kVec));
#else
        const Bytes pairs = MOE_INT(add_epi16)(MOE_INT(maddubs_epi16)(even, load_weights(c)),
                                               MOE_INT(maddubs_epi16)(odd, load_weights(c + kVec)));
        sum = MOE_INT(add_epi32)(sum, add_pairs(pairs));
#endif
        const Vec<float> xs = load<float>(reinterpret_cast<const float*>(scales + t * row_bytes));
        acc[f][t] += as_floats(sum) * xs * ws;
      }
    }
  }
};

template <int kGroup, int F, int M>
void dot4(int64_t k, const uint8_t* w, int64_t ldw, const float* scale, int64_t ld_scale,
          const char* rows, int64_t row_bytes, float* out, int64_t ldo, int64_t out_step) {
  constexpr int64_t kSteps = 2 * kVec;
  const TokenLayout<4> layout(k);
  const int64_t whole = k / kSteps;
  Vec<float> acc[F][M] = {};
  const char *offsets = rows + layout.offsets(), *scales = rows + layout.scales();
  for (int64_t u = 0; u < whole; ++u) {
#pragma GCC unroll 4
    for (int f = 0; f < F; ++f) __builtin_prefetch(w + f * ldw + u * kVec + kAhead4, 0, 2);
    Dot4<kGroup, F, M>::unit(w + u * kVec, ldw, scale, ld_scale, rows + u * kSteps,
                             offsets + u * kVec, scales + u * kVec, row_bytes, u, acc);
  }
  if (whole < layout.units) {
    uint8_t tail[F][kVec] = {};
    float tail_scale[F][4] = {};
    const int64_t bytes = k / 2 - whole * kVec, groups = (k - whole * kSteps) / kGroup;
    for (int f = 0; f < F; ++f) {
      __builtin_memcpy(tail[f], w + f * ldw + whole * kVec, bytes);
      // A group may cover more than the vector: then its scale is that of the whole tail.
      const float* s = scale + f * ld_scale + whole * kSteps / kGroup;
      for (int64_t g = 0; g < (groups > 0 ? groups : 1); ++g) tail_scale[f][g] = s[g];
    }
    Dot4<kGroup, F, M>::unit(tail[0], kVec, tail_scale[0], 4, rows + whole * kSteps,
                             offsets + whole * kVec, scales + whole * kVec, row_bytes, 0, acc);
  }
#pragma GCC unroll 4
  for (int f = 0; f < F; ++f) {
#pragma GCC unroll 4
    for (int t = 0; t < M; ++t) out[t * ldo + f * out_step] = horizontal_sum<float>(acc[f][t]);
  }
}

// F vectors of 8-bit weights with M rows of tokens.
template <int F, int M>
inline void dot8_unit(const int8_t* w, int64_t ldw, const char* codes,
                      [[maybe_unused]] const char* offsets, const char* scales, int64_t row_bytes,
                      Vec<float> (&acc)[F][M]) {
#pragma GCC unroll 4
  for (int f = 0; f < F; ++f) {
    const Bytes wv = load_weights(w + f * ldw);
#if defined(__AVX512VNNI__)
    const Bytes biased = _mm512_xor_si512(wv, _mm512_set1_epi8(-128));
#else
    const Bytes magnitude = MOE_INT(abs_epi8)(wv);
#endif
#pragma GCC unroll 4
    for (int t = 0; t < M; ++t) {
      const Bytes x = load_weights(codes + t * row_bytes);
#if defined(__AVX512VNNI__)
      const Bytes sum = _mm512_dpbusd_epi32(load_weights(offsets + t * row_bytes), biased, x);
#else
      // A bias would overflow the 16-bit sums; the sign of a weight goes to the token instead.
#if MOE_VEC_BYTES == 64
      const Bytes with_sign =
          _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(wv), _mm512_setzero_si512(), x);
#else
      const Bytes with_sign = _mm256_sign_epi8(x, wv);
#endif
      const Bytes sum = add_pairs(MOE_INT(maddubs_epi16)(magnitude, with_sign));
#endif
      acc[f][t] +=
          as_floats(sum) * load<float>(reinterpret_cast<const float*>(scales + t * row_bytes));
    }
  }
}

template <int F, int M>
void dot8(int64_t k, const int8_t* w, int64_t ldw, const float* scale, int64_t ld_scale,
          const char* rows, int64_t row_bytes, float* out, int64_t ldo, int64_t out_step) {
  const TokenLayout<8> layout(k);
  const int64_t whole = k / kVec;
  Vec<float> acc[F][M] = {};
  const char *offsets = rows + layout.offsets(), *scales = rows + layout.scales();
  for (int64_t u = 0; u < whole; ++u) {
#pragma GCC unroll 4
    for (int f = 0; f < F; ++f) __builtin_prefetch(w + f * ldw + u * kVec + kAhead8, 0, 2);
    dot8_unit<F, M>(w + u * kVec, ldw, rows + u * kVec, offsets + u * kVec, scales + u * kVec,
                    row_bytes, acc);
  }
  if (whole < layout.units) {
    int8_t tail[F][kVec] = {};
    for (int f = 0; f < F; ++f) {
      __builtin_memcpy(tail[f], w + f * ldw + whole * kVec, k - whole * kVec);
    }
    dot8_unit<F, M>(tail[0], kVec, rows + whole * kVec, offsets + whole * kVec,
                    scales + whole * kVec, row_bytes, acc);
  }
#pragma GCC unroll 4
  for (int f = 0; f < F; ++f) {
#pragma GCC unroll 4
    for (int t = 0; t < M; ++t) {
      out[t * ldo + f * out_step] = horizontal_sum<float>(acc[f][t]) * scale[f * ld_scale];
    }
  }
}
#else
// The same sums one weight at a time; compilers find the vectors in it.
template <int kGroup, int F, int M>
void dot4(int64_t k, const uint8_t* w, int64_t ldw, const float* scale, int64_t ld_scale,
          const char* rows, int64_t row_bytes, float* out, int64_t ldo, int64_t out_step) {
  const TokenLayout<4> layout(k);
  constexpr int64_t kSteps = TokenLayout<4>::kSteps;
  static_assert(kSteps <= 32, "a unit has one scale");
  for (int f = 0; f < F; ++f) {
    for (int t = 0; t < M; ++t) {
      const char* row = rows + t * row_bytes;
      const auto* codes = reinterpret_cast<const int8_t*>(row);
      const auto* offsets = reinterpret_cast<const int32_t*>(row + layout.offsets());
      const auto* scales = reinterpret_cast<const float*>(row + layout.scales());
      float acc = 0;
      for (int64_t u = 0; u < layout.units; ++u) {
        const uint8_t* p = w + f * ldw + u * kVec;
        const int8_t *even = codes + u * kSteps, *odd = even + kVec;
        int32_t sum = 0;
        for (int64_t i = 0; i < kVec / 4; ++i) sum += offsets[u * kVec / 4 + i];
        for (int64_t i = 0; i < kVec; ++i) {
          sum +=
              static_cast<int16_t>(p[i] & 15) * even[i] + static_cast<int16_t>(p[i] >> 4) * odd[i];
        }
        acc += static_cast<float>(sum) * scales[u * kVec / 4] *
               scale[f * ld_scale + u * kSteps / kGroup];
      }
      out[t * ldo + f * out_step] = acc;
    }
  }
}

template <int F, int M>
void dot8(int64_t k, const int8_t* w, int64_t ldw, const float* scale, int64_t ld_scale,
          const char* rows, int64_t row_bytes, float* out, int64_t ldo, int64_t out_step) {
  const TokenLayout<8> layout(k);
  for (int f = 0; f < F; ++f) {
    for (int t = 0; t < M; ++t) {
      const char* row = rows + t * row_bytes;
      const auto* codes = reinterpret_cast<const int8_t*>(row);
      const auto* scales = reinterpret_cast<const float*>(row + layout.scales());
      float acc = 0;
      for (int64_t k0 = 0; k0 < k; k0 += kQuantBlock) {
        const int64_t n = k - k0 < kQuantBlock ? k - k0 : kQuantBlock;
        int32_t sum = 0;
        for (int64_t i = k0; i < k0 + n; ++i)
          sum += static_cast<int16_t>(w[f * ldw + i]) * codes[i];
        acc += static_cast<float>(sum) * scales[k0 / 4];
      }
      out[t * ldo + f * out_step] = acc * scale[f * ld_scale];
    }
  }
}
#endif

template <int F, class Fn>
inline void with_token_count(int tokens, const Fn& fn) {
  if constexpr (MOE_DOT_TOKENS >= 4) {
    if (tokens == 4) return fn.template operator()<F, 4>();
    if (tokens == 3) return fn.template operator()<F, 3>();
  }
  if (tokens == 2) return fn.template operator()<F, 2>();
  fn.template operator()<F, 1>();
}

void quant_dot(int bits, int64_t group, int features, int tokens, int64_t k, const void* w,
               int64_t ldw, const float* scale, int64_t ld_scale, const void* rows,
               int64_t row_bytes, float* out, int64_t ldo, int64_t out_step) {
  const auto* r = static_cast<const char*>(rows);
  const auto run = [&]<int F, int M>() {
    if (bits == 8) {
      const auto* p = static_cast<const int8_t*>(w);
      return dot8<F, M>(k, p, ldw, scale, ld_scale, r, row_bytes, out, ldo, out_step);
    }
    const auto* p = static_cast<const uint8_t*>(w);
    switch (group) {
      case 32:
        return dot4<32, F, M>(k, p, ldw, scale, ld_scale, r, row_bytes, out, ldo, out_step);
      case 64:
        return dot4<64, F, M>(k, p, ldw, scale, ld_scale, r, row_bytes, out, ldo, out_step);
      default:
        return dot4<128, F, M>(k, p, ldw, scale, ld_scale, r, row_bytes, out, ldo, out_step);
    }
  };
  if (features == kDotFeatures) {
    with_token_count<kDotFeatures>(tokens, run);
  } else {
    with_token_count<1>(tokens, run);
  }
}

// --- panels of words

#if defined(__AVX2__) && MOE_VEC_BYTES >= 32
// 16 bytes of each of as many rows as a vector has lanes of 32 bits: word j of all rows goes to
// dst[j * 2 * lanes].
inline void transpose_words(const uint8_t* const* rows, int64_t offset, Bytes flip, uint32_t* dst) {
  const auto at = [&](int i) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i] + offset));
  };
  Bytes v[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // lane l: row 4 * l + i
#if MOE_VEC_BYTES == 64
    __m512i all = _mm512_castsi128_si512(at(i));
    all = _mm512_inserti32x4(all, at(4 + i), 1);
    all = _mm512_inserti32x4(all, at(8 + i), 2);
    v[i] = _mm512_inserti32x4(all, at(12 + i), 3);
#else
    v[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(at(i)), at(4 + i), 1);
#endif
    v[i] ^= flip;
  }
  const Bytes low01 = MOE_INT(unpacklo_epi32)(v[0], v[1]);
  const Bytes high01 = MOE_INT(unpackhi_epi32)(v[0], v[1]);
  const Bytes low23 = MOE_INT(unpacklo_epi32)(v[2], v[3]);
  const Bytes high23 = MOE_INT(unpackhi_epi32)(v[2], v[3]);
  const Bytes words[4] = {
      MOE_INT(unpacklo_epi64)(low01, low23), MOE_INT(unpackhi_epi64)(low01, low23),
      MOE_INT(unpacklo_epi64)(high01, high23), MOE_INT(unpackhi_epi64)(high01, high23)};
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    __builtin_memcpy(dst + j * 2 * kLanes<float>, &words[j], sizeof(Bytes));
  }
}
#undef MOE_INT
#endif

// With 4 bits, a flip of the upper bit of each makes two's complement of q + 8.
void quant_words(int bits, const void* w, int64_t ldw, int64_t features, int64_t k0, int64_t n,
                 uint32_t* dst) {
  constexpr int W = kLanes<float>, P = 2 * W;
  const uint32_t flip = bits == 4 ? 0x88888888u : 0;
  const int64_t first = k0 * bits / 8, end = ((k0 + n) * bits + 7) / 8;
  for (int f0 = 0; f0 < P; f0 += W) {
    const uint8_t* rows[W];
    for (int64_t f = f0; f < f0 + W; ++f) {
      rows[f - f0] = static_cast<const uint8_t*>(w) + (f < features ? f : features - 1) * ldw;
    }
    uint32_t* out = dst + f0;
    for (int64_t c = first; c < end; c += 16, out += 4 * P) {
      uint8_t tails[W][16] = {};
      const uint8_t* tail_rows[W];
      const bool whole = end - c >= 16;
      for (int f = 0; f < W && !whole; ++f) {
        __builtin_memcpy(tails[f], rows[f] + c, end - c);
        tail_rows[f] = tails[f];
      }
      const uint8_t* const* from = whole ? rows : tail_rows;
      const int64_t offset = whole ? c : 0;
#if defined(__AVX2__) && MOE_VEC_BYTES >= 32
      typedef uint32_t Words __attribute__((vector_size(MOE_VEC_BYTES)));
      transpose_words(from, offset, __builtin_bit_cast(Bytes, Words{} + flip), out);
#else
      for (int f = 0; f < W; ++f) {
        for (int j = 0; j < 4; ++j) {
          out[j * P + f] = load_bytes<uint32_t>(from[f] + offset + 4 * j) ^ flip;
        }
      }
#endif
    }
  }
}

// Weight i of each word, or weights 2i and 2i + 1 as pairs of bfloat16, in which integers of 8 bits
// are exact. Shifts need none of the ports that multiply.
template <int kBits, class S>
inline Vec<float> word_weights(const uint32_t* words, int i) {
  typedef int32_t Unaligned __attribute__((vector_size(MOE_VEC_BYTES), aligned(4), may_alias));
  const Simd<float>::Int word = *reinterpret_cast<const Unaligned*>(words);
  const auto weight = [&](int j) {
    return __builtin_convertvector((word << (32 - kBits - kBits * j)) >> (32 - kBits), Vec<float>);
  };
#if defined(__AVX512BF16__) && MOE_VEC_BYTES == 64
  if constexpr (__is_same(S, Pair)) {
    constexpr int kOrAnd = 0xf8;  // low | (high & mask)
    const __m512i low = _mm512_srli_epi32(__builtin_bit_cast(__m512i, weight(2 * i)), 16);
    const __m512i high = __builtin_bit_cast(__m512i, weight(2 * i + 1));
    return __builtin_bit_cast(
        Vec<float>, _mm512_ternarylogic_epi32(low, high, _mm512_set1_epi32(-65536), kOrAnd));
  }
#endif
  return weight(i);
}

// panel_tile that takes words apart as it goes.
template <int kBits, class S, int M>
void word_tile(int64_t count, const float* a, const uint32_t* words, const float* scale, float* c,
               int64_t ldc, bool accumulate, const char* ahead, int64_t ahead_step) {
  constexpr int W = kLanes<float>;
  constexpr int kSteps = 32 / kBits / (__is_same(S, Pair) ? 2 : 1);  // elements of a for a word
  constexpr int kLines = 2 * MOE_VEC_BYTES < 64 ? 1 : 2 * MOE_VEC_BYTES / 64;
  Vec<float> acc[M][2];
#pragma GCC unroll 32
  for (int i = 0; i < M; ++i) acc[i][0] = acc[i][1] = Vec<float>{};
  for (int64_t k = 0; k < count; ++k) {
#pragma GCC unroll 2
    for (int line = 0; line < kLines; ++line) {
      __builtin_prefetch(ahead, 0, 2);
      ahead += ahead_step;
    }
#pragma GCC unroll 8
    for (int step = 0; step < kSteps; ++step) {
      asm volatile("" ::: "memory");  // As in panel_tile: load the words anew.
      const Vec<float> b0 = word_weights<kBits, S>(words, step);
      const Vec<float> b1 = word_weights<kBits, S>(words + W, step);
#pragma GCC unroll 32
      for (int i = 0; i < M; ++i) {
        acc[i][0] = add_product<float, S>(acc[i][0], a + i * kLda + step, b0);
        acc[i][1] = add_product<float, S>(acc[i][1], a + i * kLda + step, b1);
      }
    }
    a += kSteps;
    words += 2 * W;
  }
  const Vec<float> s[2] = {load<float>(scale), load<float>(scale + W)};
#pragma GCC unroll 32
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      float* out = c + i * ldc + v * W;
      const Vec<float> sum = acc[i][v] * s[v];
      store<float>(out, accumulate ? load<float>(out) + sum : sum);
    }
  }
}

template <class S, int M>
void fill_word_tiles(QuantKernels::Tile (&tiles)[2][kMaxMr]) {
  if constexpr (M <= MOE_MR2) {
    tiles[0][M - 1] = &word_tile<8, S, M>;
    tiles[1][M - 1] = &word_tile<4, S, M>;
    fill_word_tiles<S, M + 1>(tiles);
  }
}

void multiply_row(const float* factors, float* row, int64_t n) {
  constexpr int W = kLanes<float>;
  int64_t i = 0;
  for (; i + W <= n; i += W) store<float>(row + i, load<float>(row + i) * load<float>(factors + i));
  for (; i < n; ++i) row[i] *= factors[i];
}

QuantKernels quant_kernels() {
  QuantKernels k = {};
  k.token_bytes = &quant_token_bytes;
  k.tokens = &quant_tokens;
  k.dot = &quant_dot;
  k.words = &quant_words;
  fill_word_tiles<float, 1>(k.tile);
#if defined(__AVX512BF16__) && MOE_VEC_BYTES == 64
  fill_word_tiles<Pair, 1>(k.pair_tile);
#endif
  k.multiply_row = &multiply_row;
  return k;
}
