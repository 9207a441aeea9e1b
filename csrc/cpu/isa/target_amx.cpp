// The kernels of AVX512-BF16, and AMX tiles for products of bfloat16.
#define MOE_ISA amx
#define MOE_VEC_BYTES 64
#include <immintrin.h>
#include <stdint.h>

#include "cpu/kernels/kernels.h"

namespace moe_ops::cpu::MOE_ISA {
namespace {

#include "cpu/simd/vector-inl.h"

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

// Multiplies with sums in tiles 0 to 3, tokens in 4 and 5, weights in 6 and 7.
template <int kRowTiles>
void amx_panel_tiles(const AmxPanelParams& p, const TileOut<float>& out, TilePrefetch& prefetch) {
  const uint16_t *a = p.a, *panel = p.panel;
  float* c = out.c;
  const int64_t lda = p.lda, ldc = out.ldc;
  if (out.accumulate) {
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
  for (int64_t k = 0; k < p.k_steps; ++k) {
    prefetch_step(prefetch);
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

void amx_panel(const AmxPanelParams& p, const TileOut<float>& out, TilePrefetch& prefetch) {
  p.row_tiles == 2 ? amx_panel_tiles<2>(p, out, prefetch) : amx_panel_tiles<1>(p, out, prefetch);
}

// Multiplies with weights in tile 6 and one tile of tokens after the other in 7.
template <int kTiles>
void amx_rows_tiles(const AmxRowsParams& p, float* c, int64_t ldc) {
  const uint16_t *w = p.w, *x = p.x;
  const int64_t ldw = p.ldw, ldx = p.ldx;
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
  for (int64_t k = 0; k < p.k_steps; ++k) {
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

void amx_rows(const AmxRowsParams& p, float* c, int64_t ldc) {
  with_count<kAmxTokenTiles>(p.token_tiles,
                             [&]<int kTiles>() { amx_rows_tiles<kTiles>(p, c, ldc); });
}

}  // namespace

Kernels<float> kernels_f32() {
  Kernels<float> k = avx512_bf16::kernels_f32();
  k.gemm.amx = {&amx_begin, &amx_end, &amx_panel, &amx_rows};
  return k;
}

Kernels<double> kernels_f64() { return avx512_bf16::kernels_f64(); }

}  // namespace moe_ops::cpu::MOE_ISA
