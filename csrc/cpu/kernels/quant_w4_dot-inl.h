// w4a8: products of integers of 4-bit weights and rows of activations (quant_w4-inl.h), in loops
// where a target has no instructions for them. Included by kernels-inl.h, inside its namespace.

#if defined(__AVX2__) && MOE_VEC_BYTES >= 32
// Adds neighboring 16-bit elements to 32 bits.
inline Bytes add_pairs(Bytes v) { return MOE_INT(madd_epi16)(v, MOE_INT(set1_epi16)(1)); }

// Returns nibbles as unsigned bytes with a bias.
template <class D>
inline Bytes biased_codes(Bytes nibbles) {
  if constexpr (__is_same(D, Int4Codes)) {
    return nibbles;
  } else {
    static constexpr int8_t kValues[16] = {12, 13, 14, 15, 16, 18, 20, 24,
                                           12, 11, 10, 9,  8,  6,  4,  0};
    const auto table = load_bytes<__m128i>(kValues);
#if MOE_VEC_BYTES == 64
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), nibbles);
#else
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), nibbles);
#endif
  }
}

// Returns the scales of a unit of four rows of weights: lane 4 * b + f is that of block b of row f.
// row[f] has one for each 2^shift blocks.
inline __attribute__((always_inline)) Floats unit_scales(const float* const (&row)[4], int64_t u,
                                                         int shift) {
  constexpr int kBlocks = kVec / 16, kShift = kBlocks == 4 ? 2 : 1;
  const auto two_scales = [&](int f, int64_t i) {  // of each of two rows
    return _mm_castpd_ps(
        _mm_setr_pd(load_bytes<double>(row[f] + i), load_bytes<double>(row[f + 1] + i)));
  };
  if (shift >= kShift) {
    const int64_t i = u >> (shift - kShift);
    const __m128 four = _mm_setr_ps(row[0][i], row[1][i], row[2][i], row[3][i]);
#if MOE_VEC_BYTES == 64
    return _mm512_broadcast_f32x4(four);
#else
    return _mm256_insertf128_ps(_mm256_castps128_ps256(four), four, 1);
#endif
  }
#if MOE_VEC_BYTES == 64
  if (shift == 1) {
    const __m256 rows =
        _mm256_insertf128_ps(_mm256_castps128_ps256(two_scales(0, 2 * u)), two_scales(2, 2 * u), 1);
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6, 1, 3, 5, 7, 1, 3, 5, 7),
                                 _mm512_castps256_ps512(rows));
  }
  const auto halves = [&](int f) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row[f] + 4 * u)),
                                _mm_loadu_ps(row[f + 1] + 4 * u), 1);
  };
  return transpose_quadruples(_mm512_insertf32x8(_mm512_castps256_ps512(halves(0)), halves(2), 1));
#else
  const __m128 a = two_scales(0, 2 * u), b = two_scales(2, 2 * u);
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_shuffle_ps(a, b, 0x88)),
                              _mm_shuffle_ps(a, b, 0xdd), 1);
#endif
}

// Returns the scales of a unit of two rows with two runs in a block: lanes 4 * b and on are those
// of block b of the first row, then of the second.
inline Floats half_scales(const float* first, const float* second) {
#if MOE_VEC_BYTES == 64
  const auto row = [](const float* p) {
    return _mm512_castps_pd(_mm512_castps256_ps512(_mm256_loadu_ps(p)));
  };
  return _mm512_castpd_ps(
      _mm512_permutex2var_pd(row(first), _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), row(second)));
#else
  const __m128d a = _mm_castps_pd(_mm_loadu_ps(first)), b = _mm_castps_pd(_mm_loadu_ps(second));
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_castpd_ps(_mm_unpacklo_pd(a, b))),
                              _mm_castpd_ps(_mm_unpackhi_pd(a, b)), 1);
#endif
}

// Scales and offsets of four rows in the order of W4Dot, a vector for each unit; with two runs in a
// block the scales of the first two rows, and those of the others.
struct UnitScales {
  const float *of_units, *others;
  Floats first(int64_t u) const { return load_bytes<Floats>(of_units + u * kLanes<float>); }
  Floats second(int64_t u) const { return load_bytes<Floats>(others + u * kLanes<float>); }
  bool shifted() const { return others != nullptr; }
};

