// The text of every inner loop, compiled once per instruction set. The including file defines
// MOE_ISA (a namespace name), MOE_VEC_BYTES, MOE_MR1, MOE_MR2, MOE_DOT_TOKENS, MOE_DOT_MAX_ROWS.
//
// GNU vector types carry the arithmetic, so one text serves SSE2, AVX2, AVX-512 and NEON;
// intrinsics appear only where the compiler has no good lowering (half conversion, transposes).
// Nothing here may have external linkage or include a header with inline functions: see
// CMakeLists.txt.

#include <stdint.h>

#if defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

#include "cpu/kernels.h"

namespace moe_ops::cpu::MOE_ISA {
namespace {

// --- vectors

template <class T>
struct Simd;

template <>
struct Simd<float> {
  static constexpr int kLanes = MOE_VEC_BYTES / 4;
  typedef float Vec __attribute__((vector_size(MOE_VEC_BYTES)));
  typedef int32_t Int __attribute__((vector_size(MOE_VEC_BYTES)));
  typedef float Unaligned __attribute__((vector_size(MOE_VEC_BYTES), aligned(4), may_alias));
  typedef uint16_t Half __attribute__((vector_size(MOE_VEC_BYTES / 2)));
  typedef uint16_t HalfUnaligned
      __attribute__((vector_size(MOE_VEC_BYTES / 2), aligned(2), may_alias));
  typedef uint32_t Uint __attribute__((vector_size(MOE_VEC_BYTES)));
};

template <>
struct Simd<double> {
  static constexpr int kLanes = MOE_VEC_BYTES / 8;
  typedef double Vec __attribute__((vector_size(MOE_VEC_BYTES)));
  typedef int64_t Int __attribute__((vector_size(MOE_VEC_BYTES)));
  typedef double Unaligned __attribute__((vector_size(MOE_VEC_BYTES), aligned(8), may_alias));
};

template <class T>
using Vec = typename Simd<T>::Vec;
template <class T>
constexpr int kLanes = Simd<T>::kLanes;

template <class T>
inline Vec<T> splat(T v) {
  return v - Vec<T>{};  // v - 0 keeps the sign of zero
}

template <class T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::Unaligned*>(p);
}

template <class T>
inline void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename Simd<T>::Unaligned*>(p) = v;
}

// Element types in memory. Half types are bit patterns.
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

// Two bfloat16 of adjacent k in the bits of one float.
struct Pair {
  uint32_t bits;
};

template <class S>
constexpr bool kIsBf16 = false;
template <>
constexpr bool kIsBf16<Bf16> = true;

inline float to_float(Bf16 v) { return __builtin_bit_cast(float, uint32_t{v.bits} << 16); }

inline float to_float(Fp16 v) {
  // Shift exponent and mantissa into place, then let one multiplication by 2^112 rebias the
  // exponent: it is exact and also normalises subnormals.
  const uint32_t magnitude = v.bits & 0x7fffu;
  float f = __builtin_bit_cast(float, magnitude << 13) * __builtin_bit_cast(float, 0x77800000u);
  uint32_t u = __builtin_bit_cast(uint32_t, f);
  if (magnitude >= 0x7c00u) u |= 0x7f800000u;  // infinity and NaN
  return __builtin_bit_cast(float, u | (uint32_t{v.bits} & 0x8000u) << 16);
}

inline float to_float(float v) { return v; }
inline double to_float(double v) { return v; }

inline Bf16 to_bf16(float f) {
  const uint32_t u = __builtin_bit_cast(uint32_t, f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(u >> 16 | 0x40u)};
  return {static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16)};
}

