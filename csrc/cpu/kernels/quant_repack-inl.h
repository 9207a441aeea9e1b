// Weights of 8 and 4 bits repacked into panels of 32-bit words, and the tiles that unpack them to
// fp32 or to int16. Included by kernels-inl.h, inside its namespace; NOTES.md has the arithmetic.

// kRun bytes of each of as many rows as a vector has lanes of 32 bits: word j of all rows goes to
// dst[j * 2 * lanes].
#if MOE_VEC_BYTES == 64
constexpr int64_t kRun = 32;  // Half a vector: two rows fill one as they are loaded.
inline void words_of_rows(const uint8_t* const* rows, int64_t offset, uint32_t flip,
                          uint32_t* dst) {
  constexpr int W = 16;
  const Bytes flips = _mm512_set1_epi32(static_cast<int32_t>(flip));
  const auto half = [&](int i) { return load_bytes<__m256i_u>(rows[i] + offset); };
  Bytes v[8];
  // Takes lanes 0 and 1 of each half: words 0 to 3 and 4 to 7 of a row.
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    v[i] = _mm512_inserti64x4(_mm512_castsi256_si512(half(i)), half(8 + i), 1) ^ flips;
  }
  Bytes two[8];  // words of two rows
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    two[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    two[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  const __m512i first = {0, 1, 8, 9, 4, 5, 12, 13}, second = {2, 3, 10, 11, 6, 7, 14, 15};
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const int i = j / 2;
    const Bytes a = j % 2 == 0 ? _mm512_unpacklo_epi64(two[i], two[2 + i])
                               : _mm512_unpackhi_epi64(two[i], two[2 + i]);
    const Bytes b = j % 2 == 0 ? _mm512_unpacklo_epi64(two[4 + i], two[6 + i])
                               : _mm512_unpackhi_epi64(two[4 + i], two[6 + i]);
    _mm512_storeu_si512(dst + j * 2 * W, _mm512_permutex2var_epi64(a, first, b));
    _mm512_storeu_si512(dst + (4 + j) * 2 * W, _mm512_permutex2var_epi64(a, second, b));
  }
}
#else
constexpr int64_t kRun = MOE_VEC_BYTES;
inline void words_of_rows(const uint8_t* const* rows, int64_t offset, uint32_t flip,
                          uint32_t* dst) {
  using Words = Simd<float>::Uint;
  const auto row = [&](int f) {
    return __builtin_bit_cast(Vec<float>, load_bytes<Words>(rows[f] + offset) ^ flip);
  };
  transpose_block<float>(row, reinterpret_cast<float*>(dst), 2 * kLanes<float>);
}
#endif

// A flip of the upper bit of each weight converts two's complement to q plus a bias, or back.
void repack(const RepackParams& p, uint32_t* dst) {
  constexpr int W = kLanes<float>, P = 2 * W;
  const uint32_t flip = !p.flip ? 0 : p.bits == 4 ? 0x88888888u : 0x80808080u;
  const int64_t first = p.k0 * p.bits / 8, end = ((p.k0 + p.n) * p.bits + 7) / 8;
  for (int f0 = 0; f0 < P; f0 += W) {
    const uint8_t* rows[W];
    for (int64_t f = f0; f < f0 + W; ++f) {
      rows[f - f0] =
          static_cast<const uint8_t*>(p.w) + (f < p.features ? f : p.features - 1) * p.ldw;
    }
    uint32_t* out = dst + f0;
    int64_t c = first;
    for (; c + kRun <= end; c += kRun, out += kRun / 4 * P) words_of_rows(rows, c, flip, out);
    if (c < end) {
      uint8_t tails[W][kRun] = {};
      for (int f = 0; f < W; ++f) {
        __builtin_memcpy(tails[f], rows[f] + c, end - c);
        rows[f] = tails[f];
      }
      words_of_rows(rows, 0, flip, out);
    }
  }
}

