// w4a8: products of 4-bit weights with few rows of activations of 8 bits. Included by
// kernels-inl.h, inside its namespace; NOTES.md has the arithmetic.

// Prefetch distance of the weights, in bytes.
constexpr int64_t kW4Prefetch = 4096;

// A row of activations, as w4_dot reads it. A unit is what a vector of weights covers; 128 bits of
// it are a block of kQuantBlock steps of k:
//   codes    [units][kSteps] int8: the even k of a unit, then the odd ones, because the low nibbles
//            of a vector of weights are even k and the high nibbles odd ones
//   offsets  [units][kVec / 4] int32: minus 8 times the codes of a block, in each lane of it.
//            Instructions multiply unsigned by signed bytes, so weights come with a bias
//   scales   [units][kVec / 4]: those of the codes, in each lane of a block
struct W4Row {
  static constexpr int64_t kSteps = 2 * kVec;
  static constexpr int64_t kWhole = kSteps < kQuantBlock ? kQuantBlock : kSteps;
  int64_t units;  // of whole blocks
  explicit W4Row(int64_t k) : units((k + kWhole - 1) / kWhole * (kWhole / kSteps)) {}
  int64_t offsets() const { return units * kSteps; }
  int64_t scales() const { return offsets() + units * kVec; }
  int64_t bytes() const { return scales() + units * kVec; }
};

int64_t w4_row_bytes(int64_t k) { return W4Row(k).bytes(); }

#if defined(__AVX2__) && MOE_VEC_BYTES >= 32
struct CodePair {
  __m128i even, odd;
};

// Rounds 32 floats to codes, separately for even and odd places.
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

// Stores the rounded codes to memory.
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

// Minus 8 times the codes of each block of a unit.
inline void code_offsets(const int8_t* codes, int32_t* offsets) {
  for (int64_t lane = 0; lane < kVec / 4; lane += 4) {
    int32_t sum = 0;
#if defined(__AVX2__)
    // psadbw adds unsigned bytes: each code with a bias of 128.
    const auto biased = [&](const int8_t* p) {
      return _mm_xor_si128(load_bytes<__m128i_u>(p), _mm_set1_epi8(-128));
    };
    const __m128i zero = _mm_setzero_si128();
    const __m128i sums = _mm_add_epi64(_mm_sad_epu8(biased(codes + 4 * lane), zero),
                                       _mm_sad_epu8(biased(codes + kVec + 4 * lane), zero));
    sum = _mm_cvtsi128_si32(_mm_add_epi64(sums, _mm_srli_si128(sums, 8))) - 32 * 128;
#else
    for (int64_t i = 4 * lane; i < 4 * lane + 16; ++i) sum += codes[i] + codes[kVec + i];
#endif
    for (int64_t i = lane; i < lane + 4; ++i) offsets[i] = -8 * sum;
  }
}

void w4_quantize(int64_t k, const float* x, void* row) {
  static_assert(kQuantBlock == 32, "a block is what round_codes takes");
  const W4Row layout(k);
  auto* codes = static_cast<int8_t*>(row);
  auto* offsets = reinterpret_cast<int32_t*>(codes + layout.offsets());
  auto* scales = reinterpret_cast<float*>(codes + layout.scales());
  const int64_t padded = layout.units * W4Row::kSteps;
  Vec<float> probe = {};
  for (int64_t k0 = 0; k0 < padded; k0 += 32) {
    int8_t* even = codes + k0 / W4Row::kSteps * W4Row::kSteps + k0 % W4Row::kSteps / 2;
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
    for (int64_t i = 0; i < 4; ++i) scales[k0 / 8 + i] = scale;
  }
  for (int64_t u = 0; u < layout.units; ++u) {
    code_offsets(codes + u * W4Row::kSteps, offsets + u * (kVec / 4));
  }
  // Every sum reads one of the scales of every block.
  const float bad = horizontal_sum<float>(probe);
  for (int i = 0; i < 4 && bad != 0.0f; ++i) scales[i] = bad;
}

