// int8 microkernels: repacked panels of weights of 8 and 4 bits times activations of 8 bits.
// Included by kernels-inl.h, inside its namespace; NOTES.md has the arithmetic.

#if defined(__AVX2__) && MOE_VEC_BYTES >= 32
// 32 bits of a vector are 4 neighboring steps of k of a column. Instructions multiply unsigned by
// signed bytes, so weights come with a bias, and sums start from minus that many times the codes of
// their tokens. Without VNNI there are sums of 16 bits only, two in a lane: those of 4-bit weights
// are at most 16 * 8 * 127 when complete, and what wraps around before does not matter.
#if defined(__AVX512VNNI__)
constexpr bool kVnni = true;
#else
constexpr bool kVnni = false;
#endif

// Data that int8_tile reads in addition to kQuantBlock activations.
struct Int8Block {
  int32_t offset;
  float scale;
};

// Writes 32 codes in the order in which int8_tile unpacks words; returns the initial value of sums
// of their products.
template <class D>
inline int32_t int8_codes(const float* x, float inverse, int8_t* dst) {
  static_assert(kQuantBlock == 32, "a block is what round_codes takes");
  __m128i low = _mm_setzero_si128(), high = low;
  constexpr int kBias = __is_same(D, Int8Codes) ? 128 : kW4Bias<D>;
  if constexpr (!__is_same(D, Int8Codes)) {
    const CodePair codes = round_codes(x, inverse);
    low = _mm_unpacklo_epi32(codes.even, codes.odd);
    high = _mm_unpackhi_epi32(codes.even, codes.odd);
  } else {
#if defined(__AVX512VNNI__)
    const auto half = [&](int i) {
      return _mm512_cvtepi32_epi8(
          __builtin_bit_cast(__m512i, nearest(load<float>(x + i), inverse)));
    };
    low = half(0);
    high = half(16);
#endif
  }
  const __m256i codes = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
  __builtin_memcpy(dst, &codes, sizeof(codes));
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), codes);
  __m128i sum = _mm_add_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  sum = _mm_add_epi16(sum, _mm_shuffle_epi32(sum, 0x4e));
  sum = _mm_add_epi16(sum, _mm_shuffle_epi32(sum, 0xb1));
  if constexpr (kVnni) {
    return _mm_cvtsi128_si32(_mm_madd_epi16(sum, _mm_set1_epi16(1))) * -kBias;
  } else {
    return _mm_cvtsi128_si32(_mm_mullo_epi16(sum, _mm_set1_epi16(-kBias)));
  }
}

template <class D>
inline void quantize_int8_of(int64_t n, float* x, float* dst, bool rest) {
  auto* codes = reinterpret_cast<int8_t*>(dst);
  auto* blocks = reinterpret_cast<Int8Block*>(codes + kInt8Depth);
  Vec<float> probe = {};
  for (int64_t i = 0; i < n; i += kQuantBlock) {
    const float most = largest(x + i, kQuantBlock, probe);
    // So small that the quotient would not be finite: zeros.
    const float inverse = most >= 1e-30f ? 127.0f / most : 0.0f;
    Int8Block& block = blocks[i / kQuantBlock];
    block.offset = int8_codes<D>(x + i, inverse, codes + i);
    block.scale = most / 127.0f;
    for (int64_t j = i; rest && j < i + kQuantBlock; j += kLanes<float>) {
      const Vec<float> v = load<float>(x + j);
      store<float>(x + j, v - as_float(nearest(v, inverse)) * block.scale);
    }
  }
  // Every sum reads every scale.
  const float bad = horizontal_sum<float>(probe);
  if (bad != 0.0f) blocks[0].scale = bad;
}

void quantize_int8(Codes codes, int64_t n, float* x, float* dst, bool rest) {
  if (codes == Codes::kMxfp4) return quantize_int8_of<Mxfp4Codes>(n, x, dst, rest);
  if (codes == Codes::kInt8 && kVnni) return quantize_int8_of<Int8Codes>(n, x, dst, rest);
  quantize_int8_of<Int4Codes>(n, x, dst, rest);
}

// Returns step `step` of words as unsigned bytes: with 4 bits the even steps of k, then the odd
// ones.
template <class D>
inline Bytes word_uint8(const uint32_t* words, int step) {
  const Bytes word = load_weights(words);
  if constexpr (__is_same(D, Int8Codes)) {
    return word;
  } else {
    return biased_codes<D>(
        bits_and(step == 0 ? word : MOE_INT(srli_epi16)(word, 4), MOE_INT(set1_epi8)(15)));
  }
}

// Returns acc + the products of 4 weights with the 4 codes at `a`.
inline Bytes add_int8(Bytes acc, Bytes weights, const float* a) {
#if defined(__AVX512VNNI__)
  return _mm512_dpbusd_epi32(acc, weights, _mm512_set1_epi32(load_bytes<int32_t>(a)));
#elif MOE_VEC_BYTES == 64
  return _mm512_add_epi16(acc,
                          _mm512_maddubs_epi16(weights, _mm512_set1_epi32(load_bytes<int32_t>(a))));
#else
  // The asm has the reason given in add_words.
  Bytes product;
  asm("vpbroadcastd %3, %1\n\tvpmaddubsw %1, %2, %1\n\tvpaddw %1, %0, %0"
      : "+x"(acc), "=&x"(product)
      : "x"(weights), "m"(*reinterpret_cast<const int32_t*>(a)));
  return acc;
#endif
}