// Scales of float32 where they are stored, which is faster for short rows.
template <int kShift>
struct StoredScales {
  const float* row;
  int64_t ld;
  inline __attribute__((always_inline)) Floats first(int64_t u) const {
    return unit_scales({row, row + ld, row + 2 * ld, row + 3 * ld}, u, kShift);
  }
  Floats second(int64_t u) const { return first(u); }  // Not used.
  static constexpr bool shifted() { return false; }
};
// How w4_dot reads scales.
struct Rearranged {};
template <int kShift>
struct Stored {};

// Writes them for F rows, `step` apart, to dst, with room for both. scratch: 4 *
// decoded_scratch(k).
template <class D, int F>
__attribute__((noinline)) UnitScales w4_unit_scales(const CodeRows& rows, int64_t row, int64_t step,
                                                    float* scratch, float* dst) {
  constexpr int W = kLanes<float>;
  constexpr bool kHalves = kRunSteps<D> != kQuantBlock;
  const int64_t units = W4Row(rows.k).units, room = decoded_scratch(rows.k);
  const int64_t blocks = D::kGroups ? rows.group / kQuantBlock : 1;
  const bool even = (blocks & (blocks - 1)) == 0;  // else a scale for each block is written first
  const int64_t size = kRunSteps<D> * (even ? blocks : 1), count = (rows.k + size - 1) / size;
  const bool whole = rows.k % (2 * kVec) == 0;
  const float *scales[4], *offsets[4];
#pragma GCC unroll 4
  for (int f = 0; f < 4; ++f) {
    if (f >= F) {
      scales[f] = scales[0];
      offsets[f] = offsets[0];
      continue;
    }
    float* own = scratch + f * room;
    const RunScales found = even
                                ? D::scales(rows, {}, row + f * step, 0, count, own, own + room / 2)
                                : w4_run_scales<D>(rows, row + f * step, own);
    scales[f] = found.scale;
    offsets[f] = found.offset;
    if (whole) continue;
    // Of the last unit some may be missing. Nothing is read behind what is stored.
    if (found.scale != own) __builtin_memcpy(own, found.scale, count * sizeof(float));
    store<float>(own + count, Vec<float>{});
    scales[f] = own;
    if (found.offset != nullptr) store<float>(own + room / 2 + count, Vec<float>{});
  }
  const int shift = even ? __builtin_ctzll(static_cast<unsigned long long>(blocks)) : 0;
  float* second = dst + units * W;
  for (int64_t u = 0; u < units; ++u) {
    const auto put = [&](float* to, Floats v) {
      store<float>(to + u * W, __builtin_bit_cast(Vec<float>, v));
    };
    if constexpr (kHalves) {
      constexpr int64_t kRuns = kVec / 8;
      put(dst, half_scales(scales[0] + u * kRuns, scales[1] + u * kRuns));
      put(second, half_scales(scales[2] + u * kRuns, scales[3] + u * kRuns));
    } else {
      put(dst, unit_scales(scales, u, shift));
      if (D::kOffsets && offsets[0] != nullptr) put(second, unit_scales(offsets, u, shift));
    }
  }
  return {dst, kHalves || (D::kOffsets && offsets[0] != nullptr) ? second : nullptr};
}

// Returns the scales of F rows, `step` apart.
template <class D, int F>
inline UnitScales scales_of_rows(Rearranged, const CodeRows& rows, int64_t row, int64_t step,
                                 float* scratch, float* dst) {
  return w4_unit_scales<D, F>(rows, row, step, scratch, dst);
}
template <class D, int F, int kShift>
inline StoredScales<kShift> scales_of_rows(Stored<kShift>, const CodeRows& rows, int64_t row,
                                           int64_t step, float*, float*) {
  const int64_t ld = rows.ld_scale / static_cast<int64_t>(sizeof(float));
  return {static_cast<const float*>(rows.scale) + row * ld, F == 1 ? 0 : step * ld};
}

