// Products of 4-bit weights with few rows of tokens, as integers of 8 bits. Included by
// kernels-inl.h, inside its namespace; NOTES.md has the arithmetic.

// How far ahead of itself a product asks for weights, in bytes.
constexpr int64_t kAhead4 = 4096;

// A row of tokens, as dot4 reads it. A unit is what a vector of weights covers:
//   codes    [units][kSteps] int8: the even k of a unit, then the odd ones, because the low nibbles
//            of a vector of weights are even k and the high nibbles odd ones
//   offsets  [units][kVec / 4] int32: what the sums of a unit start from, in each lane.
//            Instructions multiply unsigned by signed bytes, so weights come with a bias: minus 8
//            times the codes of the lane
//   scales   of the codes, one a lane, whose codes are of one block: [units][kVec / 4]. With
//            AVX-512 one a block, [units][4]: four products with scales of weights, made lanes
//            afterwards, are less than sixteen
struct Row4 {
  static constexpr int64_t kSteps = 2 * kVec;
  static constexpr int64_t kWhole = kSteps < kQuantBlock ? kQuantBlock : kSteps;
  // Steps of k that share one of `scales`, and what a unit takes of them.
  static constexpr int64_t kScaleSteps = MOE_VEC_BYTES == 64 ? kQuantBlock : 8;
  static constexpr int64_t kScaleBytes = kSteps / kScaleSteps * 4;
  int64_t units;  // of whole blocks
  explicit Row4(int64_t k) : units((k + kWhole - 1) / kWhole * (kWhole / kSteps)) {}
  int64_t offsets() const { return units * kSteps; }
  int64_t scales() const { return offsets() + units * kVec; }
  int64_t bytes() const { return scales() + units * kScaleBytes; }
};

int64_t row4_bytes(int64_t k) { return Row4(k).bytes(); }

#if defined(__AVX2__) && MOE_VEC_BYTES >= 32
struct CodePair {
  __m128i even, odd;
};

// 32 floats as codes: those of even places and those of odd ones.
inline CodePair round_codes(const float* x, float inverse) {
  const auto code = [&](int i) { return nearest(load<float>(x + i * kLanes<float>), inverse); };
#if MOE_VEC_BYTES == 64
  const auto bytes = [&](int half) {
    return _mm512_cvtepi32_epi8(__builtin_bit_cast(__m512i, code(half)));
  };
#else
  const auto words = [&](int i) {
    const auto v = __builtin_bit_cast(__m256i, code(i));
    return _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  };
  const auto bytes = [&](int half) {
    return _mm_packs_epi16(words(2 * half), words(2 * half + 1));
  };
#endif
  const __m128i a = bytes(0), b = bytes(1), low = _mm_set1_epi16(255);
  return {_mm_packus_epi16(_mm_and_si128(a, low), _mm_and_si128(b, low)),
          _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8))};
}
#endif

// The same, to memory.
inline void round_codes(const float* x, float inverse, int8_t* even, int8_t* odd) {
#if defined(__AVX2__) && MOE_VEC_BYTES >= 32
  const CodePair codes = round_codes(x, inverse);
  __builtin_memcpy(even, &codes.even, sizeof(codes.even));
  __builtin_memcpy(odd, &codes.odd, sizeof(codes.odd));
#else
  using F = Simd<float>;
  for (int i = 0; i < 32 / F::kLanes; ++i) {
    const F::Int c = nearest(load<float>(x + i * F::kLanes), inverse);
    for (int j = 0; j < F::kLanes; ++j) {
      const int place = i * F::kLanes + j;
      (place % 2 == 0 ? even : odd)[place / 2] = static_cast<int8_t>(c[j]);
    }
  }
#endif
}

// What the sums of a unit start from: minus 8 times the codes of each lane.
inline void code_offsets(const int8_t* codes, int32_t* offsets) {
#if defined(__AVX2__) && MOE_VEC_BYTES >= 32
  const Bytes even = load_weights(codes), odd = load_weights(codes + kVec);
  const Bytes ones = MOE_INT(set1_epi8)(1);
#if defined(__AVX512VNNI__)
  const Bytes sum = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(Bytes{}, ones, even), ones, odd);
#else
  const Bytes pairs =
      MOE_INT(add_epi16)(MOE_INT(maddubs_epi16)(ones, even), MOE_INT(maddubs_epi16)(ones, odd));
  const Bytes sum = MOE_INT(madd_epi16)(pairs, MOE_INT(set1_epi16)(1));