inline Vec<float> int8_sums(Bytes acc) {
  return as_floats(kVnni ? acc : MOE_INT(madd_epi16)(acc, MOE_INT(set1_epi16)(1)));
}

// Returns the sum of a block's activations of 4-bit weights.
inline float block_sum(const Int8Block& block) {
  const int32_t o = block.offset;
  const int32_t all = kVnni ? o : static_cast<int16_t>(o & 0xffff) + (o >> 16);
  return static_cast<float>(all) * block.scale * -0.125f;
}

// With 32 registers, scaled sums stay in them from block to block, beside those in integers.
constexpr bool kKeepSums = MOE_VEC_BYTES == 64;
constexpr int kInt8Rows = kKeepSums ? 7 : 6;

template <class D, int M>
void int8_tile(const QuantTileParams& p) {
  constexpr int kBits = __is_same(D, Int8Codes) ? 8 : 4;
  constexpr int W = kLanes<float>, kSteps = 8 / kBits;
  const float *a = p.a, *scale = p.scale, *offset = D::kOffsets ? p.offset : nullptr;
  const uint32_t* words = p.words;
  float* c = p.out.c;
  const int64_t runs = p.runs, count = p.count, ldc = p.out.ldc;
  bool accumulate = p.out.accumulate;
  const char* next = p.prefetch;
  const int next_lines = static_cast<int>(p.prefetch_step);
  constexpr int kBlockWords = static_cast<int>(kQuantBlock) * kBits / 32;
  constexpr int kLines = 2 * MOE_VEC_BYTES / 64;  // of a word of all columns
  const auto* blocks = reinterpret_cast<const Int8Block*>(p.a_scale);
  const auto block_of = [&](int i) -> const Int8Block& {
    return *reinterpret_cast<const Int8Block*>(reinterpret_cast<const float*>(blocks) + i * kLda);
  };
  Vec<float> kept[M][2];
  if constexpr (kKeepSums) {
#pragma GCC unroll 32
    for (int i = 0; i < M; ++i) kept[i][0] = kept[i][1] = Vec<float>{};
  }
  const auto add = [&](int i, int v, Vec<float> sum) {
    float* out = c + i * ldc + v * W;
    store<float>(out, accumulate ? load<float>(out) + sum : sum);
  };
  // One scale multiplies the sums of int8 at the end.
  const bool scaled_last = kBits == 8 && runs == 1;
  for (int64_t run = 0; run < runs; ++run) {
    for (int64_t word = 0; word < count; word += kBlockWords) {
      Bytes acc[M][2];
#pragma GCC unroll 32
      for (int i = 0; i < M; ++i) acc[i][0] = acc[i][1] = MOE_INT(set1_epi32)(block_of(i).offset);
#pragma GCC unroll 8
      for (int k = 0; k < kBlockWords; ++k) {
#pragma GCC unroll 2
        for (int line = 0; line < kLines; ++line) {
          if (k * kLines + line >= next_lines) continue;
          __builtin_prefetch(next, 0, 2);
          next += 64;
        }
#pragma GCC unroll 2
        for (int step = 0; step < kSteps; ++step) {
          asm volatile("" ::: "memory");  // Reloads the words, see packed_tile.
          const Bytes b0 = word_uint8<D>(words, step);
          const Bytes b1 = word_uint8<D>(words + W, step);
#pragma GCC unroll 32
          for (int i = 0; i < M; ++i) {
            acc[i][0] = add_int8(acc[i][0], b0, a + i * kLda + step);
            acc[i][1] = add_int8(acc[i][1], b1, a + i * kLda + step);
          }
        }
        a += kSteps;
        words += 2 * W;
      }
#pragma GCC unroll 32
      for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          Vec<float> sum = int8_sums(acc[i][v]) * block_of(i).scale;
          if (kKeepSums && scaled_last) {
            kept[i][v] += sum;
          } else if constexpr (kKeepSums) {
            kept[i][v] += sum * load<float>(scale + v * W);
          } else {
            add(i, v, sum * load<float>(scale + v * W));
          }
        }
      }
      if constexpr (!kKeepSums) accumulate = true;
      if (offset != nullptr) {
#pragma GCC unroll 32
        for (int i = 0; i < M; ++i) {
          const Vec<float> sum = splat<float>(block_sum(block_of(i)));
#pragma GCC unroll 2
          for (int v = 0; v < 2; ++v) {
            const Vec<float> product = sum * load<float>(offset + v * W);
            if constexpr (kKeepSums) {
              kept[i][v] += product;
            } else {
              add(i, v, product);
            }
          }
        }
      }
      ++blocks;
    }
    scale += 2 * W;
    if (offset != nullptr) offset += 2 * W;
  }
  if constexpr (kKeepSums) {
#pragma GCC unroll 32
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        add(i, v, scaled_last ? kept[i][v] * load<float>(scale - 2 * W + v * W) : kept[i][v]);
      }
    }
  }
}
#endif