inline Fp16 to_fp16(float f) {
  const uint32_t u = __builtin_bit_cast(uint32_t, f);
  const uint32_t sign = u >> 16 & 0x8000u;
  const uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (a >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to 65536 or more
  if (a < 0x38800000u) {
    // Subnormal: adding 0.5 aligns the mantissa so that the hardware rounds to nearest even.
    const float shifted = __builtin_bit_cast(float, a) + 0.5f;
    const uint32_t m = __builtin_bit_cast(uint32_t, shifted) - 0x3f000000u;
    return {static_cast<uint16_t>(sign | m)};
  }
  const uint32_t rounded = a + 0xfffu + (a >> 13 & 1u) - 0x38000000u;
  return {static_cast<uint16_t>(sign | rounded >> 13)};
}

template <class S>
inline Vec<float> load_as(const S* p) {
  using F = Simd<float>;
  if constexpr (sizeof(S) == 4) {
    return load<float>(reinterpret_cast<const float*>(p));
  } else {
    const auto half = *reinterpret_cast<const F::HalfUnaligned*>(p);
    if constexpr (kIsBf16<S>) {
      const F::Uint wide = __builtin_convertvector(half, F::Uint) << 16;
      return __builtin_bit_cast(Vec<float>, wide);
    } else {
#if defined(__AVX512F__) && MOE_VEC_BYTES == 64
      return __builtin_bit_cast(Vec<float>,
                                _mm512_cvtph_ps(__builtin_bit_cast(__m256i, F::Half(half))));
#elif defined(__F16C__) && MOE_VEC_BYTES == 32
      return __builtin_bit_cast(Vec<float>,
                                _mm256_cvtph_ps(__builtin_bit_cast(__m128i, F::Half(half))));
#else
      const F::Uint wide = __builtin_convertvector(half, F::Uint);
      const F::Uint magnitude = wide & 0x7fffu;
      const Vec<float> f =
          __builtin_bit_cast(Vec<float>, magnitude << 13) * __builtin_bit_cast(float, 0x77800000u);
      F::Uint u = __builtin_bit_cast(F::Uint, f);
      u |= __builtin_bit_cast(F::Uint, magnitude >= 0x7c00u) & 0x7f800000u;
      return __builtin_bit_cast(Vec<float>, u | (wide & 0x8000u) << 16);
#endif
    }
  }
}

inline Vec<double> load_as(const double* p) { return load<double>(p); }

inline Simd<float>::Half narrow(Bf16, Vec<float> v) {
  using F = Simd<float>;
#if defined(__AVX512BF16__) && MOE_VEC_BYTES == 64
  return __builtin_bit_cast(F::Half, _mm512_cvtneps_pbh(__builtin_bit_cast(__m512, v)));
#else
  const F::Uint u = __builtin_bit_cast(F::Uint, v);
  const F::Uint rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  const F::Uint quiet = u >> 16 | 0x40u;
  const F::Uint nan = __builtin_bit_cast(F::Uint, (u & 0x7fffffffu) > 0x7f800000u);
  return __builtin_convertvector((nan & quiet) | (~nan & rounded), F::Half);
#endif
}

inline Simd<float>::Half narrow(Fp16, Vec<float> v) {
  using F = Simd<float>;
#if defined(__AVX512F__) && MOE_VEC_BYTES == 64
  return __builtin_bit_cast(
      F::Half, _mm512_cvtps_ph(__builtin_bit_cast(__m512, v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && MOE_VEC_BYTES == 32
  return __builtin_bit_cast(
      F::Half, _mm256_cvtps_ph(__builtin_bit_cast(__m256, v), _MM_FROUND_TO_NEAREST_INT));
#else
  F::Half h;
  for (int i = 0; i < F::kLanes; ++i) h[i] = to_fp16(v[i]).bits;
  return h;
#endif
}

inline void store_as(float* p, Vec<float> v) { store<float>(p, v); }
inline void store_as(double* p, Vec<double> v) { store<double>(p, v); }

template <class S>
inline void store_as(S* p, Vec<float> v) {
  *reinterpret_cast<Simd<float>::HalfUnaligned*>(p) = narrow(S{}, v);
}

// Stores past the cache; p is aligned to what is stored.
template <class V>
inline void stream([[maybe_unused]] void* p, [[maybe_unused]] V v) {
#if defined(__AVX512F__) && MOE_VEC_BYTES == 64
  if constexpr (sizeof(V) == 64) {
    _mm512_stream_si512(static_cast<__m512i*>(p), __builtin_bit_cast(__m512i, v));
  }
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) {
    _mm256_stream_si256(static_cast<__m256i*>(p), __builtin_bit_cast(__m256i, v));
  } else if constexpr (sizeof(V) == 16) {
    _mm_stream_si128(static_cast<__m128i*>(p), __builtin_bit_cast(__m128i, v));
  }
#endif
}

inline void store_one(float* p, float v) { *p = v; }
inline void store_one(double* p, double v) { *p = v; }
inline void store_one(Bf16* p, float v) { *p = to_bf16(v); }
inline void store_one(Fp16* p, float v) { *p = to_fp16(v); }

// Calls fn(pointer of the right element type).
template <class T, class Fn>
inline auto with_type([[maybe_unused]] DType type, const void* p, const Fn& fn) {
  if constexpr (sizeof(T) == 8) {
    (void)type;
    return fn(static_cast<const double*>(p));
  } else {
    switch (type) {
      case DType::kBFloat16:
        return fn(static_cast<const Bf16*>(p));
      case DType::kFloat16:
        return fn(static_cast<const Fp16*>(p));
      default:
        return fn(static_cast<const float*>(p));
    }
  }
}

// --- tiles

// acc + a * b, where a is the same element in every lane; a pair adds both of its products.
template <class T, class S>
inline Vec<T> add_product(Vec<T> acc, const T* a, Vec<T> b) {
#if defined(__AVX512BF16__) && MOE_VEC_BYTES == 64
  if constexpr (__is_same(S, Pair)) {
    int32_t bits;
    __builtin_memcpy(&bits, a, sizeof(bits));
    return __builtin_bit_cast(
        Vec<float>, _mm512_dpbf16_ps(__builtin_bit_cast(__m512, acc),
                                     __builtin_bit_cast(__m512bh, _mm512_set1_epi32(bits)),
                                     __builtin_bit_cast(__m512bh, b)));
  }
#endif
#if defined(__AVX2__) && MOE_VEC_BYTES == 32
  if constexpr (sizeof(T) == 4) {
    // The form that writes the sum in place. Left to choose, the compiler takes others, with
    // copies, and a tile that needs all 16 registers then keeps sums on the stack: 20 % slower.
    const Vec<T> av = splat<T>(*a);
    asm("vfmadd231ps %2, %1, %0" : "+x"(acc) : "x"(av), "x"(b));
    return acc;
  }
#endif
  return acc + splat<T>(*a) * b;
}

inline void fetch(TileHints& hints) {
  for (int64_t line = hints.lines_per_step; line > 0 && hints.rows > 0; --line) {
    __builtin_prefetch(hints.base + hints.offset, 0, 2);
    hints.offset += 64;
    if (hints.offset >= hints.bytes) {
      hints.offset = 0;
      hints.base += hints.stride;
      --hints.rows;
    }
  }
}

// M x NV accumulators stay in registers; each step broadcasts M elements of a and loads NV vectors
// of b. AVX2: 6 x 2 accumulators + 2 + 1 of 16 registers, and 12 FMAs cover the latency (4) times
// the ports (2). AVX-512: 14 x 2 + 2 + 1 of 32.
template <class T, class S, int M, int NV, bool kColumnForm>
void micro(int64_t kc, const T* a, const T* b, T* c, int64_t ldc, bool accumulate,
           TileHints& hints) {
  constexpr int W = kLanes<T>;
  constexpr int64_t kStrideI = kColumnForm ? 1 : kLda;
  constexpr int64_t kStrideK = kColumnForm ? kLdm : 1;
  Vec<T> acc[M][NV];
#pragma GCC unroll 32
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) acc[i][v] = Vec<T>{};
  }
  const auto step = [&] {
    Vec<T> bv[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) bv[v] = load<T>(b + v * W);
#pragma GCC unroll 32
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v)
        acc[i][v] = add_product<T, S>(acc[i][v], a + i * kStrideI, bv[v]);
    }
    a += kStrideK;
    b += NV * W;
  };
  // A count of steps that the compiler knows: with an unknown one it kept the sums on the stack.
  int64_t k = 0;
  for (; k + kPrefetchStep <= kc; k += kPrefetchStep) {
    fetch(hints);
#pragma GCC unroll 2
    for (int64_t i = 0; i < kPrefetchStep; ++i) step();
  }
  for (; k < kc; ++k) step();
#pragma GCC unroll 32
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      T* out = c + i * ldc + v * W;
#if defined(__AVX512F__) && MOE_VEC_BYTES == 64
      if constexpr (kColumnForm) {
        // One store fills a cache line: written past the cache, the line need not be read first.
        if (hints.stream) {
          stream(out, acc[i][v]);
          continue;
        }
      }
#endif
      store<T>(out, accumulate ? load<T>(out) + acc[i][v] : acc[i][v]);
    }
  }
}

template <class T>
inline T horizontal_sum(Vec<T> v) {
#if defined(__AVX512F__) && MOE_VEC_BYTES == 64
  if constexpr (sizeof(T) == 4) return _mm512_reduce_add_ps(__builtin_bit_cast(__m512, v));
#endif
  T s[kLanes<T>];
  store<T>(s, v);
  for (int width = kLanes<T> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) s[i] += s[i + width];
  }
  return s[0];
}

constexpr int64_t kDotAhead = 2048;  // bytes