#endif
  using Int = Simd<float>::Int;
  const Int result = __builtin_bit_cast(Int, sum) * -8;
  __builtin_memcpy(offsets, &result, sizeof(result));
#else
  for (int64_t lane = 0; lane < kVec / 4; ++lane) {
    int32_t sum = 0;
    for (int64_t i = 4 * lane; i < 4 * lane + 4; ++i) sum += codes[i] + codes[kVec + i];
    offsets[lane] = -8 * sum;
  }
#endif
}

void row4(int64_t k, const float* x, void* row) {
  static_assert(kQuantBlock == 32, "a block is what round_codes takes");
  const Row4 layout(k);
  auto* codes = static_cast<int8_t*>(row);
  auto* offsets = reinterpret_cast<int32_t*>(codes + layout.offsets());
  auto* scales = reinterpret_cast<float*>(codes + layout.scales());
  const int64_t padded = layout.units * Row4::kSteps;
  Vec<float> probe = {};
  for (int64_t k0 = 0; k0 < padded; k0 += 32) {
    int8_t* even = codes + k0 / Row4::kSteps * Row4::kSteps + k0 % Row4::kSteps / 2;
    int8_t* odd = even + kVec;
    float scale = 0;
    if (k0 < k) {
      const float most = largest(x + k0, kQuantBlock, probe);
      scale = most / 127.0f;
      round_codes(x + k0, most > 0.0f ? 127.0f / most : 0.0f, even, odd);
    } else {  // There may be no memory behind x.
      __builtin_memset(even, 0, 16);
      __builtin_memset(odd, 0, 16);
    }
    constexpr int64_t kSame = kQuantBlock / Row4::kScaleSteps;
    for (int64_t i = 0; i < kSame; ++i) scales[k0 / Row4::kScaleSteps + i] = scale;
  }
  for (int64_t u = 0; u < layout.units; ++u) {
    code_offsets(codes + u * Row4::kSteps, offsets + u * (kVec / 4));
  }
  // Every sum reads every scale.
  const float bad = horizontal_sum<float>(probe);
  if (bad != 0.0f) scales[0] = bad;
}

// --- products of integers

#if defined(__AVX2__) && MOE_VEC_BYTES >= 32
#if !defined(__AVX512VNNI__)
// Neighbouring 16-bit sums in 32 bits. They hold four products of 15 * 127.
inline Bytes add_pairs(Bytes v) { return MOE_INT(madd_epi16)(v, MOE_INT(set1_epi16)(1)); }
#endif

// Scales of unit `unit` of a row of 4-bit weights, in the places of those of tokens.
#if MOE_VEC_BYTES == 64
typedef __m128 UnitScales;
#else
typedef Vec<float> UnitScales;
#endif
template <int kGroup>
inline UnitScales unit_scales(const float* scale, int64_t unit) {
  constexpr int64_t kCount = 2 * kVec / kGroup;  // in a unit; 0: less than one
#if MOE_VEC_BYTES == 64
  const float* p = scale + unit * kCount;
  if constexpr (kCount == 4) return _mm_loadu_ps(p);
  if constexpr (kCount == 2) {
    const __m128 two = _mm_castpd_ps(_mm_set1_pd(load_bytes<double>(p)));
    return _mm_permute_ps(two, 0x50);
  }
  return _mm_set1_ps(*p);
#else
  if constexpr (kCount < 2) return splat<float>(scale[unit * 2 * kVec / kGroup]);
  const __m256i index = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
  const __m256d two = _mm256_set1_pd(load_bytes<double>(scale + unit * kCount));
  return __builtin_bit_cast(Vec<float>, _mm256_permutevar_ps(_mm256_castpd_ps(two), index));
#endif
}

// Their products with those of a token, one a lane.
inline Vec<float> lane_scales(UnitScales weights, const char* token) {
#if MOE_VEC_BYTES == 64
  const __m512i block = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  const __m128 four = weights * load_bytes<__m128>(token);
  return __builtin_bit_cast(Vec<float>, _mm512_permutexvar_ps(block, _mm512_castps128_ps512(four)));
#else
  return weights * load<float>(reinterpret_cast<const float*>(token));
#endif
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
      const UnitScales factors = unit_scales<kGroup>(scale + f * ld_scale, scale_unit);
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
        acc[f][t] += as_floats(sum) * lane_scales(factors, scales + t * row_bytes);
      }
    }
  }
};

