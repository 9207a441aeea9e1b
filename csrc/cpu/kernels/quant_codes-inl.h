// Decoders of all formats of quantized weights to vectors of float32. Included by kernels-inl.h,
// inside its namespace, after quant_scales-inl.h.
//
// A decoder implements one format. Its kBlock steps of k lie together as kRunCount runs
// with a scale each; block(row, b) finds them, and value(block, run, i) is vector i of a run before
// scales. All indices but b are constants after unrolling, and what several values share is
// computed once. scales() are those of runs [first, last) of a row, and of more where they belong
// together; it may write them to two places with room for all of a row.
//   kPairs    two vectors hold the even and then the odd steps of a pair of vectors, as they come
//             out of bytes
//   kGroups   CodeRows::group says how many steps share a scale
//   kOffsets  weights have an offset, or may have
//   kRagged   rows end anywhere, not with a block

// Two codes a byte, the even step in the low nibble.
template <class Table>
struct NibblePairs {
  static constexpr int64_t kBlock = 32, kBytes = 16;
  static constexpr int kRunCount = 1;
  static constexpr bool kPairs = true, kRagged = false;
  static const uint8_t* block(const uint8_t* row, int64_t b) { return row + b * kBytes; }
  static inline Vec<float> value(const uint8_t* block, int, int i) {
    return nibbles<Table>(block, i / 2, i % 2 != 0);
  }
};

struct Int4Codes : NibblePairs<Signed4> {
  static constexpr bool kGroups = true, kOffsets = true;
  static RunScales scales(const CodeRows& rows, ScaleRuns how, int64_t row, int64_t first,
                          int64_t last, float* scales, float* offsets) {
    return group_scales(rows, how, row, first, last, scales, offsets);
  }
};

struct Mxfp4Codes : NibblePairs<TwiceE2m1> {
  static constexpr bool kGroups = false, kOffsets = false;
  // Returns half of 2^(e - 127), as values are twice those of e2m1; 255 gives NaN, and 0 a
  // subnormal number.
  static RunScales scales(const CodeRows& rows, ScaleRuns, int64_t row, int64_t first, int64_t last,
                          float* scales, float*) {
    constexpr int W = kLanes<float>;
    const uint8_t* exponents = static_cast<const uint8_t*>(rows.scale) + row * rows.ld_scale;
    int64_t i = first;
    for (; i + W <= last; i += W) {
      const Simd<float>::Int e = widen_bytes(exponents + i);
      const Simd<float>::Int bits = e == 0 ? 0x00400000 : e == 255 ? 0x7fc00000 : e << 23;
      store<float>(scales + i, __builtin_bit_cast(Vec<float>, bits) * 0.5f);
    }
    for (; i < last; ++i) {
      const uint32_t e = exponents[i];
      const uint32_t bits = e == 0 ? 0x00400000u : e == 255 ? 0x7fc00000u : e << 23;
      scales[i] = __builtin_bit_cast(float, bits) * 0.5f;
    }
    return {scales};
  }
};

// q4_K: 32 bytes hold the steps of one run in their low, and of the next in their upper nibbles.
struct Q4KCodes {
  static constexpr int64_t kBlock = 64, kBytes = 32;
  static constexpr int kRunCount = 2;
  static constexpr bool kPairs = false, kGroups = false, kOffsets = true, kRagged = false;
  static const uint8_t* block(const uint8_t* row, int64_t b) { return row + b * kBytes; }
  static inline Vec<float> value(const uint8_t* block, int run, int i) {
    constexpr int kParts = 16 / kLanes<float>;
    return nibbles<Unsigned4>(block + i / kParts * 16, i % kParts, run != 0);
  }
  static RunScales scales(const CodeRows& rows, ScaleRuns, int64_t row, int64_t first, int64_t last,
                          float* scales, float* offsets) {
    const uint8_t* records = static_cast<const uint8_t*>(rows.scale) + row * rows.ld_scale;
    int64_t i = first / 8;
    for (; i * 8 < last; ++i) q4k_scales(records + i * 16, scales + i * 8, offsets + i * 8);
    store<float>(offsets + i * 8, Vec<float>{});
    return {scales, offsets};
  }
};