// F weight rows and M tokens, vectors along k: F streams of weights, each read once.
template <class T, class S, int F, int M>
void dot_tile(int64_t k, const S* w, int64_t ldw, const T* x, int64_t ldx, T* out, int64_t ldo,
              int64_t out_step) {
  constexpr int W = kLanes<T>;
  Vec<T> acc[F][M];
#pragma GCC unroll 4
  for (int f = 0; f < F; ++f) {
#pragma GCC unroll 4
    for (int t = 0; t < M; ++t) acc[f][t] = Vec<T>{};
  }
  const int64_t whole = k / W * W;
  for (int64_t i = 0; i < whole; i += W) {
    Vec<T> xv[M];
#pragma GCC unroll 4
    for (int t = 0; t < M; ++t) xv[t] = load<T>(x + t * ldx + i);
#pragma GCC unroll 4
    for (int f = 0; f < F; ++f) {
      // With one token the core's window reaches far enough ahead by itself.
      if constexpr (M > 1) __builtin_prefetch(w + f * ldw + i + kDotAhead / sizeof(S), 0, 2);
      const Vec<T> wv = load_as(w + f * ldw + i);
#pragma GCC unroll 4
      for (int t = 0; t < M; ++t) acc[f][t] += wv * xv[t];
    }
  }
  if (whole < k) {
    for (int f = 0; f < F; ++f) {
      S tail[W] = {};
      for (int64_t i = whole; i < k; ++i) tail[i - whole] = w[f * ldw + i];
      const Vec<T> wv = load_as(tail);
      for (int t = 0; t < M; ++t) acc[f][t] += wv * load<T>(x + t * ldx + whole);
    }
  }
#pragma GCC unroll 4
  for (int f = 0; f < F; ++f) {
#pragma GCC unroll 4
    for (int t = 0; t < M; ++t) out[t * ldo + f * out_step] = horizontal_sum<T>(acc[f][t]);
  }
}

template <class T, class S, int F>
void dot_tokens(int tokens, int64_t k, const S* w, int64_t ldw, const T* x, int64_t ldx, T* out,
                int64_t ldo, int64_t out_step) {
  if constexpr (MOE_DOT_TOKENS >= 4) {
    if (tokens == 4) return dot_tile<T, S, F, 4>(k, w, ldw, x, ldx, out, ldo, out_step);
    if (tokens == 3) return dot_tile<T, S, F, 3>(k, w, ldw, x, ldx, out, ldo, out_step);
  }
  if (tokens == 2) return dot_tile<T, S, F, 2>(k, w, ldw, x, ldx, out, ldo, out_step);
  dot_tile<T, S, F, 1>(k, w, ldw, x, ldx, out, ldo, out_step);
}

template <class T>
void dot(DType w_type, int features, int tokens, int64_t k, const void* w, int64_t ldw, const T* x,
         int64_t ldx, T* out, int64_t ldo, int64_t out_step) {
  with_type<T>(w_type, w, [&]<class S>(const S* p) {
    if (features == 4) {
      dot_tokens<T, S, 4>(tokens, k, p, ldw, x, ldx, out, ldo, out_step);
    } else {
      for (int f = 0; f < features; ++f) {
        dot_tokens<T, S, 1>(tokens, k, p + f * ldw, ldw, x, ldx, out + f * out_step, ldo, 0);
      }
    }
  });
}

// R weight rows, dense along the output, and M tokens: the sums pass through registers once in R
// steps of k, and each weight row is read in one run.
template <class T, class S, int M, int R>
void rank_tile(const S* w, int64_t ldw, const T* a, int64_t lda, T* c, int64_t ldc, int64_t n,
               bool accumulate) {
  constexpr int W = kLanes<T>;
  Vec<T> av[M][R];
#pragma GCC unroll 4
  for (int t = 0; t < M; ++t) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) av[t][r] = splat<T>(a[t * lda + r]);
  }
  const auto block = [&](const S* p, int64_t ld, T* out, int64_t ldo) {
    Vec<T> acc[M];
#pragma GCC unroll 4
    for (int t = 0; t < M; ++t) acc[t] = accumulate ? load<T>(out + t * ldo) : Vec<T>{};
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<T> wv = load_as(p + r * ld);
#pragma GCC unroll 4
      for (int t = 0; t < M; ++t) acc[t] += av[t][r] * wv;
    }
#pragma GCC unroll 4
    for (int t = 0; t < M; ++t) store<T>(out + t * ldo, acc[t]);
  };
  int64_t j = 0;
  for (; j + W <= n; j += W) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) __builtin_prefetch(w + (r + R) * ldw + j, 0, 2);
    block(w + j, ldw, c + j, ldc);
  }
  if (j < n) {
    S tail[R][W] = {};
    T out[M][W] = {};
    for (int64_t i = j; i < n; ++i) {
      for (int r = 0; r < R; ++r) tail[r][i - j] = w[r * ldw + i];
      for (int t = 0; t < M && accumulate; ++t) out[t][i - j] = c[t * ldc + i];
    }
    block(tail[0], W, out[0], W);
    for (int64_t i = j; i < n; ++i) {
      for (int t = 0; t < M; ++t) c[t * ldc + i] = out[t][i - j];
    }
  }
}

template <class T>
void rank_update(DType w_type, int rows, int64_t tokens, const void* w, int64_t ldw, const T* a,
                 int64_t lda, T* c, int64_t ldc, int64_t n, bool accumulate) {
  with_type<T>(w_type, w, [&]<class S>(const S* p) {
    const auto all = [&]<int R>(const S* q, const T* b, bool add) {
      int64_t t = 0;
      if constexpr (MOE_DOT_TOKENS >= 4) {
        for (; t + 4 <= tokens; t += 4) {
          rank_tile<T, S, 4, R>(q, ldw, b + t * lda, lda, c + t * ldc, ldc, n, add);
        }
      }
      for (; t + 2 <= tokens; t += 2) {
        rank_tile<T, S, 2, R>(q, ldw, b + t * lda, lda, c + t * ldc, ldc, n, add);
      }
      if (t < tokens) rank_tile<T, S, 1, R>(q, ldw, b + t * lda, lda, c + t * ldc, ldc, n, add);
    };
    if (rows == kRankRows) {
      all.template operator()<kRankRows>(p, a, accumulate);
    } else {
      for (int r = 0; r < rows; ++r) {
        all.template operator()<1>(p + r * ldw, a + r, accumulate || r > 0);
      }
    }
  });
}

// --- panels of weights packed ahead of time

// Vector v of row `half` of the pair of k at p.
template <class T, class S>
inline Vec<T> panel_vector(const S* p, int v, [[maybe_unused]] int half) {
  constexpr int W = kLanes<T>;
  if constexpr (sizeof(S) == sizeof(T)) {
    return load<T>(reinterpret_cast<const T*>(p) + v * W);
  } else {
    using F = Simd<float>;
    typedef uint32_t Unaligned __attribute__((vector_size(MOE_VEC_BYTES), aligned(4), may_alias));
    const F::Uint pair = *reinterpret_cast<const Unaligned*>(p + 2 * v * W);
    if constexpr (kIsBf16<S>) {
      return __builtin_bit_cast(Vec<float>, half == 0 ? pair << 16 : pair & 0xffff0000u);
    } else {
      const auto bits = __builtin_convertvector(half == 0 ? pair & 0xffffu : pair >> 16, F::Half);
      return load_as(reinterpret_cast<const Fp16*>(&bits));
    }
  }
}

