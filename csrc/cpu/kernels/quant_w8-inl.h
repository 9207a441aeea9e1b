// w8a16: products of 8-bit weights with few rows of activations of 16 bits. Included by
// kernels-inl.h, inside its namespace; NOTES.md has the arithmetic.

// Rows of weights at once. Sums of four end together with AVX-512, and of six rows two would be
// left over; 16 registers do better with 6 x 2 sums.
constexpr int kW8Features = MOE_VEC_BYTES == 64 ? 4 : 6;
// Steps of k from one prefetch to the next.
constexpr int64_t kW8PrefetchSteps = 64;

// A row of activations, as w8_dot reads it. Vectors lie along k, and lane l of 32 bits sees some of
// every kUnit of its steps: those have one scale, and none is needed before a sum is complete.
//   codes   [units][kUnit] int16
//   scales  [lanes] float
struct W8Row {
  static constexpr int64_t kUnit = MOE_VEC_BYTES / 2;
  static constexpr float kMost = 32767;
  // Units that 32 bits hold the sums of: 256 * 2 * 128 * 32767 < 2^31.
  static constexpr int64_t kChunk = 256;
  static constexpr int64_t kLane = kUnit / kLanes<float>;  // steps of a lane in a unit
  int64_t units;
  explicit W8Row(int64_t k) : units((k + kUnit - 1) / kUnit) {}
  int64_t scales() const { return units * MOE_VEC_BYTES; }
  int64_t bytes() const { return scales() + MOE_VEC_BYTES; }
};

int64_t w8_row_bytes(int64_t k) { return W8Row(k).bytes(); }

// The vectors of a unit of fp32 tokens.
constexpr int kUnitVectors = W8Row::kUnit / kLanes<float>;

void w8_quantize(int64_t k, const float* x, void* row) {
  constexpr int W = kLanes<float>;
  const W8Row layout(k);
  auto* codes = static_cast<char*>(row);
  auto* scales = reinterpret_cast<float*>(codes + layout.scales());
  Vec<float> most[kUnitVectors] = {}, probe[kUnitVectors] = {};
  for (int64_t u = 0; u < layout.units; ++u) {
#pragma GCC unroll 4
    for (int i = 0; i < kUnitVectors; ++i) {
      const Vec<float> v = load<float>(x + u * W8Row::kUnit + i * W), a = magnitude(v);
      most[i] = a > most[i] ? a : most[i];
      probe[i] += v * 0.0f;  // NaN where one is not finite
    }
  }
  Vec<float> inverse[kUnitVectors];
  for (int64_t lane = 0; lane < W; ++lane) {
    float largest = 0, bad = 0;
    for (int64_t i = lane * W8Row::kLane; i < (lane + 1) * W8Row::kLane; ++i) {
      const float a = most[i / W][i % W];
      largest = a > largest ? a : largest;
      bad += probe[i / W][i % W];
    }
    // So small that the quotient would not be finite: zeros.
    const bool usable = largest >= 1e-30f && bad == 0.0f;
    for (int64_t i = lane * W8Row::kLane; i < (lane + 1) * W8Row::kLane; ++i) {
      inverse[i / W][i % W] = usable ? W8Row::kMost / largest : 0.0f;
    }
    scales[lane] = usable ? largest / W8Row::kMost : bad;
  }
  for (int64_t u = 0; u < layout.units; ++u) {
#pragma GCC unroll 4
    for (int i = 0; i < kUnitVectors; ++i) {
      Vec<float> v = load<float>(x + u * W8Row::kUnit + i * W);
      v = inverse[i] == 0.0f ? Vec<float>{} : v;  // Not finite, maybe.
      const Int16 code = int16_of(nearest(v, inverse[i]));
      __builtin_memcpy(codes + u * MOE_VEC_BYTES + 2 * i * W, &code, sizeof(code));
    }
  }
}

// Sums of F rows of weights and M of tokens, in integers. A step is one unit.
template <int F, int M>
struct W8Dot {
  using Int = Simd<float>::Int;
  Int acc[F][M] = {};

