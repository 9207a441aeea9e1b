// w4a8: products of 4-bit weights with few rows of activations of 8 bits. Included by
// kernels-inl.h, inside its namespace, after quant_codes-inl.h; NOTES.md has the arithmetic. D is a
// decoder of NibblePairs or Nvfp4Codes.

// Prefetch distance of the weights, in bytes.
constexpr int64_t kW4Prefetch = 4096;
[[maybe_unused]] constexpr int64_t kW4PrefetchRows = 4;  // and of their scales, in rows

// A row of activations, as w4_dot reads it. A unit is what a vector of weights covers; 128 bits of
// it are a block of kQuantBlock steps of k:
//   codes    [units][kSteps] int8: the even k of a unit, then the odd ones, because the low nibbles
//            of a vector of weights are even k and the high nibbles odd ones
//   offsets  [units][kVec / 4] int32: minus kW4Bias times the codes of a block, in each lane of it;
//            with runs of half a block those of the first and the second half, twice.
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

// Added to the values of codes, so that none is negative: those of int4 are so in memory.
template <class D>
constexpr int kW4Bias = __is_same(D, Int4Codes) ? 8 : 12;

template <class Fn>
inline void with_w4_decoder(Codes codes, const Fn& fn) {
  if (codes == Codes::kInt4) return fn.template operator()<Int4Codes>();
  if (codes == Codes::kMxfp4) return fn.template operator()<Mxfp4Codes>();
  return fn.template operator()<Nvfp4Codes>();
}

// Returns the scales of a row of weights for each kRunSteps<D> of it, whatever its groups are.
// scratch: decoded_scratch(k).
template <class D>
__attribute__((noinline)) RunScales w4_run_scales(const CodeRows& rows, int64_t row,
                                                  float* scratch) {
  constexpr int W = kLanes<float>;
  const int64_t runs = (rows.k + kRunSteps<D> - 1) / kRunSteps<D>;
  const int64_t half = decoded_scratch(rows.k) / 2, repeat = D::kGroups ? rows.group / 32 : 1;
  if (repeat <= 1) return D::scales(rows, {}, row, 0, runs, scratch, scratch + half);
  // As they are stored, behind the place of those that are returned.
  const int64_t groups = runs / repeat;
  float* stored = scratch + runs + W;
  const RunScales found = D::scales(rows, {}, row, 0, groups, stored, stored + half);
  const auto spread = [&](const float* src, float* dst) {
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t i = 0; i < repeat; i += W) {
        store<float>(dst + g * repeat + i, splat<float>(src[g]));
      }
    }
  };
  spread(found.scale, scratch);
  if (found.offset == nullptr) return {scratch};
  spread(found.offset, scratch + half);
  return {scratch, scratch + half};
}

void w4_scales(const CodeRows& rows, int64_t row, float* scratch, float* scales, float* offsets) {
  const RunScales found =
      rows.codes == Codes::kMxfp4  ? w4_run_scales<Mxfp4Codes>(rows, row, scratch)
      : rows.codes == Codes::kInt8 ? w4_run_scales<Int8Codes>(rows, row, scratch)
                                   : w4_run_scales<Int4Codes>(rows, row, scratch);
  const int64_t bytes = rows.k / kQuantBlock * static_cast<int64_t>(sizeof(float));
  __builtin_memcpy(scales, found.scale, bytes);
  if (found.offset != nullptr) __builtin_memcpy(offsets, found.offset, bytes);
}

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

// Writes minus kW4Bias times the codes of each block of a unit.
template <class D>
inline void code_offsets(const int8_t* codes, int32_t* offsets) {
  for (int64_t lane = 0; lane < kVec / 4; lane += 4) {
    int32_t sums[2] = {};  // of the first and the second 16 steps
#if defined(__AVX2__)
    // psadbw adds unsigned bytes: each code with a bias of 128.
    const auto biased = [&](const int8_t* p) {
      return _mm_xor_si128(load_bytes<__m128i_u>(p), _mm_set1_epi8(-128));
    };
    const __m128i zero = _mm_setzero_si128();
    const __m128i halves = _mm_add_epi64(_mm_sad_epu8(biased(codes + 4 * lane), zero),
                                         _mm_sad_epu8(biased(codes + kVec + 4 * lane), zero));
    sums[0] = _mm_cvtsi128_si32(halves) - 16 * 128;
    sums[1] = _mm_extract_epi32(halves, 2) - 16 * 128;
#else
    for (int64_t i = 0; i < 16; ++i) {
      const int64_t at = 4 * lane + i;
      sums[i / 8] += codes[at] + codes[kVec + at];
    }
#endif
    const int32_t whole = sums[0] + sums[1];
    for (int64_t i = 0; i < 4; ++i) {
      offsets[lane + i] = -kW4Bias<D> * (kRunSteps<D> == kQuantBlock ? whole : sums[i % 2]);
    }
  }
}

template <class D>
void w4_quantize_for(int64_t k, const float* x, void* row) {
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
    code_offsets<D>(codes + u * W4Row::kSteps, offsets + u * (kVec / 4));
  }
  // Every sum reads one of the scales of every block.
  const float bad = horizontal_sum<float>(probe);
  for (int i = 0; i < 4 && bad != 0.0f; ++i) scales[i] = bad;
}

void w4_quantize(Codes codes, int64_t k, const float* x, void* row) {
  with_w4_decoder(codes, [&]<class D>() { w4_quantize_for<D>(k, x, row); });
}
