// Vectors of integers, for weights of 8 and 4 bits. Included by kernels-inl.h, inside its
// namespace.

constexpr int64_t kVec = MOE_VEC_BYTES;

template <class T>
inline T load_bytes(const void* p) {
  T v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

#if defined(__AVX2__) && MOE_VEC_BYTES >= 32
#if MOE_VEC_BYTES == 64
typedef __m512i Bytes;
#define MOE_INT(name) _mm512_##name
inline Bytes load_weights(const void* p) { return _mm512_loadu_si512(p); }
inline Bytes bits_and(Bytes a, Bytes b) { return _mm512_and_si512(a, b); }
inline Vec<float> as_floats(Bytes v) {
  return __builtin_bit_cast(Vec<float>, _mm512_cvtepi32_ps(v));
}
#else
typedef __m256i Bytes;
#define MOE_INT(name) _mm256_##name
inline Bytes load_weights(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
inline Bytes bits_and(Bytes a, Bytes b) { return _mm256_and_si256(a, b); }
inline Vec<float> as_floats(Bytes v) {
  return __builtin_bit_cast(Vec<float>, _mm256_cvtepi32_ps(v));
}
#endif

// acc + the products of pairs of 16 bits.
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
