// Vectors, the element types in memory, and the ways between them. Included by kernels-inl.h,
// inside its namespace.
//
// GNU vector types, which GCC and Clang lower to any instruction set, carry nearly all arithmetic
// as plain operators, and this folder adds the few hundred lines that are missing: half types,
// reductions, elementary functions. A library as Highway would bring tens of thousands of lines, a
// build dependency and its own names for operators; its gain, length-agnostic vectors (SVE, RVV)
// and MSVC, is not needed here, because tiles are sized for the registers of a known target.

// Intrinsics of the width of a vector.
#if MOE_VEC_BYTES == 64
#define MOE_INT(name) _mm512_##name
typedef __m512 Floats;
typedef __m512d Doubles;
#elif MOE_VEC_BYTES == 32
#define MOE_INT(name) _mm256_##name
typedef __m256 Floats;
typedef __m256d Doubles;
#endif

template <class T>
struct Simd;

template <>
struct Simd<float> {
  static constexpr int kLanes = MOE_VEC_BYTES / 4;
  typedef float Vec __attribute__((vector_size(MOE_VEC_BYTES)));
  typedef int32_t Int __attribute__((vector_size(MOE_VEC_BYTES)));
  typedef float Unaligned __attribute__((vector_size(MOE_VEC_BYTES), aligned(1), may_alias));
  typedef uint16_t Half __attribute__((vector_size(MOE_VEC_BYTES / 2)));
  typedef uint16_t HalfUnaligned
      __attribute__((vector_size(MOE_VEC_BYTES / 2), aligned(1), may_alias));
  typedef uint32_t Uint __attribute__((vector_size(MOE_VEC_BYTES)));
  using WordOf = uint32_t;
  using Word = Uint;
};