template <class T, class S, int M>
void panel_tile(int64_t kc, const T* a, const void* panel_data, T* c, int64_t ldc, bool accumulate,
                const char* ahead, int64_t ahead_step) {
  constexpr int W = kLanes<T>;
  constexpr int kPair = sizeof(S) == sizeof(T) ? 1 : 2;  // steps of k that lie side by side
  constexpr int kLines = 2 * MOE_VEC_BYTES < 64 ? 1 : 2 * MOE_VEC_BYTES / 64;
  // Few rows are few chains of sums, and a chain adds once in 4 cycles: the two k of a pair then
  // have sums of their own.
  constexpr int kChains = kPair == 2 && M <= 3 ? 2 : 1;
  Vec<T> acc[kChains][M][2];
#pragma GCC unroll 2
  for (int h = 0; h < kChains; ++h) {
#pragma GCC unroll 32
    for (int i = 0; i < M; ++i) acc[h][i][0] = acc[h][i][1] = Vec<T>{};
  }
  const int64_t line_step = ahead_step / kLines;
  const S* panel = static_cast<const S*>(panel_data);
#pragma GCC unroll 2
  for (int64_t k = 0; k < kc; k += kPair) {
#pragma GCC unroll 2
    for (int line = 0; line < kLines; ++line) {
      __builtin_prefetch(ahead, 0, 2);
      ahead += line_step;
    }
#pragma GCC unroll 2
    for (int half = 0; half < kPair; ++half) {
      // Load the pairs anew for each half and broadcast no earlier: 16 registers hold the sums of
      // an AVX2 tile, two vectors, an element of a and the mask, and not one more.
      if constexpr (kPair == 2) asm volatile("" ::: "memory");
      const Vec<T> b0 = panel_vector<T>(panel, 0, half), b1 = panel_vector<T>(panel, 1, half);
      auto& sums = acc[kChains == 2 ? half : 0];
#pragma GCC unroll 32
      for (int i = 0; i < M; ++i) {
        sums[i][0] = add_product<T, S>(sums[i][0], a + i * kLda + half, b0);
        sums[i][1] = add_product<T, S>(sums[i][1], a + i * kLda + half, b1);
      }
    }
    a += kPair;
    panel += 2 * W * kPair;
  }
#pragma GCC unroll 32
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      Vec<T> sum = acc[0][i][v];
      if constexpr (kChains == 2) sum += acc[1][i][v];
      T* out = c + i * ldc + v * W;
      store<T>(out, accumulate ? load<T>(out) + sum : sum);
    }
  }
}

// Several panels at once for M rows: the hardware prefetcher follows each, and together they reach
// the memory bandwidth that one stream does not. Asking ahead as well made it 15 to 20 % slower. No
// more panels than registers hold sums of: 12 vectors with AVX2, 24 with AVX-512.
template <int M>
constexpr int kPanelStreams = MOE_MR2 * 2 / (2 * M) >= 4   ? 4
                              : MOE_MR2 * 2 / (2 * M) >= 2 ? 2
                                                           : 1;

template <class T, class S, int M>
void panel_streams(int64_t kc, const T* a, const void* panel_data, int64_t stride, T* const* c,
                   int64_t ldc, bool accumulate) {
  constexpr int W = kLanes<T>, kStreams = kPanelStreams<M>;
  constexpr int kPair = sizeof(S) == sizeof(T) ? 1 : 2;  // steps of k that lie side by side
  Vec<T> acc[kStreams][M][2] = {};
  const char* panel = static_cast<const char*>(panel_data);
  for (int64_t k = 0; k < kc; k += kPair) {
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; ++s) {
      const S* p = reinterpret_cast<const S*>(panel + s * stride);
#pragma GCC unroll 2
      for (int half = 0; half < kPair; ++half) {
        if constexpr (kPair == 2) asm volatile("" ::: "memory");
        const Vec<T> b0 = panel_vector<T>(p, 0, half), b1 = panel_vector<T>(p, 1, half);
#pragma GCC unroll 3
        for (int i = 0; i < M; ++i) {
          acc[s][i][0] = add_product<T, S>(acc[s][i][0], a + i * kLda + half, b0);
          acc[s][i][1] = add_product<T, S>(acc[s][i][1], a + i * kLda + half, b1);
        }
      }
    }
    a += kPair;
    panel += 2 * W * kPair * sizeof(S);
  }
#pragma GCC unroll 4
  for (int s = 0; s < kStreams; ++s) {
#pragma GCC unroll 3
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        T* out = c[s] + i * ldc + v * W;
        store<T>(out, accumulate ? load<T>(out) + acc[s][i][v] : acc[s][i][v]);
      }
    }
  }
}

#if defined(__AVX512BF16__) && MOE_VEC_BYTES == 64
// Row pair by row pair over all panels, so that each row is read in one run.
void pack_pairs(const uint16_t* const* rows, int64_t offset, int64_t num_rows, int64_t cols,
                uint16_t* dst, int64_t stride) {
  typedef uint16_t Bits __attribute__((vector_size(64)));
  constexpr Bits lo = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                       8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  constexpr int64_t kRowsAhead = 8;
  for (int64_t r = 0; r < num_rows; r += 2) {
    const uint16_t* row0 = rows[r] == nullptr ? nullptr : rows[r] + offset;
    const uint16_t* row1 = rows[r + 1] == nullptr ? nullptr : rows[r + 1] + offset;
    const bool more = r + kRowsAhead + 1 < num_rows && rows[r + kRowsAhead + 1] != nullptr;
    const uint16_t* next0 = more ? rows[r + kRowsAhead] + offset : dst;
    const uint16_t* next1 = more ? rows[r + kRowsAhead + 1] + offset : dst;
    uint16_t* out = dst + r * 32;
    for (int64_t j = 0; j < cols; j += 32, out += stride) {
      __builtin_prefetch(next0 + (more ? j : 0));
      __builtin_prefetch(next1 + (more ? j : 0));
      const __mmask32 valid = cols - j >= 32 ? 0xffffffffu : (1u << (cols - j)) - 1;
      const __m512i v0 =
          row0 == nullptr ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(valid, row0 + j);
      const __m512i v1 =
          row1 == nullptr ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(valid, row1 + j);
      const __m512i first = __builtin_bit_cast(__m512i, lo);
      const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
      _mm512_storeu_si512(out, _mm512_permutex2var_epi16(v0, first, v1));
      _mm512_storeu_si512(out + 32, _mm512_permutex2var_epi16(v0, second, v1));
    }
  }
}

void pair_rows(const uint16_t* even, const uint16_t* odd, float* dst, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m512i lo =
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even + i)));
    const __m512i hi =
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd + i)));
    _mm512_storeu_si512(dst + i, _mm512_or_si512(lo, _mm512_slli_epi32(hi, 16)));
  }
  for (; i < n; ++i) {
    const uint32_t pair = even[i] | uint32_t{odd[i]} << 16;
    __builtin_memcpy(dst + i, &pair, sizeof(pair));
  }
}
#endif