// q6_K: a block is half of 256 codes. Four times 32 codes have their lower four bits in the low,
// then in the upper nibbles of 64 bytes, and the others, which 32 bytes have room for, pair by
// pair. A run is 16 codes.
struct Q6KCodes {
  static constexpr int64_t kBlock = 128, kBytes = 96;
  static constexpr int kRunCount = 8;
  static constexpr bool kPairs = false, kGroups = false, kOffsets = false, kRagged = false;
  struct Block {
    const uint8_t *low, *high;
  };
  static Block block(const uint8_t* row, int64_t b) {
    const uint8_t* whole = row + b / 2 * 192;
    return {whole + b % 2 * 64, whole + 128 + b % 2 * 32};
  }
#if defined(__AVX2__) && MOE_VEC_BYTES >= 32
  // Returns 32 codes minus 32.
  static inline __m256i quarter(Block block, int q) {
    const auto bytes = load_bytes<__m256i_u>(block.low + q % 2 * 32);
    const auto pairs = load_bytes<__m256i_u>(block.high);
    const __m256i low = q < 2 ? bytes : _mm256_srli_epi16(bytes, 4);
    const __m256i high =
        q < 2 ? _mm256_slli_epi16(pairs, 4 - 2 * q) : _mm256_srli_epi16(pairs, 2 * q - 4);
    const __m256i codes = _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi8(0x0f)),
                                          _mm256_and_si256(high, _mm256_set1_epi8(0x30)));
    return _mm256_sub_epi8(codes, _mm256_set1_epi8(32));
  }
  static inline Vec<float> value(Block block, int run, int i) {
    const __m256i codes = quarter(block, run / 2);
    return as_float(widen_part(
        run % 2 == 0 ? _mm256_castsi256_si128(codes) : _mm256_extracti128_si256(codes, 1), i));
  }
#else
  static inline Vec<float> value(Block block, int run, int i) {
    const int byte = run % 2 * 16 + i * kLanes<float>, shift = run / 2 * 2;
    const auto low = widen_bytes(block.low + run / 2 % 2 * 32 + byte);
    const auto high = widen_bytes(block.high + byte);
    const auto code = (run < 4 ? low & 15 : low >> 4) |
                      ((shift < 4 ? high << (4 - shift) : high >> (shift - 4)) & 0x30);
    return as_float(code - 32);
  }
#endif
  static RunScales scales(const CodeRows& rows, ScaleRuns, int64_t row, int64_t first, int64_t last,
                          float* scales, float*) {
    const uint8_t* records = static_cast<const uint8_t*>(rows.scale) + row * rows.ld_scale;
    for (int64_t i = first / 16; i * 16 < last; ++i) q6k_scales(records + i * 18, scales + i * 16);
    return {scales};
  }
};

// Runs of 16, two codes a byte, whose values come in order: pairs of vectors would hold two runs.
struct Nvfp4Codes {
  static constexpr int64_t kBlock = 16, kBytes = 8, kRunCount = 1;
  static constexpr bool kPairs = false, kGroups = false, kOffsets = false, kRagged = false;
  static const uint8_t* block(const uint8_t* row, int64_t b) { return row + b * kBytes; }
  static inline Vec<float> value(const uint8_t* block, int, int i) {
#if defined(__AVX2__) && MOE_VEC_BYTES >= 32
    const __m128i both = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(block));
    const __m128i codes = _mm_unpacklo_epi8(both, _mm_srli_epi16(both, 4)) & _mm_set1_epi8(15);
    const auto table = load_bytes<__m128i>(TwiceE2m1::kValues);
    return as_float(widen_part(_mm_shuffle_epi8(table, codes), i));
#else
    Simd<float>::Int v;
    const uint8_t* p = block + i * kLanes<float> / 2;
    for (int n = 0; n < kLanes<float>; ++n) v[n] = TwiceE2m1::kValues[p[n / 2] >> n % 2 * 4 & 15];
    return as_float(v);
#endif
  }
  // Half of e4m3 times the float of the row, as values are twice those of e2m1.
  static RunScales scales(const CodeRows& rows, ScaleRuns, int64_t row, int64_t first, int64_t last,
                          float* scales, float*) {
    const char* head = static_cast<const char*>(rows.scale) + row * rows.ld_scale;
    const float factor = load_bytes<float>(head) * 0.5f;
    widen_scales(reinterpret_cast<const E4m3*>(head + 4) + first, last - first, scales + first);
    for (int64_t i = first; i < last; ++i) scales[i] *= factor;
    return {scales};
  }
};