  inline void step(const int8_t* w, int64_t ldw, const char* codes, int64_t row_bytes) {
#if defined(__AVX2__) && MOE_VEC_BYTES >= 32
    Bytes x[M];
#pragma GCC unroll 4
    for (int t = 0; t < M; ++t) x[t] = load_weights(codes + t * row_bytes);
#pragma GCC unroll 8
    for (int f = 0; f < F; ++f) {
#if MOE_VEC_BYTES == 64
      const Bytes wv = _mm512_cvtepi8_epi16(load_bytes<__m256i_u>(w + f * ldw));
#else
      const Bytes wv = _mm256_cvtepi8_epi16(load_bytes<__m128i_u>(w + f * ldw));
#endif
#pragma GCC unroll 4
      for (int t = 0; t < M; ++t) {
        const Bytes sum = __builtin_bit_cast(Bytes, acc[f][t]);
        acc[f][t] = __builtin_bit_cast(Int, add_words(sum, wv, x[t]));
      }
    }
#else
    for (int f = 0; f < F; ++f) {
      for (int t = 0; t < M; ++t) {
        int16_t x[W8Row::kUnit];
        __builtin_memcpy(x, codes + t * row_bytes, sizeof(x));
        for (int64_t lane = 0; lane < kLanes<float>; ++lane) {
          for (int64_t i = lane * W8Row::kLane; i < (lane + 1) * W8Row::kLane; ++i) {
            acc[f][t][lane] += static_cast<int32_t>(w[f * ldw + i]) * x[i];
          }
        }
      }
    }
#endif
  }
};

// Multiplies `count` times F rows of weights; each next time begins w_step further.
template <int F, int M>
void w8_dot_tile(const QuantDotParams& p) {
  const auto* w = static_cast<const int8_t*>(p.w);
  const auto* rows = static_cast<const char*>(p.x);
  const auto* next = static_cast<const char*>(p.prefetch);
  const int64_t k = p.k, w_step = p.w_step, ldw = p.ldw, row_bytes = p.x_bytes;
  const int64_t next_ld = p.prefetch_ld;
  const int next_rows = p.prefetch_rows;
  constexpr int64_t kUnit = W8Row::kUnit, kFetchUnits = kW8PrefetchSteps / kUnit;
  const W8Row layout(k);
  const int64_t whole = k / kUnit;
  const auto as_float = [](const auto& v) { return __builtin_convertvector(v, Vec<float>); };
  const auto products = [=](int64_t i, Vec<float>(&sums)[F][M]) __attribute__((always_inline)) {
    const int8_t* codes = w + i * w_step;
    const char* line = next + i * w_step;
    const auto units = [&](W8Dot<F, M>& dot, int64_t u,
                           int64_t end) __attribute__((always_inline)) {
      const int64_t whole_end = end < whole ? end : whole;
      const auto step = [&]() __attribute__((always_inline)) {
        dot.step(codes + u * kUnit, ldw, rows + u * MOE_VEC_BYTES, row_bytes);
        ++u;
      };
      while (u + kFetchUnits <= whole_end) {
        if (next_rows == F) {
#pragma GCC unroll 8
          for (int f = 0; f < F; ++f) __builtin_prefetch(line + f * next_ld, 0, 2);
        } else {
          for (int f = 0; f < next_rows; ++f) __builtin_prefetch(line + f * next_ld, 0, 2);
        }
        line += kW8PrefetchSteps;
#pragma GCC unroll 4
        for (int64_t j = 0; j < kFetchUnits; ++j) step();
      }
      while (u < whole_end) step();
      if (u < end) {
        int8_t tail[F][kUnit] = {};
        for (int f = 0; f < F; ++f) {
          __builtin_memcpy(tail[f], codes + f * ldw + whole * kUnit, k - whole * kUnit);
        }
        dot.step(tail[0], kUnit, rows + u * MOE_VEC_BYTES, row_bytes);
      }
    };
    // sums = values of all sums times the scales of the lanes.
    const auto scaled = [&](const auto& value) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int t = 0; t < M; ++t) {
        const char* scales = rows + t * row_bytes + layout.scales();
        const Vec<float> s = load<float>(reinterpret_cast<const float*>(scales));
#pragma GCC unroll 8
        for (int f = 0; f < F; ++f) sums[f][t] = value(f, t) * s;
      }
    };
    if (layout.units <= W8Row::kChunk) {
      W8Dot<F, M> dot;
      units(dot, 0, layout.units);
      scaled([&](int f, int t) __attribute__((always_inline)) { return as_float(dot.acc[f][t]); });
      return;
    }
    Vec<float> total[F][M] = {};
    for (int64_t u = 0; u < layout.units; u += W8Row::kChunk) {
      const int64_t left = layout.units - u;
      W8Dot<F, M> dot;
      units(dot, u, u + (left < W8Row::kChunk ? left : W8Row::kChunk));
      for (int f = 0; f < F; ++f) {
        for (int t = 0; t < M; ++t) total[f][t] += as_float(dot.acc[f][t]);
      }
    }
    scaled([&](int f, int t) { return total[f][t]; });
  };
  product_sums<float, F, M>(p.count, p.out, p.ldo, p.out_step, products);
}