#if defined(MOE_AMX)
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

void amx_begin() {
  const TileConfig config;
  _tile_loadconfig(&config);
}

void amx_end() { _tile_release(); }

// Sums in tiles 0 to 3, tokens in 4 and 5, weights in 6 and 7.
template <int kRowTiles>
void amx_panel_tiles(int64_t k_steps, const uint16_t* a, int64_t lda, const uint16_t* panel,
                     float* c, int64_t ldc, bool accumulate, TileHints& next) {
  if (accumulate) {
    _tile_loadd(0, c, ldc * 4);
    _tile_loadd(1, c + 16, ldc * 4);
    if constexpr (kRowTiles == 2) {
      _tile_loadd(2, c + 16 * ldc, ldc * 4);
      _tile_loadd(3, c + 16 * ldc + 16, ldc * 4);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kRowTiles == 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (int64_t k = 0; k < k_steps; ++k) {
    fetch(next);
    _tile_loadd(6, panel, 128);
    _tile_loadd(4, a, lda * 2);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, panel + 32, 128);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kRowTiles == 2) {
      _tile_loadd(5, a + 16 * lda, lda * 2);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    a += 32;
    panel += 32 * 32;
  }
  _tile_stored(0, c, ldc * 4);
  _tile_stored(1, c + 16, ldc * 4);
  if constexpr (kRowTiles == 2) {
    _tile_stored(2, c + 16 * ldc, ldc * 4);
    _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
  }
}

void amx_panel(int64_t k_steps, const uint16_t* a, int64_t lda, int row_tiles,
               const uint16_t* panel, float* c, int64_t ldc, bool accumulate, TileHints& next) {
  if (row_tiles == 2) {
    amx_panel_tiles<2>(k_steps, a, lda, panel, c, ldc, accumulate, next);
  } else {
    amx_panel_tiles<1>(k_steps, a, lda, panel, c, ldc, accumulate, next);
  }
}

// Weights in tile 6, one tile of tokens after the other in 7.
template <int kTiles>
void amx_rows_tiles(int64_t k_steps, const uint16_t* w, int64_t ldw, const uint16_t* x, int64_t ldx,
                    float* c, int64_t ldc) {
  _tile_zero(0);
  if constexpr (kTiles > 1) _tile_zero(1);
  if constexpr (kTiles > 2) _tile_zero(2);
  if constexpr (kTiles > 3) _tile_zero(3);
  if constexpr (kTiles > 4) _tile_zero(4);
  if constexpr (kTiles > 5) _tile_zero(5);
// Tile numbers have to be literals.
#define MOE_TOKENS(j)                  \
  if constexpr (kTiles > j) {          \
    _tile_loadd(7, x + (j) * ldx, 64); \
    _tile_dpbf16ps(j, 6, 7);           \
  }
  for (int64_t k = 0; k < k_steps; ++k) {
    _tile_loadd(6, w, ldw * 2);
    MOE_TOKENS(0)
    MOE_TOKENS(1)
    MOE_TOKENS(2)
    MOE_TOKENS(3)
    MOE_TOKENS(4)
    MOE_TOKENS(5)
    w += 32;
    x += 32 * 16;
  }
#undef MOE_TOKENS
  _tile_stored(0, c, ldc * 4);
  if constexpr (kTiles > 1) _tile_stored(1, c + 16, ldc * 4);
  if constexpr (kTiles > 2) _tile_stored(2, c + 32, ldc * 4);
  if constexpr (kTiles > 3) _tile_stored(3, c + 48, ldc * 4);
  if constexpr (kTiles > 4) _tile_stored(4, c + 64, ldc * 4);
  if constexpr (kTiles > 5) _tile_stored(5, c + 80, ldc * 4);
}

void amx_rows(int64_t k_steps, const uint16_t* w, int64_t ldw, const uint16_t* x, int64_t ldx,
              int token_tiles, float* c, int64_t ldc) {
  switch (token_tiles) {
    case 1:
      return amx_rows_tiles<1>(k_steps, w, ldw, x, ldx, c, ldc);
    case 2:
      return amx_rows_tiles<2>(k_steps, w, ldw, x, ldx, c, ldc);
    case 3:
      return amx_rows_tiles<3>(k_steps, w, ldw, x, ldx, c, ldc);
    case 4:
      return amx_rows_tiles<4>(k_steps, w, ldw, x, ldx, c, ldc);
    case 5:
      return amx_rows_tiles<5>(k_steps, w, ldw, x, ldx, c, ldc);
    default:
      return amx_rows_tiles<6>(k_steps, w, ldw, x, ldx, c, ldc);
  }
}
#endif

// --- rows

template <class T>
void load_row(DType type, const void* src, T* dst, int64_t n, T scale) {
  constexpr int W = kLanes<T>;
  with_type<T>(type, src, [&](const auto* p) {
    int64_t i = 0;
    if (scale == T(1)) {
      for (; i + W <= n; i += W) store<T>(dst + i, load_as(p + i));
    } else {
      for (; i + W <= n; i += W) store<T>(dst + i, load_as(p + i) * scale);
    }
    for (; i < n; ++i) dst[i] = to_float(p[i]) * scale;
  });
}

// Row by row over all panels, so that each row is read in one contiguous run.
template <class T>
void pack_panels(DType type, const void* const* rows, int64_t byte_offset, int64_t num_rows,
                 int64_t cols, const T* scales, T* dst, int64_t stride) {
  constexpr int W = kLanes<T>;
  const int64_t whole = cols / (2 * W) * (2 * W);
  const int64_t last = (cols - whole + W - 1) / W * W;
  with_type<T>(type, nullptr, [&]<class S>(const S*) {
    for (int64_t r = 0; r < num_rows; ++r) {
      const S* src = reinterpret_cast<const S*>(static_cast<const char*>(rows[r]) + byte_offset);
      const Vec<T> scale = splat<T>(scales == nullptr ? T(1) : scales[r]);
      T* out = dst + r * 2 * W;
      for (int64_t j = 0; j < whole; j += 2 * W) {
        store<T>(out, load_as(src + j) * scale);
        store<T>(out + W, load_as(src + j + W) * scale);
        out += stride;
      }
      out = dst + whole / (2 * W) * stride + r * last;
      int64_t j = whole;
      for (; j + W <= cols; j += W, out += W) store<T>(out, load_as(src + j) * scale);
      if (j < cols) {
        T tail[W] = {};
        for (int64_t c = j; c < cols; ++c) tail[c - j] = to_float(src[c]);
        store<T>(out, load<T>(tail) * scale);
      }
    }
  });
}

template <class T>
void store_row(DType type, const T* src, void* dst, int64_t n) {
  constexpr int W = kLanes<T>;
  with_type<T>(type, dst, [&]<class S>(const S* q) {
    S* p = const_cast<S*>(q);
    int64_t i = 0;
    for (; i + W <= n; i += W) store_as(p + i, load<T>(src + i));
    for (; i < n; ++i) store_one(p + i, src[i]);
  });
}

// Past the cache, where dst and n are whole lines: written in pieces, a line would be read first.
template <class T>
void stream_row(DType type, const T* src, void* dst, int64_t n) {
#if defined(__AVX2__)
  constexpr int W = kLanes<T>;
  const bool streamed = with_type<T>(type, dst, [&]<class S>(const S* q) {
    if (n * sizeof(S) % 64 != 0 || reinterpret_cast<uintptr_t>(q) % 64 != 0) return false;
    S* p = const_cast<S*>(q);
    for (int64_t i = 0; i < n; i += W) {
      if constexpr (sizeof(S) == sizeof(T)) {
        stream(p + i, load<T>(src + i));
      } else {
        stream(p + i, narrow(S{}, load<T>(src + i)));
      }
    }
    return true;
  });
  if (streamed) return;
#endif
  store_row<T>(type, src, dst, n);
}

// One lanes x lanes block in registers.
template <class T>
inline void transpose_block(const T* src, int64_t ld_src, T* dst, int64_t ld_dst) {
  constexpr int W = kLanes<T>;
#if defined(__AVX512F__) && MOE_VEC_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    // Four rounds of interleaving row i with row i + 8: after log2(16) rounds index bits of row and
    // column have changed places.
    typedef int32_t Index __attribute__((vector_size(64)));
    constexpr Index lo = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    constexpr Index hi = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    Vec<T> v[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) v[i] = load<T>(src + i * ld_src);
#pragma GCC unroll 2
    for (int round = 0; round < 2; ++round) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        t[2 * i] = __builtin_shuffle(v[i], v[i + 8], lo);
        t[2 * i + 1] = __builtin_shuffle(v[i], v[i + 8], hi);
      }
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        v[2 * i] = __builtin_shuffle(t[i], t[i + 8], lo);
        v[2 * i + 1] = __builtin_shuffle(t[i], t[i + 8], hi);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) store<T>(dst + i * ld_dst, v[i]);
    return;
  }