struct Int8Codes {
  static constexpr int64_t kBlock = 32, kBytes = 32;
  static constexpr int kRunCount = 1;
  static constexpr bool kPairs = false, kGroups = true, kOffsets = false, kRagged = true;
  static const int8_t* block(const uint8_t* row, int64_t b) {
    return reinterpret_cast<const int8_t*>(row) + b * kBytes;
  }
  static inline Vec<float> value(const int8_t* block, int, int i) {
    return as_float(widen_bytes(block + i * kLanes<float>));
  }
  static RunScales scales(const CodeRows& rows, ScaleRuns how, int64_t row, int64_t first,
                          int64_t last, float* scales, float* offsets) {
    return group_scales(rows, how, row, first, last, scales, offsets);
  }
};

struct Fp8Codes {
  static constexpr int64_t kBlock = kFp8Block, kBytes = kFp8Block;
  static constexpr int kRunCount = 1;
  static constexpr bool kPairs = false, kGroups = false, kOffsets = false, kRagged = true;
  static const E4m3* block(const uint8_t* row, int64_t b) {
    return reinterpret_cast<const E4m3*>(row) + b * kBytes;
  }
  static inline Vec<float> value(const E4m3* block, int, int i) {
    return load_as(block + i * kLanes<float>);
  }
  static RunScales scales(const CodeRows& rows, ScaleRuns, int64_t row, int64_t, int64_t, float*,
                          float*) {
    return {reinterpret_cast<const float*>(static_cast<const char*>(rows.scale) +
                                           row / rows.scale_rows * rows.ld_scale)};
  }
};

struct E4m3Codes {
  static constexpr int64_t kBlock = 32, kBytes = 32;
  static constexpr int kRunCount = 1;
  static constexpr bool kPairs = false, kGroups = true, kOffsets = false, kRagged = true;
  static const E4m3* block(const uint8_t* row, int64_t b) {
    return reinterpret_cast<const E4m3*>(row) + b * kBytes;
  }
  static inline Vec<float> value(const E4m3* block, int, int i) {
    return load_as(block + i * kLanes<float>);
  }
  static RunScales scales(const CodeRows& rows, ScaleRuns how, int64_t row, int64_t first,
                          int64_t last, float* scales, float* offsets) {
    return group_scales(rows, how, row, first, last, scales, offsets);
  }
};

// Like D, for sums along a row, which are NaN if a code is NaN: the scales are then NaN, and
// values need no test. They are 2^-8 of the weights, what float16 makes of the codes' bits.
template <class D>
struct E4m3Sums : D {
  static inline Vec<float> value(const E4m3* block, int, int i) {
    return e4m3_over_256(block + i * kLanes<float>);
  }
  static RunScales scales(const CodeRows& rows, ScaleRuns how, int64_t row, int64_t first,
                          int64_t last, float* scales, float* offsets) {
    const float* found = D::scales(rows, how, row, first, last, scales, offsets).scale;
    const auto* codes = static_cast<const uint8_t*>(rows.w) + row * rows.ldw;
    const float factor = has_e4m3_nan(codes, rows.k) ? __builtin_nanf("") : 256.0f;
    const int64_t end = ((last - 1) >> how.shift) + 1;
    for (int64_t i = first >> how.shift; i < end; ++i) scales[i] = found[i] * factor;
    return {scales};
  }
};
template <class D>
using Exact = D;

template <class D>
constexpr int64_t kRunSteps = D::kBlock / D::kRunCount;
template <class D>
constexpr int kRunVectors = static_cast<int>(kRunSteps<D> / kLanes<float>);

// Calls fn.template operator()<Decoder>() with the decoder of a format. Of: Exact or E4m3Sums.
template <template <class> class Of, class Fn>
inline void with_decoder(Codes codes, const Fn& fn) {
  switch (codes) {
    case Codes::kInt8:
      return fn.template operator()<Int8Codes>();
    case Codes::kInt4:
      return fn.template operator()<Int4Codes>();
    case Codes::kMxfp4:
      return fn.template operator()<Mxfp4Codes>();
    case Codes::kFp8:
      return fn.template operator()<Of<Fp8Codes>>();
    case Codes::kE4m3:
      return fn.template operator()<Of<E4m3Codes>>();
    case Codes::kQ4K:
      return fn.template operator()<Q4KCodes>();
    case Codes::kQ6K:
      return fn.template operator()<Q6KCodes>();
    case Codes::kNvfp4:
      return fn.template operator()<Nvfp4Codes>();
  }
}