template <>
struct Simd<double> {
  static constexpr int kLanes = MOE_VEC_BYTES / 8;
  typedef double Vec __attribute__((vector_size(MOE_VEC_BYTES)));
  typedef int64_t Int __attribute__((vector_size(MOE_VEC_BYTES)));
  typedef double Unaligned __attribute__((vector_size(MOE_VEC_BYTES), aligned(1), may_alias));
  using WordOf = uint64_t;
  typedef uint64_t Word __attribute__((vector_size(MOE_VEC_BYTES)));
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

template <class T>
inline T load_bytes(const void* p) {
  T v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
inline void store_bytes(void* p, const T& v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// Returns acc + a * b, one of kSums sums of a loop. A compiler emits one instruction, rounded once,
// or two where that shortens the chain of a sum that is alone in its loop (GCC's avoid-fma-chains).
// A row would then have other bits alone than it has among others.
template <class T, int kSums>
inline Vec<T> add_one_of(Vec<T> acc, Vec<T> a, Vec<T> b) {
#if defined(__AVX2__) && MOE_VEC_BYTES >= 32
  if constexpr (kSums == 1) {
    const auto cast = []<class To>(To, Vec<T> v) { return __builtin_bit_cast(To, v); };
    if constexpr (sizeof(T) == 4) {
      const Floats f{};
      return __builtin_bit_cast(Vec<T>, MOE_INT(fmadd_ps)(cast(f, a), cast(f, b), cast(f, acc)));
    } else {
      const Doubles d{};
      return __builtin_bit_cast(Vec<T>, MOE_INT(fmadd_pd)(cast(d, a), cast(d, b), cast(d, acc)));
    }
  }
#endif
  return acc + a * b;
}

// Returns a vector whose lane i is lane order[i] of a, or of a followed by b. The order is a
// constant, for which Clang, which has no __builtin_shuffle, also emits one shuffle.
template <class V, class Order>
inline V shuffle(V a, Order order) {
#if defined(__clang__)
  V out = a;
  for (unsigned i = 0; i < sizeof(V) / sizeof(a[0]); ++i) out[i] = a[order[i]];
  return out;
#else
  return __builtin_shuffle(a, order);
#endif
}

template <class V, class Order>
inline V shuffle(V a, V b, Order order) {
#if defined(__clang__)
  constexpr int kCount = sizeof(V) / sizeof(a[0]);
  V out = a;
  for (int i = 0; i < kCount; ++i) {
    out[i] = order[i] < kCount ? a[order[i]] : b[order[i] - kCount];
  }
  return out;
#else
  return __builtin_shuffle(a, b, order);
#endif
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
  // exponent: it is exact and also normalizes subnormals.
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

// 16 bits to 32 and back. For __builtin_convertvector, GCC 12 splits a vector in two, converts the
// halves and joins them: five instructions on the port of shuffles instead of one.
inline Simd<float>::Uint widen(Simd<float>::Half half) {
  using F = Simd<float>;
#if defined(__AVX512F__) && MOE_VEC_BYTES == 64
  return __builtin_bit_cast(F::Uint, _mm512_cvtepu16_epi32(__builtin_bit_cast(__m256i, half)));
#elif defined(__AVX2__) && MOE_VEC_BYTES == 32
  return __builtin_bit_cast(F::Uint, _mm256_cvtepu16_epi32(__builtin_bit_cast(__m128i, half)));
#else
  return __builtin_convertvector(half, F::Uint);
#endif
}

// The upper halves have to be zero.
inline Simd<float>::Half low_halves(Simd<float>::Uint v) {
  using F = Simd<float>;
#if defined(__AVX512F__) && MOE_VEC_BYTES == 64
  return __builtin_bit_cast(F::Half, _mm512_cvtepi32_epi16(__builtin_bit_cast(__m512i, v)));
#elif defined(__AVX2__) && MOE_VEC_BYTES == 32
  const auto w = __builtin_bit_cast(__m256i, v);
  return __builtin_bit_cast(
      F::Half, _mm_packus_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
#else
  return __builtin_convertvector(v, F::Half);
#endif
}

template <class S>
inline Vec<float> load_as(const S* p) {
  using F = Simd<float>;
  if constexpr (sizeof(S) == 4) {
    return load<float>(reinterpret_cast<const float*>(p));
  } else {
    const auto half = *reinterpret_cast<const F::HalfUnaligned*>(p);
    if constexpr (kIsBf16<S>) {
      return __builtin_bit_cast(Vec<float>, widen(half) << 16);
    } else {
#if defined(__AVX512F__) && MOE_VEC_BYTES == 64
      return __builtin_bit_cast(Vec<float>,
                                _mm512_cvtph_ps(__builtin_bit_cast(__m256i, F::Half(half))));
#elif defined(__F16C__) && MOE_VEC_BYTES == 32
      return __builtin_bit_cast(Vec<float>,
                                _mm256_cvtph_ps(__builtin_bit_cast(__m128i, F::Half(half))));
#else
      const F::Uint wide = widen(half);
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
  // A NaN keeps its upper half, made quiet, so that no carry changes it to another value.
  const F::Uint u = __builtin_bit_cast(F::Uint, v);
  const F::Uint rounded = u + 0x7fffu + (u >> 16 & 1u);
  return low_halves((v != v ? u | 0x400000u : rounded) >> 16);
#endif
}

#if defined(__AVX512BF16__) && MOE_VEC_BYTES == 64
// Returns the two vectors as one of 32 elements of bfloat16.
inline __m512i narrow_two(Vec<float> low, Vec<float> high) {
  return __builtin_bit_cast(__m512i, _mm512_cvtne2ps_pbh(__builtin_bit_cast(__m512, high),
                                                         __builtin_bit_cast(__m512, low)));
}
#endif

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

// Calls fn.template operator()<value>() with the one of `values` that equals v.
template <auto... values, class V, class Fn>
inline void with_value(V v, const Fn& fn) {
  (void)((v == values && (fn.template operator()<values>(), true)) || ...);
}

// Calls fn.template operator()<count>() for a count from 1 to kMost.
template <int kMost, class Fn>
inline void with_count(int count, const Fn& fn) {
  if constexpr (kMost > 1) {
    if (count < kMost) return with_count<kMost - 1>(count, fn);
  }
  fn.template operator()<kMost>();
}

// Calls fn.template operator()<count>() for all counts from 1 to kMost.
template <int kMost, class Fn>
inline void for_each_count(const Fn& fn) {
  if constexpr (kMost > 1) for_each_count<kMost - 1>(fn);
  fn.template operator()<kMost>();
}

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

// Prefetches the lines of one step.
inline void prefetch_step(TilePrefetch& p) {
  for (int64_t line = p.lines_per_step; line > 0 && p.rows > 0; --line) {
    __builtin_prefetch(p.base + p.offset + p.turn, 0, 2);
    p.turn = p.half - p.turn;
    if (p.turn != 0) continue;
    p.offset += 64;
    if (p.offset >= p.bytes) {
      p.offset = 0;
      p.base += p.stride;
      --p.rows;
    }
  }
}
