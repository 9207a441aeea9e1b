// Products of 8-bit weights with tokens as integers of 16 bits. Included by kernels-inl.h, inside
// its namespace; NOTES.md has the arithmetic.

// Steps of k from one prefetch to the next.
constexpr int64_t kFetchSteps8 = 64;

// A row of tokens, as dot8 reads it. Vectors lie along k, and lane l of 32 bits sees some of every
// kUnit of its steps: those have one scale, and none is needed before a sum is complete.
//   codes    VNNI multiplies unsigned by signed bytes: [units][2][64] int8, code = 256 * the first
//            + the second. Else [units][kUnit] int16
//   scales   [lanes] float
//   offsets  [lanes] float, to be added after the scale: there weights are unsigned by a bias of
//   128,
//            so minus 128 times the codes of the lane
struct Row8 {
#if defined(__AVX512VNNI__) && MOE_VEC_BYTES == 64
  static constexpr bool kBytes = true;
  static constexpr int64_t kUnit = 64, kUnitBytes = 128;
  static constexpr float kMost = 32639;  // 127 * 256 + 127
  static constexpr int64_t kChunk = INT64_MAX;
#else
  static constexpr bool kBytes = false;
  static constexpr int64_t kUnit = MOE_VEC_BYTES / 2, kUnitBytes = MOE_VEC_BYTES;
  static constexpr float kMost = 32767;
  // Units that 32 bits hold the sums of: 256 * 2 * 128 * 32767 < 2^31.
  static constexpr int64_t kChunk = 256;
#endif
  static constexpr int64_t kLane = kUnit / kLanes<float>;  // steps of a lane in a unit
  int64_t units;
  explicit Row8(int64_t k) : units((k + kUnit - 1) / kUnit) {}
  int64_t scales() const { return units * kUnitBytes; }
  int64_t offsets() const { return scales() + MOE_VEC_BYTES; }
  int64_t bytes() const { return offsets() + MOE_VEC_BYTES; }
};

int64_t row8_bytes(int64_t k) { return Row8(k).bytes(); }

// The vectors of a unit of fp32 tokens.
constexpr int kUnitVectors = Row8::kUnit / kLanes<float>;

void row8(int64_t k, const float* x, void* row) {
  using F = Simd<float>;
  typedef int8_t Int8 __attribute__((vector_size(MOE_VEC_BYTES / 4), aligned(1), may_alias));
  typedef int16_t Int16 __attribute__((vector_size(MOE_VEC_BYTES / 2), aligned(2), may_alias));
  constexpr int W = kLanes<float>;
  const Row8 layout(k);
  auto* codes = static_cast<char*>(row);
  auto* scales = reinterpret_cast<float*>(codes + layout.scales());
  auto* offsets = reinterpret_cast<float*>(codes + layout.offsets());
  Vec<float> most[kUnitVectors] = {}, probe[kUnitVectors] = {};
  for (int64_t u = 0; u < layout.units; ++u) {
#pragma GCC unroll 4
    for (int i = 0; i < kUnitVectors; ++i) {
      const Vec<float> v = load<float>(x + u * Row8::kUnit + i * W), a = v < 0.0f ? -v : v;
      most[i] = a > most[i] ? a : most[i];
      probe[i] += v * 0.0f;  // NaN where one is not finite
    }
  }
  Vec<float> inverse[kUnitVectors];
  for (int64_t lane = 0; lane < W; ++lane) {
    float largest = 0, bad = 0;
    for (int64_t i = lane * Row8::kLane; i < (lane + 1) * Row8::kLane; ++i) {
      const float a = most[i / W][i % W];
      largest = a > largest ? a : largest;
      bad += probe[i / W][i % W];
    }
    // So small that the quotient would not be finite: zeros.
    const bool usable = largest >= 1e-30f && bad == 0.0f;
    for (int64_t i = lane * Row8::kLane; i < (lane + 1) * Row8::kLane; ++i) {
      inverse[i / W][i % W] = usable ? Row8::kMost / largest : 0.0f;
    }
    scales[lane] = usable ? largest / Row8::kMost : bad;
  }
  F::Int sums[kUnitVectors] = {};
  for (int64_t u = 0; u < layout.units; ++u) {
#pragma GCC unroll 4
    for (int i = 0; i < kUnitVectors; ++i) {
      constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: half an integer goes to the even one.
      Vec<float> v = load<float>(x + u * Row8::kUnit + i * W);
      v = inverse[i] == 0.0f ? Vec<float>{} : v;  // Not finite, maybe.
      const F::Int code = __builtin_bit_cast(F::Int, v * inverse[i] + kMagic) -
                          __builtin_bit_cast(int32_t, float{kMagic});
      if constexpr (Row8::kBytes) {
        const F::Int high = (code + 128) >> 8, low = code - (high << 8);
        sums[i] += code;
        char* out = codes + u * Row8::kUnitBytes + i * W;
        *reinterpret_cast<Int8*>(out) = __builtin_convertvector(high, Int8);
        *reinterpret_cast<Int8*>(out + Row8::kUnit) = __builtin_convertvector(low, Int8);
      } else {
        char* out = codes + u * Row8::kUnitBytes + 2 * i * W;
        *reinterpret_cast<Int16*>(out) = __builtin_convertvector(code, Int16);
      }
    }
  }
  for (int64_t lane = 0; lane < W; ++lane) {
    int64_t sum = 0;
    for (int64_t i = lane * Row8::kLane; i < (lane + 1) * Row8::kLane; ++i)
      sum += sums[i / W][i % W];
    offsets[lane] = Row8::kBytes ? static_cast<float>(-128 * sum) * scales[lane] : 0.0f;
  }
}