template <class D>
inline ScaleRuns scale_runs(const CodeRows& rows) {
  if (!D::kGroups) return {};
  // One scale for a row of any length.
  if (rows.group % kRunSteps<D> != 0) return {62, 1};
  const int64_t runs = rows.group / kRunSteps<D>;
  if ((runs & (runs - 1)) != 0) return {0, runs};
  return {__builtin_ctzll(static_cast<unsigned long long>(runs)), 1};
}

// --- rows of float32

// Converts vectors of even and odd steps to vectors of consecutive steps, and back.
inline void interleave(Vec<float>& a, Vec<float>& b) {
  constexpr int W = kLanes<float>;
  Simd<float>::Int low, high;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    low[i] = i / 2 + i % 2 * W;
    high[i] = W / 2 + i / 2 + i % 2 * W;
  }
  const Vec<float> even = a, odd = b;
  a = shuffle(even, odd, low);
  b = shuffle(even, odd, high);
}
inline void deinterleave(Vec<float>& a, Vec<float>& b) {
  Simd<float>::Int even, odd;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<float>; ++i) {
    even[i] = 2 * i;
    odd[i] = 2 * i + 1;
  }
  const Vec<float> low = a, high = b;
  a = shuffle(low, high, even);
  b = shuffle(low, high, odd);
}

// Dequantizes a block of weights, steps of k in order.
template <class D, class Block>
inline __attribute__((always_inline)) void dequantize_block(const Block& block, int64_t b,
                                                            const RunScales& s, int shift,
                                                            float* dst) {
  constexpr int W = kLanes<float>, V = kRunVectors<D>;
#pragma GCC unroll 8
  for (int run = 0; run < D::kRunCount; ++run) {
    const int64_t entry = (b * D::kRunCount + run) >> shift;
    const Vec<float> scale = splat<float>(s.scale[entry]);
    const bool shifted = D::kOffsets && s.offset != nullptr;
    const Vec<float> offset = splat<float>(shifted ? s.offset[entry] : 0.0f);
    Vec<float> w[V];
#pragma GCC unroll 32
    for (int i = 0; i < V; ++i) {
      w[i] = add_one_of<float, 1>(offset, D::value(block, run, i), scale);
    }
#pragma GCC unroll 32
    for (int i = 0; i < V; ++i) {
      if (D::kPairs && i % 2 == 0) interleave(w[i], w[i + 1]);
      store<float>(dst + run * kRunSteps<D> + i * W, w[i]);
    }
  }
}

// A block with the first `n` of its steps, of codes that lie one after the other, and zeros.
template <class D>
struct CodesTail {
  uint8_t bytes[D::kBytes] = {};
  CodesTail(const uint8_t* row, int64_t b, int64_t n) {
    __builtin_memcpy(bytes, row + b * D::kBytes, n * D::kBytes / D::kBlock);
  }
};

template <class D>
void dequantize_row(const DequantParams& p) {
  const ScaleRuns how = scale_runs<D>(p.rows);
  const int64_t end = p.k0 + p.n, runs_end = (end + kRunSteps<D> - 1) / kRunSteps<D>;
  const RunScales s = D::scales(p.rows, how, p.row, p.k0 / kRunSteps<D>, runs_end, p.scratch,
                                p.scratch + decoded_scratch(p.rows.k) / 2);
  const auto* row = static_cast<const uint8_t*>(p.rows.w) + p.row * p.rows.ldw;
  for (int64_t k = p.k0, b = p.k0 / D::kBlock; k < end; ++b) {
    const int64_t first = b * D::kBlock, left = p.rows.k - first;
    const int64_t last = first + D::kBlock < end ? first + D::kBlock : end;
    float* dst = p.dst + (k - p.k0);
    float part[D::kBlock];
    const bool whole = last - k == D::kBlock;
    float* block = whole ? dst : part;
    if (!D::kRagged || left >= D::kBlock) {
      dequantize_block<D>(D::block(row, b), b, s, how.shift, block);
    } else if constexpr (D::kRagged) {
      const CodesTail<D> tail(row, b, left);
      dequantize_block<D>(D::block(tail.bytes, 0), b, s, how.shift, block);
    }
    if (!whole) __builtin_memcpy(dst, part + (k - first), (last - k) * sizeof(float));
    k = last;
  }
}

void dequantize(const DequantParams& p) {
  with_decoder<Exact>(p.rows.codes, [&]<class D>() { dequantize_row<D>(p); });
}