// Returns the weight i of each word. Shifts need none of the ports that multiply.
template <int kBits>
inline Vec<float> word_weights(const uint32_t* words, int i) {
  typedef int32_t Unaligned __attribute__((vector_size(MOE_VEC_BYTES), aligned(1), may_alias));
  const Simd<float>::Int word = *reinterpret_cast<const Unaligned*>(words);
  const auto weight = (word << (32 - kBits - kBits * i)) >> (32 - kBits);
  return __builtin_convertvector(weight, Vec<float>);
}

#if defined(__AVX2__) && MOE_VEC_BYTES >= 32
// Widens weights i and i + 2 of 8 bits to integers of 16 bits.
inline Bytes word_int16(const uint32_t* words, int i) {
  const Bytes word = load_weights(words);
  return MOE_INT(srai_epi16)(i == 1 ? word : MOE_INT(slli_epi16)(word, 8), 8);
}

// A block of tokens as integers of 16 bits, in the order of word_int16. The scale, a vector of
// float apart from the last code, is that of the block.
[[maybe_unused]] void quantize_int16(int64_t n, const float* x, float* dst) {
  constexpr int W = kLanes<float>;
  constexpr float kMost = 32767;
  Int16 order;
  for (int i = 0; i < W; ++i) order[i] = i / 4 * 4 + i % 4 / 2 + i % 2 * 2;
  Vec<float> probe = {};
  const float most = largest(x, n, probe), bad = horizontal_sum<float>(probe);
  // So small that the quotient would not be finite: zeros.
  const bool usable = most >= 1e-30f && bad == 0.0f;
  dst[kKc] = usable ? most / kMost : bad;
  const float inverse = kMost / most;
  for (int64_t i = 0; i < n; i += W) {
    const Int16 codes = usable ? int16_of(nearest(load<float>(x + i), inverse)) : Int16{};
    const Int16 ordered = shuffle(codes, order);
    __builtin_memcpy(dst + i / 2, &ordered, sizeof(ordered));
  }
}
#endif

// Two integers of 16 bits as an element of a.
struct Int16Pair {
  uint32_t bits;
};

inline Vec<float> sum_of(float) { return Vec<float>{}; }
inline Vec<float> to_floats(Vec<float> v) { return v; }
template <int kBits>
inline Vec<float> word_step(float, const uint32_t* words, int i) {
  return word_weights<kBits>(words, i);
}
inline Vec<float> add_step(float, Vec<float> acc, const float* a, Vec<float> b) {
  return add_product<float, float>(acc, a, b);
}
#if defined(__AVX2__) && MOE_VEC_BYTES >= 32
inline Bytes sum_of(Int16Pair) { return Bytes{}; }
inline Vec<float> to_floats(Bytes v) { return as_floats(v); }
template <int kBits>
inline Bytes word_step(Int16Pair, const uint32_t* words, int i) {
  static_assert(kBits == 8, "4 bits meet activations of 8 bits: quant_int8-inl.h");
  return word_int16(words, i);
}
inline Bytes add_step(Int16Pair, Bytes acc, const float* a, Bytes b) {
  return add_words(acc, MOE_INT(set1_epi32)(load_bytes<int32_t>(a)), b);
}
#endif