void w8_dot(const QuantDotParams& p) {
  with_counts<kW8Features>(p.features, p.tokens, [&]<int F, int M>() { w8_dot_tile<F, M>(p); });
}

// Multiplies `count` times F rows of weights that have a scale per group of a multiple of 32; each
// next time begins with the row behind. Sums of a group end as floats, in all lanes at once.
template <int F, int M>
void w8_grouped_dot_tile(const CodesDotParams& p) {
  const CodeRows rows = p.rows;
  const W8Row layout(rows.k);
  const int64_t groups = rows.k / rows.group, group_units = rows.group / W8Row::kUnit;
  const int64_t row0 = p.first, row_step = p.step, row_bytes = p.x_bytes;
  const auto* x = static_cast<const char*>(p.x);
  float* scratch = p.scratch;
  const int64_t room = decoded_scratch(rows.k);
  const auto products = [=](int64_t n, Vec<float>(&sums)[F][M]) __attribute__((always_inline)) {
    const int8_t* w[F];
    const float* scales[F];
#pragma GCC unroll 4
    for (int f = 0; f < F; ++f) {
      const int64_t row = row0 + f * row_step + n;
      w[f] = static_cast<const int8_t*>(rows.w) + row * rows.ldw;
      float* own = scratch + f * room;
      scales[f] = Int8Codes::scales(rows, {}, row, 0, groups, own, own + room / 2).scale;
#pragma GCC unroll 4
      for (int t = 0; t < M; ++t) sums[f][t] = Vec<float>{};
    }
    const char* codes = x;
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t u = 0; u < group_units; u += W8Row::kChunk) {
        const int64_t left = group_units - u;
        const int64_t units = left < W8Row::kChunk ? left : W8Row::kChunk;
#pragma GCC unroll 4
        for (int f = 0; f < F; ++f) {
          W8Dot<1, M> dot;
          for (int64_t i = 0; i < units; ++i) {
            if (i * W8Row::kUnit % kW8PrefetchSteps == 0) {
              __builtin_prefetch(w[f] + i * W8Row::kUnit + kW4Prefetch, 0, 2);
            }
            dot.step(w[f] + i * W8Row::kUnit, 0, codes + i * MOE_VEC_BYTES, row_bytes);
          }
          w[f] += units * W8Row::kUnit;
          const Vec<float> scale = splat<float>(scales[f][g]);
#pragma GCC unroll 4
          for (int t = 0; t < M; ++t) {
            sums[f][t] = add_one_of<float, 1>(sums[f][t], as_float(dot.acc[0][t]), scale);
          }
        }
        codes += units * MOE_VEC_BYTES;
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < M; ++t) {
      const char* lanes = x + t * row_bytes + layout.scales();
      const Vec<float> s = load<float>(reinterpret_cast<const float*>(lanes));
#pragma GCC unroll 4
      for (int f = 0; f < F; ++f) sums[f][t] *= s;
    }
  };
  product_sums<float, F, M>(p.count, p.out, p.ldo, p.out_step, products);
}

void w8_grouped_dot(const CodesDotParams& p) {
  with_counts<kGemvFeatures>(p.features, p.tokens,
                             [&]<int F, int M>() { w8_grouped_dot_tile<F, M>(p); });
}