#elif defined(__AVX2__) && MOE_VEC_BYTES == 32
  if constexpr (sizeof(T) == 4) {
    __m256 r[8], t[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      r[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(src) + i * ld_src);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
      r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
      r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
      r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      float* out = reinterpret_cast<float*>(dst);
      _mm256_storeu_ps(out + i * ld_dst, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
      _mm256_storeu_ps(out + (i + 4) * ld_dst, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
    return;
  }
#endif
  for (int c = 0; c < W; ++c) {
    for (int r = 0; r < W; ++r) dst[c * ld_dst + r] = src[r * ld_src + c];
  }
}

template <class T>
void transpose(const T* src, int64_t ld_src, int64_t rows, int64_t cols, T* dst, int64_t ld_dst) {
  constexpr int W = kLanes<T>;
  for (int64_t r = 0; r < rows; r += W) {
    int64_t c = 0;
    for (; c + W <= cols; c += W) {
      transpose_block<T>(src + r * ld_src + c, ld_src, dst + c * ld_dst + r, ld_dst);
    }
    if (c < cols) {
      T block[W * W];
      transpose_block<T>(src + r * ld_src + c, ld_src, block, W);
      for (int64_t i = 0; i < cols - c; ++i) {
        store<T>(dst + (c + i) * ld_dst + r, load<T>(block + i * W));
      }
    }
  }
}

template <class T>
void weighted_sum(DType type, const void* const* rows, const T* weights, int64_t num_rows, T* out,
                  int64_t n) {
  constexpr int W = kLanes<T>;
  with_type<T>(type, nullptr, [&]<class S>(const S*) {
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
      Vec<T> s0 = {}, s1 = {};
      for (int64_t r = 0; r < num_rows; ++r) {
        const S* p = static_cast<const S*>(rows[r]) + i;
        const Vec<T> w = splat<T>(weights == nullptr ? T(1) : weights[r]);
        s0 += w * load_as(p);
        s1 += w * load_as(p + W);
      }
      store<T>(out + i, s0);
      store<T>(out + i + W, s1);
    }
    for (; i < n; ++i) {
      T s = 0;
      for (int64_t r = 0; r < num_rows; ++r) {
        const T w = weights == nullptr ? T(1) : weights[r];
        s += w * to_float(static_cast<const S*>(rows[r])[i]);
      }
      out[i] = s;
    }
  });
}

template <class T>
void axpy(DType type, const void* row, T scale, T* acc, int64_t n) {
  constexpr int W = kLanes<T>;
  with_type<T>(type, row, [&](const auto* p) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store<T>(acc + i, load<T>(acc + i) + load_as(p + i) * scale);
    for (; i < n; ++i) acc[i] += to_float(p[i]) * scale;
  });
}

template <class T>
T dot_row(DType a_type, const void* a, DType b_type, const void* b, int64_t n) {
  constexpr int W = kLanes<T>;
  return with_type<T>(a_type, a, [&](const auto* pa) {
    return with_type<T>(b_type, b, [&](const auto* pb) {
      Vec<T> s0 = {}, s1 = {};
      int64_t i = 0;
      for (; i + 2 * W <= n; i += 2 * W) {
        s0 += load_as(pa + i) * load_as(pb + i);
        s1 += load_as(pa + i + W) * load_as(pb + i + W);
      }
      T s = horizontal_sum<T>(s0 + s1);
      for (; i < n; ++i) s += to_float(pa[i]) * to_float(pb[i]);
      return s;
    });
  });
}

// --- functions

template <class T>
struct ExpTraits;

template <>
struct ExpTraits<float> {
  using Int = int32_t;
  static constexpr float kMax = 88.37f, kMin = -87.33f;
  static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLn2Hi = 0.693145751953125f, kLn2Lo = 1.42860677e-6f;
  static constexpr int kBias = 127, kMantissa = 23, kDegree = 7;
};

template <>
struct ExpTraits<double> {
  using Int = int64_t;
  static constexpr double kMax = 709.0, kMin = -708.0;
  static constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2Hi = 0.6931471803691238, kLn2Lo = 1.9082149292705877e-10;
  static constexpr int kBias = 1023, kMantissa = 52, kDegree = 13;
};

