// Vectors of integers, for weights of 8 and 4 bits and their tokens. Included by kernels-inl.h,
// inside its namespace.

constexpr int64_t kVec = MOE_VEC_BYTES;

#if defined(__AVX2__) && MOE_VEC_BYTES >= 32
#if MOE_VEC_BYTES == 64
typedef __m512i Bytes;
inline Bytes load_weights(const void* p) { return _mm512_loadu_si512(p); }
inline Bytes bits_and(Bytes a, Bytes b) { return _mm512_and_si512(a, b); }
inline Vec<float> as_floats(Bytes v) {
  return __builtin_bit_cast(Vec<float>, _mm512_cvtepi32_ps(v));
}
#else
typedef __m256i Bytes;
inline Bytes load_weights(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
inline Bytes bits_and(Bytes a, Bytes b) { return _mm256_and_si256(a, b); }
inline Vec<float> as_floats(Bytes v) {
  return __builtin_bit_cast(Vec<float>, _mm256_cvtepi32_ps(v));
}
#endif

// Returns acc + the products of pairs of 16 bits.
inline Bytes add_words(Bytes acc, Bytes a, Bytes b) {
#if defined(__AVX512VNNI__) && MOE_VEC_BYTES == 64
  return _mm512_dpwssd_epi32(acc, a, b);
#elif MOE_VEC_BYTES == 64
  return _mm512_add_epi32(acc, _mm512_madd_epi16(a, b));
#else
  // One after the other. Left to choose, the compiler multiplies for all sums before it adds, and a
  // tile that needs all 16 registers then keeps sums on the stack.
  Bytes product;
  asm("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+x"(acc), "=&x"(product) : "x"(a), "x"(b));
  return acc;
#endif
}
#endif

// --- tokens as integers

// v * factor to the nearest integer, half of one to the even one.
template <class Factor>
inline Simd<float>::Int nearest(Vec<float> v, const Factor& factor) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  return __builtin_bit_cast(Simd<float>::Int, v * factor + kMagic) -
         __builtin_bit_cast(int32_t, float{kMagic});
}

// Integers that 16 bits hold, in 16 bits.
typedef int16_t Int16 __attribute__((vector_size(MOE_VEC_BYTES / 2)));
inline Int16 int16_of(Simd<float>::Int v) {
  return __builtin_bit_cast(Int16, low_halves(__builtin_bit_cast(Simd<float>::Uint, v) & 0xffffu));
}

// Returns |v| in one operation.
inline Vec<float> magnitude(Vec<float> v) {
  return __builtin_bit_cast(Vec<float>, __builtin_bit_cast(Simd<float>::Uint, v) & 0x7fffffffu);
}

// Returns the largest of n absolute values; `probe` becomes NaN in a lane if one is not finite. x
// is readable and zero up to a multiple of the lanes.
inline float largest(const float* x, int64_t n, Vec<float>& probe) {
  Vec<float> most = {};
  for (int64_t i = 0; i < n; i += kLanes<float>) {
    const Vec<float> v = load<float>(x + i), a = magnitude(v);
    most = a > most ? a : most;
    probe += v * 0.0f;
  }
#if defined(__AVX512F__) && MOE_VEC_BYTES == 64
  return _mm512_reduce_max_ps(__builtin_bit_cast(__m512, most));
#else
  float result = 0;
  for (int i = 0; i < kLanes<float>; ++i) result = most[i] > result ? most[i] : result;
  return result;
#endif
}