// Folds the products of a block of two rows to two sums of each, of its halves.
template <class D>
inline Bytes fold_two(Bytes a, Bytes b) {
#if defined(__AVX512VNNI__)
  return add_pairs(MOE_INT(packs_epi32)(a, b));
#else
  if constexpr (kRunSteps<D> != kQuantBlock) {
    return add_pairs(MOE_INT(packs_epi32)(add_pairs(a), add_pairs(b)));
  } else {  // 16 bits also hold two of these sums.
    return add_pairs(
        MOE_INT(add_epi16)(MOE_INT(unpacklo_epi64)(a, b), MOE_INT(unpackhi_epi64)(a, b)));
  }
#endif
}

// A unit of F rows of 4-bit weights, one or four, and M rows of tokens.
template <class D, int F, int M>
struct W4Dot {
  static constexpr bool kHalves = kRunSteps<D> != kQuantBlock;
  // With VNNI sums of 8 products in 32 bits, at most 8 * 24 * 127, else of 4 in 16 bits.
  Bytes sums[F][M];

  inline __attribute__((always_inline)) void multiply(const uint8_t* w, int64_t ldw,
                                                      const char* codes, int64_t row_bytes) {
    const Bytes mask = MOE_INT(set1_epi8)(15);
#pragma GCC unroll 4
    for (int f = 0; f < F; ++f) {
      Bytes both = load_weights(w + f * ldw);
      asm("" : "+v"(both));  // Or it is loaded again for the shift.
      const Bytes even = biased_codes<D>(bits_and(both, mask));
      const Bytes odd = biased_codes<D>(bits_and(MOE_INT(srli_epi16)(both, 4), mask));
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
  template <class Scales>
  inline __attribute__((always_inline)) void add_to(Floats (&acc)[M], const Scales& rows, int64_t u,
                                                    const char* offsets, const char* scales,
                                                    int64_t row_bytes) const {
    const auto sum = [&](int f, int t) { return sums[f < F ? f : 0][t]; };
    const auto token = [&](int t) { return load_bytes<Floats>(scales + u * kVec + t * row_bytes); };
    const auto offset = [&](int t) { return load_weights(offsets + u * kVec + t * row_bytes); };
    const Floats first = rows.first(u);
    if constexpr (kRunSteps<D> != kQuantBlock) {
      const Floats second = rows.second(u);
#pragma GCC unroll 4
      for (int t = 0; t < M; ++t) {
        const auto scaled = [&](Bytes folded, Floats factors) {
          const Bytes all = MOE_INT(add_epi32)(folded, offset(t));
          return __builtin_bit_cast(Floats, as_floats(all)) * factors;
        };
        const Floats low = scaled(fold_two<D>(sum(0, t), sum(1, t)), first);
        const Floats high = scaled(fold_two<D>(sum(2, t), sum(3, t)), second);
        acc[t] += (MOE_INT(shuffle_ps)(low, high, 0x88) + MOE_INT(shuffle_ps)(low, high, 0xdd)) *
                  token(t);
      }
      return;
    }
#pragma GCC unroll 4
    for (int t = 0; t < M; ++t) {
      const Bytes low = fold_two<D>(sum(0, t), sum(1, t)), high = fold_two<D>(sum(2, t), sum(3, t));
      const Bytes blocks =
          add_words(offset(t), MOE_INT(packs_epi32)(low, high), MOE_INT(set1_epi16)(1));
      acc[t] += __builtin_bit_cast(Floats, as_floats(blocks)) * (first * token(t));
    }
    if (!D::kOffsets || !rows.shifted()) return;
    const Floats shifts = rows.second(u) * (-1.0f / kW4Bias<D>);
#pragma GCC unroll 4
    for (int t = 0; t < M; ++t) {
      acc[t] += __builtin_bit_cast(Floats, as_floats(offset(t))) * (shifts * token(t));
    }
  }
};

// Computes w4_dot of four rows and one token of whole units: while the sums of one unit are folded,
// the next is multiplied, be it of the next rows. An instruction that waits for an operand occupies
// a scheduler entry, and folding waits for all earlier instructions.
template <class D, class How>
void w4_dot_one(const CodesDotParams& p, const W4Row& layout) {
  constexpr int64_t kSteps = 2 * kVec;
  const CodeRows rows = p.rows;
  const int64_t count = p.count, units = layout.units, out_step = p.out_step;
  const int64_t ldw = p.step * rows.ldw;
  [[maybe_unused]] const int64_t ld_scale = rows.ld_scale / static_cast<int64_t>(sizeof(float));
  const auto* w = static_cast<const uint8_t*>(rows.w) + p.first * rows.ldw;
  const auto* codes = static_cast<const char*>(p.x);
  const char *offsets = codes + layout.offsets(), *scales = codes + layout.scales();
  float* out = p.out;
  W4Dot<D, 4, 1> now, next;
  // Those of the last rows are read beside those of the next.
  const auto scales_of = [&](int64_t i) {
    float* place = p.scratch + 4 * decoded_scratch(rows.k) + i % 2 * w4_unit_floats(rows.k);
    return scales_of_rows<D, 4>(How{}, rows, p.first + i, p.step, p.scratch, place);
  };
  auto factors = scales_of(0), next_factors = factors;
  Floats acc[1] = {}, folded[kFolded];
  now.multiply(w, ldw, codes, 0);
  for (int64_t i = 0, u = 0; i < count;) {
    const int64_t done = u;
    const bool last = ++u == units;
    if (last) {
      u = 0;
      // There may be nothing behind the last rows.
      if (i + 1 < count) {
        w += rows.ldw;
        if constexpr (__is_same(How, Rearranged)) {
          next_factors = scales_of(i + 1);
        } else {
          next_factors.row += ld_scale;
        }
      }
    }
    const uint8_t* unit = w + u * kVec;
#pragma GCC unroll 4
    for (int f = 0; f < 4; ++f) __builtin_prefetch(unit + f * ldw + kW4Prefetch, 0, 2);
    next.multiply(unit, ldw, codes + u * kSteps, 0);
    now.add_to(acc, factors, done, offsets, scales, 0);
    now = next;
    if (!last) continue;
    factors = next_factors;
    folded[i % kFolded] = acc[0];
    acc[0] = Floats{};
    if (++i % kFolded == 0) put_folded(folded, out + i - kFolded, out_step);
  }
  for (int64_t i = count / kFolded * kFolded; i < count; ++i) {
    const Four<float> four = add_quadruples(folded[i % kFolded]);
    for (int f = 0; f < 4; ++f) out[f * out_step + i] = four.v[f];
  }
}

// Multiplies `count` times F rows of weights, each next time the rows behind these.
template <class D, class How, int F, int M>
void w4_dot_tile(const CodesDotParams& p) {
  constexpr int64_t kSteps = 2 * kVec;
  const CodeRows rows = p.rows;
  const W4Row layout(rows.k);
  const int64_t k = rows.k, whole = k / kSteps;
  if constexpr (F == 4 && M == 1) {
    if (whole == layout.units) return w4_dot_one<D, How>(p, layout);
  }
  const auto* w = static_cast<const uint8_t*>(rows.w) + p.first * rows.ldw;
  const auto* tokens = static_cast<const char*>(p.x);
  const char *offsets = tokens + layout.offsets(), *scales = tokens + layout.scales();
  const int64_t ldw = p.step * rows.ldw, row_bytes = p.x_bytes, row0 = p.first, step = p.step;
  float* scratch = p.scratch;
  const int64_t ld_scales = step * rows.ld_scale;
  const char* stored = static_cast<const char*>(rows.scale) + row0 * rows.ld_scale;
  const auto products = [=](int64_t n, Floats(&acc)[M]) __attribute__((always_inline)) {
    const uint8_t* codes = w + n * rows.ldw;
    W4Dot<D, F, M> unit;
    const auto factors = scales_of_rows<D, F>(How{}, rows, row0 + n, step, scratch,
                                              scratch + 4 * decoded_scratch(k));
    const char* next_scales = stored + (n + kW4PrefetchRows) * rows.ld_scale;
#pragma GCC unroll 4
    for (int t = 0; t < M; ++t) acc[t] = Floats{};
    for (int64_t u = 0; u < whole; ++u) {
#pragma GCC unroll 4
      for (int f = 0; f < F; ++f)
        __builtin_prefetch(codes + f * ldw + u * kVec + kW4Prefetch, 0, 2);
      // Scales are prefetched for one row at a time: a line of them lasts for F units or more.
      __builtin_prefetch(next_scales + u % F * ld_scales + u / F * 64, 0, 2);
      unit.multiply(codes + u * kVec, ldw, tokens + u * kSteps, row_bytes);
      unit.add_to(acc, factors, u, offsets, scales, row_bytes);
    }
    if (__is_same(How, Rearranged) && whole < layout.units) {
      uint8_t tail[F][kVec] = {};
      for (int f = 0; f < F; ++f) {
        __builtin_memcpy(tail[f], codes + f * ldw + whole * kVec, k / 2 - whole * kVec);
      }
      unit.multiply(tail[0], kVec, tokens + whole * kSteps, row_bytes);
      unit.add_to(acc, factors, whole, offsets, scales, row_bytes);
    }
  };
  folded_sums<F, M>(p.count, p.out, p.ldo, p.out_step, products);
}

template <class D, class How>
void w4_dot_of(const CodesDotParams& p) {
  with_counts<kGemvFeatures>(p.features, p.tokens,
                             [&]<int F, int M>() { w4_dot_tile<D, How, F, M>(p); });
}

void w4_dot(const CodesDotParams& p) {
  const CodeRows& rows = p.rows;
  const bool stored = rows.codes == Codes::kInt4 && rows.scale_type == ScaleType::kFloat32 &&
                      rows.zero == nullptr && rows.k % (2 * kVec) == 0;
  if (stored && rows.group == 32) return w4_dot_of<Int4Codes, Stored<0>>(p);
  if (stored && rows.group == 64) return w4_dot_of<Int4Codes, Stored<1>>(p);
  if (stored && rows.group == 128) return w4_dot_of<Int4Codes, Stored<2>>(p);
  with_w4_decoder(rows.codes, [&]<class D>() { w4_dot_of<D, Rearranged>(p); });
}
#else
// Computes the sums one weight at a time; compilers vectorize the loop.
template <class D, int F, int M>
void w4_dot_tile(const CodesDotParams& p) {
  const CodeRows rows = p.rows;
  const W4Row layout(rows.k);
  constexpr int64_t kSteps = W4Row::kSteps, kRuns = kSteps / kRunSteps<D>;
  static_assert(kSteps == kQuantBlock, "a unit is a block");
  const auto value = [](int nibble) {
    return static_cast<int16_t>(__is_same(D, Int4Codes) ? nibble - 8 : TwiceE2m1::kValues[nibble]);
  };
  for (int64_t n = 0; n < p.count; ++n) {
    for (int f = 0; f < F; ++f) {
      const int64_t row = p.first + f * p.step + n;
      const auto* w = static_cast<const uint8_t*>(rows.w) + row * rows.ldw;
      const RunScales factors = w4_run_scales<D>(rows, row, p.scratch);
      for (int t = 0; t < M; ++t) {
        const char* x = static_cast<const char*>(p.x) + t * p.x_bytes;
        const auto* codes = reinterpret_cast<const int8_t*>(x);
        const auto* scales = reinterpret_cast<const float*>(x + layout.scales());
        float acc = 0;
        for (int64_t u = 0; u < layout.units; ++u) {
          const int8_t *even = codes + u * kSteps, *odd = even + kVec;
          for (int64_t run = 0; run < kRuns; ++run) {
            int32_t sum = 0, all = 0;
            const int64_t bytes = kVec / kRuns;
            if (2 * (u * kVec + run * bytes) >= rows.k) break;
            for (int64_t i = run * bytes; i < (run + 1) * bytes; ++i) {
              sum += value(w[u * kVec + i] & 15) * even[i] + value(w[u * kVec + i] >> 4) * odd[i];
              all += even[i] + odd[i];
            }
            const int64_t at = u * kRuns + run;
            const float token = scales[u * kVec / 4];
            acc += static_cast<float>(sum) * token * factors.scale[at];
            if (factors.offset != nullptr)
              acc += static_cast<float>(all) * token * factors.offset[at];
          }
        }
        p.out[t * p.ldo + f * p.out_step + n] = acc;
      }
    }
  }
}

void w4_dot(const CodesDotParams& p) {
  with_w4_decoder(p.rows.codes, [&]<class D>() {
    with_counts<kGemvFeatures>(p.features, p.tokens,
                               [&]<int F, int M>() { w4_dot_tile<D, F, M>(p); });
  });
}
#endif