// e^x = 2^n e^r with |r| <= ln(2)/2; the Taylor sum of kDegree leaves less than half an ulp.
// Arguments are clamped to the range of normal results; NaN stays NaN.
template <class T>
inline Vec<T> vexp(Vec<T> x) {
  using Tr = ExpTraits<T>;
  using Int = typename Simd<T>::Int;
  using Scalar = typename Tr::Int;
  x = x > Tr::kMax ? splat<T>(Tr::kMax) : x;
  x = x < Tr::kMin ? splat<T>(Tr::kMin) : x;
  const Vec<T> shifted = x * T(1.4426950408889634) + Tr::kMagic;
  const Vec<T> n = shifted - Tr::kMagic;
  Vec<T> r = x - n * Tr::kLn2Hi;
  r = r - n * Tr::kLn2Lo;
  Vec<T> p = splat<T>(1);
#pragma GCC unroll 16
  for (int d = Tr::kDegree; d >= 1; --d) p = p * r * T(1.0 / d) + T(1);
  const Int bits = __builtin_bit_cast(Int, shifted) - __builtin_bit_cast(Scalar, T(Tr::kMagic)) +
                   Scalar(Tr::kBias);
  return p * __builtin_bit_cast(Vec<T>, bits << Tr::kMantissa);
}

template <class T>
inline Vec<T> vsigmoid(Vec<T> x) {
  return T(1) / (T(1) + vexp<T>(-x));
}

// The standard normal distribution function, Phi(x) = erfc(-x / sqrt 2) / 2.
inline Vec<double> vnormal_cdf(Vec<double> x) {
  Vec<double> y;
  for (int i = 0; i < kLanes<double>; ++i) {
    y[i] = 0.5 * __builtin_erfc(-x[i] * 0.70710678118654752);
  }
  return y;
}

inline Vec<float> vnormal_cdf(Vec<float> x) {
  // erfc(z) = t Q(t) exp(-z^2) with t = 1 / (1 + z/2); Q is a degree-9 least-squares fit on
  // Chebyshev nodes over z in [0, 10], relative error 1.3e-7 in fp32.
  constexpr float q[] = {0.28206289f, 0.28289402f,  0.23828822f, 0.22744551f,  -0.10452848f,
                         0.43415189f, -0.68704581f, 0.44281113f, -0.12961404f, 0.01353465f};
  const Vec<float> z = (x < 0.0f ? -x : x) * 0.70710678f;
  const Vec<float> t = 1.0f / (1.0f + 0.5f * z);
  Vec<float> p = splat<float>(q[9]);
#pragma GCC unroll 9
  for (int i = 8; i >= 0; --i) p = p * t + q[i];
  const Vec<float> half_erfc = 0.5f * t * p * vexp<float>(-z * z);
  return x < 0.0f ? half_erfc : 1.0f - half_erfc;
}

template <class T>
struct ActPair {
  Vec<T> value, slope;
};

// value = a(x) and slope = a'(x).
template <class T, Activation A>
inline ActPair<T> activate(Vec<T> x) {
  if constexpr (A == Activation::kSwiglu || A == Activation::kSilu) {
    const Vec<T> s = vsigmoid<T>(x);
    return {x * s, s * (T(1) + x * (T(1) - s))};
  } else if constexpr (A == Activation::kGeglu || A == Activation::kGelu) {
    const Vec<T> cdf = vnormal_cdf(x);
    const Vec<T> pdf = T(0.3989422804014327) * vexp<T>(T(-0.5) * x * x);
    return {x * cdf, cdf + x * pdf};
  } else if constexpr (A == Activation::kGegluTanh || A == Activation::kGeluTanh) {
    // (1 + tanh(u)) / 2 = sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
    constexpr T c = T(2 * 0.7978845608028654);
    const Vec<T> s = vsigmoid<T>(c * (x + T(0.044715) * x * x * x));
    return {x * s, s + x * s * (T(1) - s) * c * (T(1) + T(3 * 0.044715) * x * x)};
  } else if constexpr (A == Activation::kRelu2) {
    const Vec<T> r = x < T(0) ? Vec<T>{} : x;
    return {r * r, r + r};
  } else {
    const Vec<T> zero = {};
    return {x < T(0) ? zero : x, x > T(0) ? splat<T>(1) : zero};
  }
}

// Runs fn over whole vectors; the tail goes through padded copies. fn(gate, up, dh) -> values by
// pointer, so one text serves forward and backward.
template <class T, Activation A>
void act_fwd_loop(const T* gate, const T* up, T* h, int64_t n, T alpha, T limit) {
  constexpr int W = kLanes<T>;
  const auto one = [&](Vec<T> g, Vec<T> u) -> Vec<T> {
    if constexpr (A == Activation::kSwigluOai) {
      g = g > limit ? splat<T>(limit) : g;
      u = u > limit ? splat<T>(limit) : u;
      u = u < -limit ? splat<T>(-limit) : u;
      return (u + T(1)) * g * vsigmoid<T>(alpha * g);
    } else if constexpr (is_gated(A)) {
      return activate<T, A>(g).value * u;
    } else {
      return activate<T, A>(g).value;
    }
  };
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    store<T>(h + i, one(load<T>(gate + i), is_gated(A) ? load<T>(up + i) : Vec<T>{}));
  }
  if (i < n) {
    T g[W] = {}, u[W] = {}, out[W];
    for (int64_t j = i; j < n; ++j) {
      g[j - i] = gate[j];
      if (is_gated(A)) u[j - i] = up[j];
    }
    store<T>(out, one(load<T>(g), load<T>(u)));
    for (int64_t j = i; j < n; ++j) h[j] = out[j - i];
  }
}

template <class T, Activation A>
void act_bwd_loop(const T* gate, const T* up, const T* dh, T* h, T* dgate, T* dup, int64_t n,
                  T alpha, T limit) {
  constexpr int W = kLanes<T>;
  const auto one = [&](Vec<T> g, Vec<T> u, Vec<T> d, Vec<T>& hv, Vec<T>& dg, Vec<T>& du) {
    if constexpr (A == Activation::kSwigluOai) {
      const Vec<T> zero = {};
      const Vec<T> gc = g > limit ? splat<T>(limit) : g;
      Vec<T> uc = u > limit ? splat<T>(limit) : u;
      uc = uc < -limit ? splat<T>(-limit) : uc;
      const Vec<T> s = vsigmoid<T>(alpha * gc);
      hv = (uc + T(1)) * gc * s;
      dg = d * (uc + T(1)) * s * (T(1) + alpha * gc * (T(1) - s));
      du = d * gc * s;
      dg = g > limit ? zero : dg;
      du = u > limit ? zero : du;
      du = u < -limit ? zero : du;
    } else {
      const ActPair<T> a = activate<T, A>(g);
      if constexpr (is_gated(A)) {
        hv = a.value * u;
        dg = d * u * a.slope;
        du = d * a.value;
      } else {
        hv = a.value;
        dg = d * a.slope;
        du = Vec<T>{};
      }
    }
  };
  Vec<T> hv, dg, du;
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    one(load<T>(gate + i), is_gated(A) ? load<T>(up + i) : Vec<T>{}, load<T>(dh + i), hv, dg, du);
    if (h != nullptr) store<T>(h + i, hv);
    store<T>(dgate + i, dg);
    if (is_gated(A)) store<T>(dup + i, du);
  }
  if (i < n) {
    T g[W] = {}, u[W] = {}, d[W] = {};
    for (int64_t j = i; j < n; ++j) {
      g[j - i] = gate[j];
      if (is_gated(A)) u[j - i] = up[j];
      d[j - i] = dh[j];
    }
    one(load<T>(g), load<T>(u), load<T>(d), hv, dg, du);
    for (int64_t j = i; j < n; ++j) {
      if (h != nullptr) h[j] = hv[j - i];
      dgate[j] = dg[j - i];
      if (is_gated(A)) dup[j] = du[j - i];
    }
  }
}