// --- products of integers

#if defined(__AVX2__) && MOE_VEC_BYTES >= 32
// Adds neighboring 16-bit elements to 32 bits.
inline Bytes add_pairs(Bytes v) { return MOE_INT(madd_epi16)(v, MOE_INT(set1_epi16)(1)); }

// Returns the scales of a unit of four rows of weights, from row[f] on: lane 4 * b + f is that of
// block b of row f.
template <int kGroup>
inline Floats unit_scales(const float* const (&row)[4]) {
  constexpr int64_t kCount = 2 * kVec / kGroup;  // a row; 0: less than one
  const auto two_scales = [&](int f) {           // of each of two rows
    return _mm_castpd_ps(_mm_setr_pd(load_bytes<double>(row[f]), load_bytes<double>(row[f + 1])));
  };
#if MOE_VEC_BYTES == 64
  if constexpr (kCount == 4) {
    const auto halves = [&](int f) {
      return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row[f])),
                                  _mm_loadu_ps(row[f + 1]), 1);
    };
    return transpose_quadruples(
        _mm512_insertf32x8(_mm512_castps256_ps512(halves(0)), halves(2), 1));
  }
  if constexpr (kCount == 2) {
    const __m256 rows =
        _mm256_insertf128_ps(_mm256_castps128_ps256(two_scales(0)), two_scales(2), 1);
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6, 1, 3, 5, 7, 1, 3, 5, 7),
                                 _mm512_castps256_ps512(rows));
  }
  return _mm512_broadcast_f32x4(_mm_setr_ps(*row[0], *row[1], *row[2], *row[3]));
#else
  if constexpr (kCount == 2) {
    const __m128 a = two_scales(0), b = two_scales(2);
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_shuffle_ps(a, b, 0x88)),
                                _mm_shuffle_ps(a, b, 0xdd), 1);
  }
  const __m128 four = _mm_setr_ps(*row[0], *row[1], *row[2], *row[3]);
  return _mm256_insertf128_ps(_mm256_castps128_ps256(four), four, 1);
#endif
}

// Folds the products of a block of two rows to four sums of each. 16 bits also hold two of those.
inline Bytes fold_two(Bytes a, Bytes b) {
#if defined(__AVX512VNNI__)
  return MOE_INT(packs_epi32)(a, b);
#else
  return MOE_INT(add_epi16)(MOE_INT(unpacklo_epi64)(a, b), MOE_INT(unpackhi_epi64)(a, b));
#endif
}

// A unit of F rows of 4-bit weights, one or four, and M rows of tokens.
template <int kGroup, int F, int M>
struct W4Dot {
  // With VNNI sums of 8 products in 32 bits, at most 8 * 15 * 127, else of 4 in 16 bits.
  Bytes sums[F][M];

