// Pairs of bfloat16 of adjacent k. Included by kernels-inl.h, inside its namespace.

#if defined(__AVX512BF16__) && MOE_VEC_BYTES == 64
typedef uint16_t HalfBits __attribute__((vector_size(64)));

// Return elements 0 to 15 of two rows interleaved, and elements 16 to 31.
inline __m512i first_pairs(__m512i even, __m512i odd) {
  constexpr HalfBits lo = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                           8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  return _mm512_permutex2var_epi16(even, __builtin_bit_cast(__m512i, lo), odd);
}

inline __m512i last_pairs(__m512i even, __m512i odd) {
  constexpr HalfBits hi = {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                           24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
  return _mm512_permutex2var_epi16(even, __builtin_bit_cast(__m512i, hi), odd);
}

// Packs row pair by row pair over all panels, so that each row is read contiguously.
void bf16_pack_b(const uint16_t* const* rows, int64_t offset, int64_t num_rows, int64_t cols,
                 uint16_t* dst, int64_t stride) {
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
      _mm512_storeu_si512(out, first_pairs(v0, v1));
      _mm512_storeu_si512(out + 32, last_pairs(v0, v1));
    }
  }
}

void bf16_interleave(const uint16_t* even, const uint16_t* odd, float* dst, int64_t n) {
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