#define MOE_FOR_ACTIVATION(kind, CALL)     \
  switch (kind) {                          \
    case Activation::kSwiglu:              \
      return CALL(Activation::kSwiglu);    \
    case Activation::kGeglu:               \
      return CALL(Activation::kGeglu);     \
    case Activation::kGegluTanh:           \
      return CALL(Activation::kGegluTanh); \
    case Activation::kReglu:               \
      return CALL(Activation::kReglu);     \
    case Activation::kSwigluOai:           \
      return CALL(Activation::kSwigluOai); \
    case Activation::kSilu:                \
      return CALL(Activation::kSilu);      \
    case Activation::kGelu:                \
      return CALL(Activation::kGelu);      \
    case Activation::kGeluTanh:            \
      return CALL(Activation::kGeluTanh);  \
    case Activation::kRelu:                \
      return CALL(Activation::kRelu);      \
    case Activation::kRelu2:               \
      return CALL(Activation::kRelu2);     \
  }

template <class T>
void act_fwd(Activation kind, const T* gate, const T* up, T* h, int64_t n, T alpha, T limit) {
#define MOE_CALL(A) act_fwd_loop<T, A>(gate, up, h, n, alpha, limit)
  MOE_FOR_ACTIVATION(kind, MOE_CALL)
#undef MOE_CALL
}

template <class T>
void act_bwd(Activation kind, const T* gate, const T* up, const T* dh, T* h, T* dgate, T* dup,
             int64_t n, T alpha, T limit) {
#define MOE_CALL(A) act_bwd_loop<T, A>(gate, up, dh, h, dgate, dup, n, alpha, limit)
  MOE_FOR_ACTIVATION(kind, MOE_CALL)
#undef MOE_CALL
}

void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

#include "cpu/quant-inl.h"

// --- table

template <class T, class S, int NV, bool kColumnForm, int M, int kMax>
void fill_micro(typename Kernels<T>::Micro* table) {
  if constexpr (M <= kMax) {
    table[M - 1] = &micro<T, S, M, NV, kColumnForm>;
    fill_micro<T, S, NV, kColumnForm, M + 1, kMax>(table);
  }
}

template <class T, class S, int M>
void fill_panel_tiles(typename Kernels<T>::PanelTile* table) {
  if constexpr (M <= MOE_MR2) {
    table[M - 1] = &panel_tile<T, S, M>;
    fill_panel_tiles<T, S, M + 1>(table);
  }
}

template <class T, class S>
void fill_panel_streams(typename Kernels<T>::PanelStreams* table) {
  table[0] = &panel_streams<T, S, 1>;
  table[1] = &panel_streams<T, S, 2>;
  table[2] = &panel_streams<T, S, 3>;
}

template <class T>
Kernels<T> make_kernels() {
  Kernels<T> k = {};
  k.lanes = kLanes<T>;
  k.mr1 = MOE_MR1;
  k.mr2 = MOE_MR2;
  k.dot_tokens = MOE_DOT_TOKENS;
  k.streams = MOE_VEC_BYTES == 64;
  k.stream_fence = &stream_fence;
  k.dot_max_rows = MOE_DOT_MAX_ROWS;
  fill_micro<T, T, 1, false, 1, MOE_MR1>(k.row_a[0]);
  fill_micro<T, T, 2, false, 1, MOE_MR2>(k.row_a[1]);
  fill_micro<T, T, 1, true, 1, MOE_MR1>(k.col_a[0]);
  fill_micro<T, T, 2, true, 1, MOE_MR2>(k.col_a[1]);
  fill_panel_tiles<T, T, 1>(k.panel_tile[static_cast<int>(kAccumulate<T>)]);
  k.num_panel_streams[0] = kPanelStreams<1>;
  k.num_panel_streams[1] = kPanelStreams<2>;
  k.num_panel_streams[2] = kPanelStreams<3>;
  fill_panel_streams<T, T>(k.panel_streams[static_cast<int>(kAccumulate<T>)]);
  if constexpr (sizeof(T) == 4) {
    fill_panel_tiles<T, Bf16, 1>(k.panel_tile[static_cast<int>(DType::kBFloat16)]);
    fill_panel_streams<T, Bf16>(k.panel_streams[static_cast<int>(DType::kBFloat16)]);
    fill_panel_tiles<T, Fp16, 1>(k.panel_tile[static_cast<int>(DType::kFloat16)]);
    fill_panel_streams<T, Fp16>(k.panel_streams[static_cast<int>(DType::kFloat16)]);
#if defined(__AVX512BF16__) && MOE_VEC_BYTES == 64
    k.pairs = true;
    fill_micro<T, Pair, 1, false, 1, MOE_MR1>(k.pair_row_a[0]);
    fill_micro<T, Pair, 2, false, 1, MOE_MR2>(k.pair_row_a[1]);
    fill_micro<T, Pair, 1, true, 1, MOE_MR1>(k.pair_col_a[0]);
    fill_micro<T, Pair, 2, true, 1, MOE_MR2>(k.pair_col_a[1]);
    fill_panel_tiles<T, Pair, 1>(k.pair_panel_tile);
    fill_panel_streams<T, Pair>(k.pair_panel_streams);
    k.pack_pairs = &pack_pairs;
    k.pair_rows = &pair_rows;
#endif
    k.quant = {&quant_token_bytes, &quant_tokens, &quant_dot, &quant_widen, &multiply_row};
#if defined(MOE_AMX)
    k.amx_begin = &amx_begin;
    k.amx_end = &amx_end;
    k.amx_panel = &amx_panel;
    k.amx_rows = &amx_rows;
#endif
  }
  k.dot = &dot<T>;
  k.rank_update = &rank_update<T>;
  k.load_row = &load_row<T>;
  k.pack_panels = &pack_panels<T>;
  k.store_row = &store_row<T>;
  k.stream_row = &stream_row<T>;
  k.transpose = &transpose<T>;
  k.weighted_sum = &weighted_sum<T>;
  k.axpy = &axpy<T>;
  k.dot_row = &dot_row<T>;
  k.act_fwd = &act_fwd<T>;
  k.act_bwd = &act_bwd<T>;
  return k;
}

}  // namespace

Kernels<float> kernels_f32() { return make_kernels<float>(); }
Kernels<double> kernels_f64() { return make_kernels<double>(); }

}  // namespace moe_ops::cpu::MOE_ISA