  inline __attribute__((always_inline)) void multiply(const uint8_t* w, int64_t ldw,
                                                      const char* codes, int64_t row_bytes) {
    const Bytes mask = MOE_INT(set1_epi8)(15);
#pragma GCC unroll 4
    for (int f = 0; f < F; ++f) {
      Bytes both = load_weights(w + f * ldw);
      asm("" : "+v"(both));  // Or it is loaded again for the shift.
      const Bytes even = bits_and(both, mask);
      const Bytes odd = bits_and(MOE_INT(srli_epi16)(both, 4), mask);
#pragma GCC unroll 4
      for (int t = 0; t < M; ++t) {
        const Bytes c0 = load_weights(codes + t * row_bytes);
        const Bytes c1 = load_weights(codes + t * row_bytes + kVec);
#if defined(__AVX512VNNI__)
        sums[f][t] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(Bytes{}, even, c0), odd, c1);
#else
        sums[f][t] =
            MOE_INT(add_epi16)(MOE_INT(maddubs_epi16)(even, c0), MOE_INT(maddubs_epi16)(odd, c1));
#endif
      }
    }
  }

  // Adds the sums of block b of row f to lane 4 * b + f of acc.
  inline __attribute__((always_inline)) void add_to(Floats (&acc)[M], const float* scale,
                                                    int64_t ld_scale, const char* offsets,
                                                    const char* scales, int64_t row_bytes) const {
    const auto row = [&](int f) { return scale + (f < F ? f : 0) * ld_scale; };
    const Floats factors = unit_scales<kGroup>({row(0), row(1), row(2), row(3)});
#pragma GCC unroll 4
    for (int t = 0; t < M; ++t) {
      const auto sum = [&](int f) { return sums[f < F ? f : 0][t]; };
      const Bytes low = add_pairs(fold_two(sum(0), sum(1)));
      const Bytes high = add_pairs(fold_two(sum(2), sum(3)));
      const Bytes blocks = add_words(load_weights(offsets + t * row_bytes),
                                     MOE_INT(packs_epi32)(low, high), MOE_INT(set1_epi16)(1));
      const auto token = load_bytes<Floats>(scales + t * row_bytes);
      acc[t] += __builtin_bit_cast(Floats, as_floats(blocks)) * (factors * token);
    }
  }
};

// Computes w4_dot of four rows and one token of whole units: while the sums of one unit are folded,
// the next is multiplied, be it of the next rows. An instruction that waits for an operand occupies
// a scheduler entry, and folding waits for all earlier instructions.
template <int kGroup>
void w4_dot_one(const QuantDotParams& p, const W4Row& layout) {
  constexpr int64_t kSteps = 2 * kVec;
  const int64_t count = p.count, units = layout.units, w_step = p.w_step, ldw = p.ldw;
  const int64_t scale_step = p.scale_step, ld_scale = p.ld_scale, out_step = p.out_step;
  const auto* w = static_cast<const uint8_t*>(p.w);
  const auto* codes = static_cast<const char*>(p.x);
  const char *offsets = codes + layout.offsets(), *scales = codes + layout.scales();
  const float* scale = p.scale;
  float* out = p.out;
  W4Dot<kGroup, 4, 1> now, next;
  Floats acc[1] = {}, folded[kFolded];
  now.multiply(w, ldw, codes, 0);
  for (int64_t i = 0, u = 0; i < count;) {
    const float* factors = scale + u * kSteps / kGroup;
    const int64_t done = u * kVec;
    const bool last = ++u == units;
    if (last) {
      u = 0;
      // There may be nothing behind the last rows.
      if (i + 1 < count) w += w_step;
      scale += scale_step;
    }
    const uint8_t* unit = w + u * kVec;
#pragma GCC unroll 4
    for (int f = 0; f < 4; ++f) __builtin_prefetch(unit + f * ldw + kW4Prefetch, 0, 2);
    next.multiply(unit, ldw, codes + u * kSteps, 0);
    now.add_to(acc, factors, ld_scale, offsets + done, scales + done, 0);
    now = next;
    if (!last) continue;
    folded[i % kFolded] = acc[0];
    acc[0] = Floats{};
    if (++i % kFolded == 0) put_folded(folded, out + i - kFolded, out_step);
  }
  for (int64_t i = count / kFolded * kFolded; i < count; ++i) {
    const Four<float> four = add_quadruples(folded[i % kFolded]);
    for (int f = 0; f < 4; ++f) out[f * out_step + i] = four.v[f];
  }
}