// Like packed_tile, but unpacks words on the fly. S = float or Int16Pair.
template <int kBits, class S, int M>
void word_tile(const QuantTileParams& p) {
  constexpr int W = kLanes<float>;
  const float *a = p.a, *scale = p.scale;
  [[maybe_unused]] const float* a_scale = p.a_scale;
  const uint32_t* words = p.words;
  float* c = p.out.c;
  const int64_t runs = p.runs, count = p.count, ldc = p.out.ldc, next_step = p.prefetch_step;
  bool accumulate = p.out.accumulate;
  const char* next = p.prefetch;
  constexpr bool kInt16 = __is_same(S, Int16Pair);
  constexpr int kSteps = 32 / kBits / (kInt16 ? 2 : 1);  // elements of a for a word
  constexpr int kLines = 2 * MOE_VEC_BYTES < 64 ? 1 : 2 * MOE_VEC_BYTES / 64;
  using Sum = __typeof__(sum_of(S{}));
  const auto add = [&](int i, int v, Vec<float> sum) {
    float* out = c + i * ldc + v * W;
    if constexpr (kInt16) sum *= a_scale[i * kLda];
    store<float>(out, accumulate ? load<float>(out) + sum : sum);
  };
  for (int64_t run = 0; run < runs; ++run) {
    Sum acc[M][2];
#pragma GCC unroll 32
    for (int i = 0; i < M; ++i) acc[i][0] = acc[i][1] = Sum{};
    for (int64_t k = 0; k < count; ++k) {
#pragma GCC unroll 2
      for (int line = 0; line < kLines; ++line) {
        __builtin_prefetch(next, 0, 2);
        next += next_step;
      }
#pragma GCC unroll 8
      for (int step = 0; step < kSteps; ++step) {
        asm volatile("" ::: "memory");  // Reloads the words, see packed_tile.
        const Sum b0 = word_step<kBits>(S{}, words, step);
        const Sum b1 = word_step<kBits>(S{}, words + W, step);
#pragma GCC unroll 32
        for (int i = 0; i < M; ++i) {
          acc[i][0] = add_step(S{}, acc[i][0], a + i * kLda + step, b0);
          acc[i][1] = add_step(S{}, acc[i][1], a + i * kLda + step, b1);
        }
      }
      a += kSteps;
      words += 2 * W;
    }
    const Vec<float> s[2] = {load<float>(scale), load<float>(scale + W)};
    scale += 2 * W;
#pragma GCC unroll 32
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) add(i, v, to_floats(acc[i][v]) * s[v]);
    }
    accumulate = true;
  }
}

// 8 rows are 16 sums, enough for the latency of any target; of 28 some went to the stack.
constexpr int kInt16Rows = MOE_MR2 < 8 ? MOE_MR2 : 8;

QuantKernels quant_table() {
  QuantKernels k = {};
  k.w8_row_bytes = &w8_row_bytes;
  k.w8_quantize = &w8_quantize;
  k.w8_dot = &w8_dot;
  k.w8_features = kW8Features;
  k.w4_row_bytes = &w4_row_bytes;
  k.w4_quantize = &w4_quantize;
  k.w4_dot = &w4_dot;
  k.w8_grouped_dot = &w8_grouped_dot;
  k.w4_scales = &w4_scales;
  k.repack = &repack;
  k.dequantize = &dequantize;
  k.arranged_floats = &arranged_floats;
  k.arrange_token = &arrange_token;
  k.decoded_dot = &decoded_dot;
#if defined(__AVX512BF16__) && MOE_VEC_BYTES == 64
  k.e4m3_arrange = &e4m3_arrange;
  k.e4m3_dot = &e4m3_dot;
#endif
  for_each_count<MOE_MR2>([&]<int M>() {
    k.tile[0][M - 1] = &word_tile<8, float, M>;
    if constexpr (kVec < 32) k.tile[1][M - 1] = &word_tile<4, float, M>;
  });
#if defined(__AVX2__) && MOE_VEC_BYTES >= 32
  k.quantize_int8 = &quantize_int8;
  k.int8_rows = kInt8Rows;
  for_each_count<kInt8Rows>([&]<int M>() {
    k.int8_tile[1][M - 1] = &int8_tile<Int4Codes, M>;
    k.int8_tile[2][M - 1] = &int8_tile<Mxfp4Codes, M>;
  });
  k.w4_max_rows = MOE_DOT_TOKENS;
  if constexpr (kVnni) {
    for_each_count<kInt8Rows>([&]<int M>() { k.int8_tile[0][M - 1] = &int8_tile<Int8Codes, M>; });
    k.w8_min_depth_per_row = 160;
    k.w8_max_rows = 6;
  } else {
    k.quantize_int16 = &quantize_int16;
    k.int16_rows = kInt16Rows;
    for_each_count<kInt16Rows>([&]<int M>() { k.int16_tile[M - 1] = &word_tile<8, Int16Pair, M>; });
    k.w8_min_depth_per_row = MOE_VEC_BYTES == 64 ? 80 : 240;
    k.w8_max_rows = 24;
  }
#endif
  return k;
}