// `count` times F rows of weights; each next time begins w_step and scale_step further.
template <int kGroup, int F, int M>
void dot4(int64_t count, int64_t k, const uint8_t* w, int64_t w_step, int64_t ldw,
          const float* scale, int64_t scale_step, int64_t ld_scale, const char* rows,
          int64_t row_bytes, float* out, int64_t ldo, int64_t out_step) {
  constexpr int64_t kSteps = 2 * kVec;
  const Row4 layout(k);
  const int64_t whole = k / kSteps;
  const char *offsets = rows + layout.offsets(), *scales = rows + layout.scales();
  const auto products = [=](int64_t n, Vec<float>(&acc)[F][M]) __attribute__((always_inline)) {
    const uint8_t* codes = w + n * w_step;
    const float* factors = scale + n * scale_step;
#pragma GCC unroll 4
    for (int f = 0; f < F; ++f) {
#pragma GCC unroll 4
      for (int t = 0; t < M; ++t) acc[f][t] = Vec<float>{};
    }
    for (int64_t u = 0; u < whole; ++u) {
#pragma GCC unroll 4
      for (int f = 0; f < F; ++f) __builtin_prefetch(codes + f * ldw + u * kVec + kAhead4, 0, 2);
      Dot4<kGroup, F, M>::unit(codes + u * kVec, ldw, factors, ld_scale, rows + u * kSteps,
                               offsets + u * kVec, scales + u * Row4::kScaleBytes, row_bytes, u,
                               acc);
    }
    if (whole < layout.units) {
      uint8_t tail[F][kVec] = {};
      float tail_scale[F][4] = {};
      const int64_t bytes = k / 2 - whole * kVec, groups = (k - whole * kSteps) / kGroup;
      for (int f = 0; f < F; ++f) {
        __builtin_memcpy(tail[f], codes + f * ldw + whole * kVec, bytes);
        // A group may cover more than the vector: then its scale is that of the whole tail.
        const float* s = factors + f * ld_scale + whole * kSteps / kGroup;
        for (int64_t g = 0; g < (groups > 0 ? groups : 1); ++g) tail_scale[f][g] = s[g];
      }
      Dot4<kGroup, F, M>::unit(tail[0], kVec, tail_scale[0], 4, rows + whole * kSteps,
                               offsets + whole * kVec, scales + whole * Row4::kScaleBytes,
                               row_bytes, 0, acc);
    }
  };
  product_sums<float, F, M>(count, out, ldo, out_step, products);
}
#else
// The same sums one weight at a time; compilers find the vectors in it.
template <int kGroup, int F, int M>
void dot4(int64_t count, int64_t k, const uint8_t* w, int64_t w_step, int64_t ldw,
          const float* scale, int64_t scale_step, int64_t ld_scale, const char* rows,
          int64_t row_bytes, float* out, int64_t ldo, int64_t out_step) {
  const Row4 layout(k);
  constexpr int64_t kSteps = Row4::kSteps;
  static_assert(kSteps <= 32, "a unit has one scale");
  for (int64_t n = 0; n < count; ++n, w += w_step, scale += scale_step, ++out) {
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
            sum += static_cast<int16_t>(p[i] & 15) * even[i] +
                   static_cast<int16_t>(p[i] >> 4) * odd[i];
          }
          acc += static_cast<float>(sum) * scales[u * kVec / 4] *
                 scale[f * ld_scale + u * kSteps / kGroup];
        }
        out[t * ldo + f * out_step] = acc;
      }
    }
  }
}
#endif

void quant_dot4(int64_t group, int features, int64_t count, int tokens, int64_t k, const void* w,
                int64_t w_step, int64_t ldw, const float* scale, int64_t scale_step,
                int64_t ld_scale, const void* rows, int64_t row_bytes, float* out, int64_t ldo,
                int64_t out_step) {
  const auto run_group = [&]<int kGroup, int F, int M>() {
    dot4<kGroup, F, M>(count, k, static_cast<const uint8_t*>(w), w_step, ldw, scale, scale_step,
                       ld_scale, static_cast<const char*>(rows), row_bytes, out, ldo, out_step);
  };
  const auto run = [&]<int F, int M>() {
    switch (group) {
      case 32:
        return run_group.template operator()<32, F, M>();
      case 64:
        return run_group.template operator()<64, F, M>();
      default:
        return run_group.template operator()<128, F, M>();
    }
  };
  if (features == kDotFeatures) {
    with_token_count<kDotFeatures>(tokens, run);
  } else {
    with_token_count<1>(tokens, run);
  }
}