// Sums of the lanes of four vectors. The order is the same in each of the four places, and that of
// one product does not depend on its neighbours.
struct Four {
  float v[4];
};
inline Four sums_of_four(const Vec<float> (&v)[4]) {
  Four out;
#if defined(__AVX2__) && MOE_VEC_BYTES >= 32
#if MOE_VEC_BYTES == 64
  typedef __m512 Floats;
  typedef __m512d Doubles;
#else
  typedef __m256 Floats;
  typedef __m256d Doubles;
#endif
  const auto at = [&](int i) { return __builtin_bit_cast(Floats, v[i]); };
  const auto doubles = [](Floats f) { return __builtin_bit_cast(Doubles, f); };
  const Floats low = MOE_INT(unpacklo_ps)(at(0), at(1)) + MOE_INT(unpackhi_ps)(at(0), at(1));
  const Floats high = MOE_INT(unpacklo_ps)(at(2), at(3)) + MOE_INT(unpackhi_ps)(at(2), at(3));
  const Floats all = __builtin_bit_cast(Floats, MOE_INT(unpacklo_pd)(doubles(low), doubles(high))) +
                     __builtin_bit_cast(Floats, MOE_INT(unpackhi_pd)(doubles(low), doubles(high)));
#if MOE_VEC_BYTES == 64
  const __m256 half = _mm512_castps512_ps256(all) + _mm512_extractf32x8_ps(all, 1);
#else
  const __m256 half = all;
#endif
  _mm_storeu_ps(out.v, _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
#else
  for (int i = 0; i < 4; ++i) out.v[i] = horizontal_sum<float>(v[i]);
#endif
  return out;
}

// Sums of F rows of weights and M of tokens, in integers. A step is one unit.
template <int F, int M>
struct Dot8 {
  using Int = Simd<float>::Int;
  static constexpr int kPlanes = Row8::kBytes ? 2 : 1;
  Int acc[F][M][kPlanes] = {};

  inline void step(const int8_t* w, int64_t ldw, const char* codes, int64_t row_bytes) {
#if defined(__AVX2__) && MOE_VEC_BYTES >= 32
    Bytes x[M][kPlanes];
#pragma GCC unroll 2
    for (int t = 0; t < M; ++t) {
#pragma GCC unroll 2
      for (int p = 0; p < kPlanes; ++p) {
        x[t][p] = load_weights(codes + t * row_bytes + p * MOE_VEC_BYTES);
      }
    }
#pragma GCC unroll 8
    for (int f = 0; f < F; ++f) {
#if defined(__AVX512VNNI__) && MOE_VEC_BYTES == 64
      const Bytes wv = _mm512_xor_si512(load_weights(w + f * ldw), _mm512_set1_epi8(-128));
#elif MOE_VEC_BYTES == 64
      const Bytes wv = _mm512_cvtepi8_epi16(load_bytes<__m256i_u>(w + f * ldw));
#else
      const Bytes wv = _mm256_cvtepi8_epi16(load_bytes<__m128i_u>(w + f * ldw));
#endif
#pragma GCC unroll 2
      for (int t = 0; t < M; ++t) {
#pragma GCC unroll 2
        for (int p = 0; p < kPlanes; ++p) {
          const Bytes sum = __builtin_bit_cast(Bytes, acc[f][t][p]);
#if defined(__AVX512VNNI__) && MOE_VEC_BYTES == 64
          const Bytes more = _mm512_dpbusd_epi32(sum, wv, x[t][p]);
#else
          const Bytes more = add_words(sum, wv, x[t][p]);
#endif
          acc[f][t][p] = __builtin_bit_cast(Int, more);
        }
      }
    }
#else
    for (int f = 0; f < F; ++f) {
      for (int t = 0; t < M; ++t) {
        int16_t x[Row8::kUnit];
        __builtin_memcpy(x, codes + t * row_bytes, sizeof(x));
        for (int64_t lane = 0; lane < kLanes<float>; ++lane) {
          for (int64_t i = lane * Row8::kLane; i < (lane + 1) * Row8::kLane; ++i) {
            acc[f][t][0][lane] += static_cast<int32_t>(w[f * ldw + i]) * x[i];
          }
        }
      }
    }
#endif
  }

  inline Vec<float> sum(int f, int t) const {
    const Vec<float> first = __builtin_convertvector(acc[f][t][0], Vec<float>);
    if constexpr (!Row8::kBytes) return first;
    return first * 256.0f + __builtin_convertvector(acc[f][t][kPlanes - 1], Vec<float>);
  }
};

template <int F, int M>
void dot8(int64_t k, const int8_t* w, int64_t ldw, const float* scale, int64_t ld_scale,
          const char* rows, int64_t row_bytes, float* out, int64_t ldo, int64_t out_step,
          const char* ahead, int64_t ahead_pitch, int64_t ahead_step) {
  constexpr int64_t kUnit = Row8::kUnit, kFetchUnits = kFetchSteps8 / kUnit;
  constexpr bool kOneChunk = Row8::kChunk == INT64_MAX;
  const Row8 layout(k);
  const int64_t whole = k / kUnit;
  constexpr int kSums = (F * M + 3) / 4 * 4;
  Vec<float> sums[kSums] = {};
  int64_t u = 0;
  do {
    const int64_t left = layout.units - u;
    const int64_t end = !kOneChunk && left > Row8::kChunk ? u + Row8::kChunk : layout.units;
    const int64_t whole_end = end < whole ? end : whole;
    Dot8<F, M> dot;
    const auto step = [&] {
      dot.step(w + u * kUnit, ldw, rows + u * Row8::kUnitBytes, row_bytes);
      ++u;
    };
    while (u + kFetchUnits <= whole_end) {
#pragma GCC unroll 8
      for (int f = 0; f < F; ++f) __builtin_prefetch(ahead + f * ahead_pitch, 0, 2);
      ahead += ahead_step;
#pragma GCC unroll 4
      for (int64_t i = 0; i < kFetchUnits; ++i) step();
    }
    while (u < whole_end) step();
    if (u < end) {
      int8_t tail[F][kUnit] = {};
      for (int f = 0; f < F; ++f) {
        __builtin_memcpy(tail[f], w + f * ldw + whole * kUnit, k - whole * kUnit);
      }
      dot.step(tail[0], kUnit, rows + u * Row8::kUnitBytes, row_bytes);
      ++u;
    }
#pragma GCC unroll 8
    for (int f = 0; f < F; ++f) {
#pragma GCC unroll 2
      for (int t = 0; t < M; ++t) {
        const Vec<float> sum = dot.sum(f, t);
        sums[f * M + t] = kOneChunk ? sum : sums[f * M + t] + sum;
      }
    }
  } while (!kOneChunk && u < layout.units);
  Vec<float> scales[M], offsets[M];
#pragma GCC unroll 2
  for (int t = 0; t < M; ++t) {
    const char* row = rows + t * row_bytes;
    scales[t] = load<float>(reinterpret_cast<const float*>(row + layout.scales()));
    offsets[t] = load<float>(reinterpret_cast<const float*>(row + layout.offsets()));
  }
#pragma GCC unroll 4
  for (int i = 0; i < kSums; i += 4) {
    Vec<float> v[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) v[j] = sums[i + j] * scales[j % M] + offsets[j % M];
    const Four four = sums_of_four(v);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const int f = (i + j) / M, t = j % M;
      if (f < F) out[t * ldo + f * out_step] = four.v[j] * scale[f * ld_scale];
    }
  }
}

void quant_dot8(int features, int tokens, int64_t k, const void* w, int64_t ldw, const float* scale,
                int64_t ld_scale, const void* rows, int64_t row_bytes, float* out, int64_t ldo,
                int64_t out_step, const void* ahead, int64_t ahead_pitch, int64_t ahead_step) {
  const auto run = [&]<int F, int M>() {
    dot8<F, M>(k, static_cast<const int8_t*>(w), ldw, scale, ld_scale,
               static_cast<const char*>(rows), row_bytes, out, ldo, out_step,
               static_cast<const char*>(ahead), ahead_pitch, ahead_step);
  };
  constexpr int F = kDot8Features;
  if (features == F && tokens == 2) return run.template operator()<F, 2>();
  if (features == F) return run.template operator()<F, 1>();
  if (tokens == 2) return run.template operator()<1, 2>();
  run.template operator()<1, 1>();
}