// Multiplies `count` times F rows of weights; each next time begins w_step and scale_step further.
template <int kGroup, int F, int M>
void w4_dot_tile(const QuantDotParams& p) {
  constexpr int64_t kSteps = 2 * kVec;
  const W4Row layout(p.k);
  const int64_t k = p.k, whole = k / kSteps;
  if constexpr (F == 4 && M == 1) {
    if (whole == layout.units) return w4_dot_one<kGroup>(p, layout);
  }
  const auto* w = static_cast<const uint8_t*>(p.w);
  const auto* rows = static_cast<const char*>(p.x);
  const char *offsets = rows + layout.offsets(), *scales = rows + layout.scales();
  const float* scale = p.scale;
  const int64_t w_step = p.w_step, ldw = p.ldw, row_bytes = p.x_bytes;
  const int64_t scale_step = p.scale_step, ld_scale = p.ld_scale;
  const auto products = [=](int64_t n, Floats(&acc)[M]) __attribute__((always_inline)) {
    const uint8_t* codes = w + n * w_step;
    const float* factors = scale + n * scale_step;
    W4Dot<kGroup, F, M> unit;
#pragma GCC unroll 4
    for (int t = 0; t < M; ++t) acc[t] = Floats{};
    for (int64_t u = 0; u < whole; ++u) {
#pragma GCC unroll 4
      for (int f = 0; f < F; ++f)
        __builtin_prefetch(codes + f * ldw + u * kVec + kW4Prefetch, 0, 2);
      // Scales are prefetched for one row at a time: a line of them lasts for F units or more.
      const int64_t next_scale = (u / F * F * kSteps + 2 * kW4Prefetch) / kGroup;
      __builtin_prefetch(factors + u % F * ld_scale + next_scale, 0, 2);
      unit.multiply(codes + u * kVec, ldw, rows + u * kSteps, row_bytes);
      unit.add_to(acc, factors + u * kSteps / kGroup, ld_scale, offsets + u * kVec,
                  scales + u * kVec, row_bytes);
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
      unit.multiply(tail[0], kVec, rows + whole * kSteps, row_bytes);
      unit.add_to(acc, tail_scale[0], 4, offsets + whole * kVec, scales + whole * kVec, row_bytes);
    }
  };
  folded_sums<F, M>(p.count, p.out, p.ldo, p.out_step, products);
}
#else
// Computes the sums one weight at a time; compilers vectorize the loop.
template <int kGroup, int F, int M>
void w4_dot_tile(const QuantDotParams& p) {
  const W4Row layout(p.k);
  constexpr int64_t kSteps = W4Row::kSteps;
  static_assert(kSteps <= 32, "a unit has one scale");
  const auto* w = static_cast<const uint8_t*>(p.w);
  const float* scale = p.scale;
  for (int64_t n = 0; n < p.count; ++n, w += p.w_step, scale += p.scale_step) {
    for (int f = 0; f < F; ++f) {
      for (int t = 0; t < M; ++t) {
        const char* row = static_cast<const char*>(p.x) + t * p.x_bytes;
        const auto* codes = reinterpret_cast<const int8_t*>(row);
        const auto* offsets = reinterpret_cast<const int32_t*>(row + layout.offsets());
        const auto* scales = reinterpret_cast<const float*>(row + layout.scales());
        float acc = 0;
        for (int64_t u = 0; u < layout.units; ++u) {
          const uint8_t* unit = w + f * p.ldw + u * kVec;
          const int8_t *even = codes + u * kSteps, *odd = even + kVec;
          int32_t sum = offsets[u * kVec / 4];
          for (int64_t i = 0; i < kVec; ++i) {
            sum += static_cast<int16_t>(unit[i] & 15) * even[i] +
                   static_cast<int16_t>(unit[i] >> 4) * odd[i];
          }
          acc += static_cast<float>(sum) * scales[u * kVec / 4] *
                 scale[f * p.ld_scale + u * kSteps / kGroup];
        }
        p.out[t * p.ldo + f * p.out_step + n] = acc;
      }
    }
  }
}
#endif

void w4_dot(const QuantDotParams& p) {
  with_counts<kGemvFeatures>(p.features, p.tokens, [&]<int F, int M>() {
    with_value<32, 64, 128>(p.group, [&]<int kGroup>() { w4_dot_tile<kGroup, F, M>(p); });
  });
}
