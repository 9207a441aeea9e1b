// Pairs of bfloat16 of adjacent k, and AMX tiles of them. Included by kernels-inl.h, inside its
// namespace.

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
