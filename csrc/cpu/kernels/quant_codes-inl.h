// Codes of all formats of few bits, and their scales, as vectors of float32. Included by
// kernels-inl.h, inside its namespace.
//
// A decoder is what tells the formats apart. Its kBlock steps of k lie together as kRunCount runs
// with a scale each; block(row, b) finds them, and value(block, run, i) is vector i of a run before
// scales. With kPairs two vectors hold the even and then the odd steps of a pair of vectors, as
// they come out of bytes. All indices but b are constants after unrolling.

// As many bytes as a vector has lanes, in 32 bits each.
inline Simd<float>::Int widen_bytes(const uint8_t* p) {
  using F = Simd<float>;
#if defined(__AVX512F__) && MOE_VEC_BYTES == 64
  return __builtin_bit_cast(F::Int, _mm512_cvtepu8_epi32(load_bytes<__m128i_u>(p)));
#elif defined(__AVX2__) && MOE_VEC_BYTES == 32
  return __builtin_bit_cast(
      F::Int, _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  F::Int v;
  for (int i = 0; i < F::kLanes; ++i) v[i] = p[i];
  return v;
#endif
}

inline Simd<float>::Int widen_bytes(const int8_t* p) {
  using F = Simd<float>;
#if defined(__AVX512F__) && MOE_VEC_BYTES == 64
  return __builtin_bit_cast(F::Int, _mm512_cvtepi8_epi32(load_bytes<__m128i_u>(p)));
#elif defined(__AVX2__) && MOE_VEC_BYTES == 32
  return __builtin_bit_cast(
      F::Int, _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  F::Int v;
  for (int i = 0; i < F::kLanes; ++i) v[i] = p[i];
  return v;
#endif
}

inline Vec<float> as_float(Simd<float>::Int v) { return __builtin_convertvector(v, Vec<float>); }

// What the 16 codes of 4 bits stand for. e2m1 twice: 0, 0.5, 1, 1.5, 2, 3, 4 and 6 with a sign.
struct Unsigned4 {
  static constexpr int8_t kValues[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
};
struct Signed4 {
  static constexpr int8_t kValues[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
};
struct TwiceE2m1 {
  static constexpr int8_t kValues[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
};

// The values of the low or upper nibbles of as many bytes as a vector has lanes.
template <class Table>
inline Vec<float> nibbles(const uint8_t* p, bool upper) {
#if defined(__AVX512F__) && MOE_VEC_BYTES == 64
  // Of an index the low four bits count.
  const Vec<float> table = as_float(widen_bytes(Table::kValues));
  const auto codes = widen_bytes(p);
  return __builtin_bit_cast(
      Vec<float>, _mm512_permutexvar_ps(__builtin_bit_cast(__m512i, upper ? codes >> 4 : codes),
                                        __builtin_bit_cast(__m512, table)));
#elif defined(__AVX2__) && MOE_VEC_BYTES == 32
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  const __m128i codes = _mm_and_si128(upper ? _mm_srli_epi16(bytes, 4) : bytes, _mm_set1_epi8(15));
  const __m128i values = _mm_shuffle_epi8(load_bytes<__m128i>(Table::kValues), codes);
  return __builtin_bit_cast(Vec<float>, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(values)));
#else
  Simd<float>::Int v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = Table::kValues[upper ? p[i] >> 4 : p[i] & 15];
  return as_float(v);
#endif
}

// Two codes a byte, the even step in the low nibble.
template <class Table>
struct NibblePairs {
  static constexpr int64_t kBlock = 32, kBytes = 16;
  static constexpr int kRunCount = 1;
  static constexpr bool kPairs = true;
  static const uint8_t* block(const uint8_t* row, int64_t b) { return row + b * kBytes; }
  static inline Vec<float> value(const uint8_t* block, int, int i) {
    return nibbles<Table>(block + i / 2 * kLanes<float>, i % 2 != 0);
  }
};

// q4_K: 32 bytes hold the steps of one run in their low, and of the next in their upper nibbles.
struct Q4KCodes {
  static constexpr int64_t kBlock = 64, kBytes = 32;
  static constexpr int kRunCount = 2;
  static constexpr bool kPairs = false;
  static const uint8_t* block(const uint8_t* row, int64_t b) { return row + b * kBytes; }
  static inline Vec<float> value(const uint8_t* block, int run, int i) {
    return nibbles<Unsigned4>(block + i * kLanes<float>, run != 0);
  }
};

// q6_K: a block is half of 256 codes. Four runs of 32 have their lower four bits in the low, then
// in the upper nibbles of 64 bytes, and the others, which 32 bytes have room for, pair by pair.
struct Q6KCodes {
  static constexpr int64_t kBlock = 128, kBytes = 96;
  static constexpr int kRunCount = 8;
  static constexpr bool kPairs = false;
  struct Block {
    const uint8_t *low, *high;
  };
  static Block block(const uint8_t* row, int64_t b) {
    const uint8_t *whole = row + b / 2 * 192, half = b % 2;
    return {whole + half * 64, whole + 128 + half * 32};
  }
  static inline Vec<float> value(Block block, int run, int i) {
    const int byte = run % 2 * 16 + i * kLanes<float>, shift = run / 2 * 2;
    const auto low = widen_bytes(block.low + run / 2 % 2 * 32 + byte);
    const auto high = widen_bytes(block.high + byte);
    const auto code = (run < 4 ? low & 15 : low >> 4) |
                      ((shift < 4 ? high << (4 - shift) : high >> (shift - 4)) & 0x30);
    return as_float(code - 32);
  }
};

struct Int8Codes {
  static constexpr int64_t kBlock = 32, kBytes = 32;
  static constexpr int kRunCount = 1;
  static constexpr bool kPairs = false;
  static const int8_t* block(const uint8_t* row, int64_t b) {
    return reinterpret_cast<const int8_t*>(row) + b * kBytes;
  }
  static inline Vec<float> value(const int8_t* block, int, int i) {
    return as_float(widen_bytes(block + i * kLanes<float>));
  }
};

struct Fp8Codes {
  static constexpr int64_t kBlock = kFp8Block, kBytes = kFp8Block;
  static constexpr int kRunCount = 1;
  static constexpr bool kPairs = false;
  static const E4m3* block(const uint8_t* row, int64_t b) {
    return reinterpret_cast<const E4m3*>(row) + b * kBytes;
  }
  static inline Vec<float> value(const E4m3* block, int, int i) {
    return load_as(block + i * kLanes<float>);
  }
};

template <class D>
constexpr int64_t kRunSteps = D::kBlock / D::kRunCount;
template <class D>
constexpr int kRunVectors = static_cast<int>(kRunSteps<D> / kLanes<float>);

// fn.template operator()<Decoder>() for the decoder of a format.
template <class Fn>
inline void with_decoder(Codes codes, const Fn& fn) {
  switch (codes) {
    case Codes::kInt8:
      return fn.template operator()<Int8Codes>();
    case Codes::kInt4:
      return fn.template operator()<NibblePairs<Signed4>>();
    case Codes::kMxfp4:
      return fn.template operator()<NibblePairs<TwiceE2m1>>();
    case Codes::kFp8:
      return fn.template operator()<Fp8Codes>();
    case Codes::kQ4K:
      return fn.template operator()<Q4KCodes>();
    case Codes::kQ6K:
      return fn.template operator()<Q6KCodes>();
  }
}

// --- scales

// A weight is value * scale[r >> shift] + offset[r >> shift] in run r of its row. Offsets, if there
// are any, are zero behind the last run, up to a whole vector.
struct RunScales {
  const float *scale, *offset;
};

// How many runs share a scale: a power of two, or it is repeated for each of `repeat` runs.
struct ScaleRuns {
  int shift = 0;
  int64_t repeat = 1;
};

template <class D>
inline ScaleRuns scale_runs(const CodeRows& rows) {
  if (rows.codes != Codes::kInt8 && rows.codes != Codes::kInt4) return {};
  // One scale for a row of any length.
  if (rows.group % kRunSteps<D> != 0) return {62, 1};
  const int64_t runs = rows.group / kRunSteps<D>;
  if ((runs & (runs - 1)) != 0) return {0, runs};
  return {__builtin_ctzll(static_cast<unsigned long long>(runs)), 1};
}

inline bool has_offsets(const CodeRows& rows) {
  return rows.codes == Codes::kQ4K || rows.zero != nullptr;
}

template <class S>
inline void widen_scales(const S* src, int64_t n, float* dst) {
  int64_t i = 0;
  for (; i + kLanes<float> <= n; i += kLanes<float>) store<float>(dst + i, load_as(src + i));
  for (; i < n; ++i) dst[i] = to_float(src[i]);
}

// Groups of codes of 8 and 4 bits; entries [first, last).
inline RunScales group_scales(const CodeRows& rows, int64_t row, int64_t repeat, int64_t first,
                              int64_t last, float* scales, float* offsets) {
  const auto* src = static_cast<const char*>(rows.scale) + row * rows.ld_scale;
  const float* found = scales;
  if (repeat == 1 && rows.scale_type == ScaleType::kFloat32) {
    found = reinterpret_cast<const float*>(src);
  } else {
    with_type<float>(rows.scale_type == ScaleType::kFloat32    ? DType::kFloat32
                     : rows.scale_type == ScaleType::kBFloat16 ? DType::kBFloat16
                                                               : DType::kFloat16,
                     src, [&]<class S>(const S* s) {
                       if (repeat == 1)
                         return widen_scales(s + first, last - first, scales + first);
                       for (int64_t i = first; i < last; ++i) scales[i] = to_float(s[i / repeat]);
                     });
  }
  if (rows.zero == nullptr) return {found, nullptr};
  const uint8_t* zero = rows.zero + row * rows.ld_zero;
  for (int64_t i = first; i < last; ++i) {
    offsets[i] = static_cast<float>(8 - zero[repeat == 1 ? i : i / repeat]) * found[i];
  }
  store<float>(offsets + last, Vec<float>{});
  return {found, offsets};
}

// Half of 2^(e - 127), as values are twice those of e2m1; 255 is NaN, and of 0 a subnormal number.
inline void mxfp4_scales(const uint8_t* exponents, int64_t first, int64_t last, float* scales) {
  for (int64_t i = first; i < last; ++i) {
    const uint32_t e = exponents[i];
    const uint32_t bits = e == 0 ? 0x00400000u : e == 255 ? 0x7fc00000u : e << 23;
    scales[i] = __builtin_bit_cast(float, bits) * 0.5f;
  }
}

// A record of 8 runs: d and dmin in float16, then 8 scales and 8 minima of 6 bits in 12 bytes.
// Those of the last four runs have their upper two bits in the bytes of the first four.
inline void q4k_scales(const uint8_t* record, float* scales, float* offsets) {
  const float d = to_float(load_bytes<Fp16>(record));
  const float low = -to_float(load_bytes<Fp16>(record + 2));
  const auto a = load_bytes<uint32_t>(record + 4), b = load_bytes<uint32_t>(record + 8),
             c = load_bytes<uint32_t>(record + 12);
  const uint32_t words[4] = {a & 0x3f3f3f3fu, (c & 0x0f0f0f0fu) | (a >> 2 & 0x30303030u),
                             b & 0x3f3f3f3fu, (c >> 4 & 0x0f0f0f0fu) | (b >> 2 & 0x30303030u)};
  uint8_t bytes[16];
  __builtin_memcpy(bytes, words, sizeof(bytes));
  for (int i = 0; i < 8; ++i) scales[i] = static_cast<float>(bytes[i]) * d;
  for (int i = 0; i < 8; ++i) offsets[i] = static_cast<float>(bytes[8 + i]) * low;
}

// A record of 16 runs: their scales in int8, then d in float16.
inline void q6k_scales(const uint8_t* record, float* scales) {
  const float d = to_float(load_bytes<Fp16>(record + 16));
  int8_t steps[16];
  __builtin_memcpy(steps, record, sizeof(steps));
  for (int i = 0; i < 16; ++i) scales[i] = static_cast<float>(steps[i]) * d;
}

// Those of runs [first, last) of a row, and of more where they belong together; `scratch` is
// decoded_scratch(k) floats.
template <class D>
inline RunScales run_scales(const CodeRows& rows, ScaleRuns how, int64_t row, int64_t first,
                            int64_t last, int64_t k, float* scratch) {
  float *scales = scratch, *offsets = scratch + decoded_scratch(k) / 2;
  const auto* src = static_cast<const uint8_t*>(rows.scale) + row / rows.scale_rows * rows.ld_scale;
  switch (rows.codes) {
    case Codes::kInt8:
    case Codes::kInt4:
      return group_scales(rows, row, how.repeat, first >> how.shift, ((last - 1) >> how.shift) + 1,
                          scales, offsets);
    case Codes::kFp8:
      return {reinterpret_cast<const float*>(src), nullptr};
    case Codes::kMxfp4:
      mxfp4_scales(src, first, last, scales);
      return {scales, nullptr};
    case Codes::kQ4K:
      for (int64_t i = first / 8; i * 8 < last; ++i) {
        q4k_scales(src + i * 16, scales + i * 8, offsets + i * 8);
      }
      store<float>(offsets + (last + 7) / 8 * 8, Vec<float>{});
      return {scales, offsets};
    case Codes::kQ6K:
      for (int64_t i = first / 16; i * 16 < last; ++i) q6k_scales(src + i * 18, scales + i * 16);
      return {scales, nullptr};
  }
  return {};
}

// --- rows of float32

// The vectors of even and of odd steps as those of consecutive ones, and back.
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

// A block of weights, steps of k in order.
template <class D, class Block>
inline __attribute__((always_inline)) void dequantise_block(const Block& block, int64_t b,
                                                            const RunScales& s, int shift,
                                                            float* dst) {
  constexpr int W = kLanes<float>, V = kRunVectors<D>;
#pragma GCC unroll 8
  for (int run = 0; run < D::kRunCount; ++run) {
    const int64_t entry = (b * D::kRunCount + run) >> shift;
    const Vec<float> scale = splat<float>(s.scale[entry]);
    const Vec<float> offset = splat<float>(s.offset != nullptr ? s.offset[entry] : 0.0f);
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
void dequantise_row(const DequantParams& p) {
  const ScaleRuns how = scale_runs<D>(p.rows);
  const int64_t end = p.k0 + p.n, runs_end = (end + kRunSteps<D> - 1) / kRunSteps<D>;
  const RunScales s =
      run_scales<D>(p.rows, how, p.row, p.k0 / kRunSteps<D>, runs_end, p.k, p.scratch);
  const auto* row = static_cast<const uint8_t*>(p.rows.w) + p.row * p.rows.ldw;
  for (int64_t k = p.k0, b = p.k0 / D::kBlock; k < end; ++b) {
    const int64_t first = b * D::kBlock, left = p.k - first;
    const int64_t last = first + D::kBlock < end ? first + D::kBlock : end;
    float* dst = p.dst + (k - p.k0);
    float part[D::kBlock];
    const bool whole = last - k == D::kBlock;
    float* block = whole ? dst : part;
    if (left >= D::kBlock) {
      dequantise_block<D>(D::block(row, b), b, s, how.shift, block);
    } else {
      const CodesTail<D> tail(row, b, left);
      dequantise_block<D>(D::block(tail.bytes, 0), b, s, how.shift, block);
    }
    if (!whole) __builtin_memcpy(dst, part + (k - first), (last - k) * sizeof(float));
    k = last;
  }
}

void dequantise(const DequantParams& p) {
  with_decoder(p.rows.codes, [&]<class D>() { dequantise_row<D>(p); });
}
