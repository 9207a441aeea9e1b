// The text of every inner loop, compiled once per instruction set. The including file defines
// MOE_ISA (a namespace name), MOE_VEC_BYTES, MOE_MR1, MOE_MR2, MOE_DOT_TOKENS, MOE_DOT_MAX_ROWS.
// With MOE_BASE, a level of the same vectors, kernels for which the instructions that are new make
// no difference are not compiled again but taken from there, as is MOE_DOT_MAX_ROWS.
//
// GNU vector types carry the arithmetic, so one text serves SSE2, AVX2, AVX-512 and NEON;
// intrinsics appear only where the compiler has no good lowering (half conversion, transposes).
// Nothing here may have external linkage or include a header with inline functions: see
// CMakeLists.txt.

#include <stdint.h>

#if defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

#include "cpu/kernels/kernels.h"

namespace moe_ops::cpu::MOE_ISA {
namespace {

#include "cpu/simd/vector-inl.h"
// Names of intrinsics, for sums of lanes and for weights of 8 and 4 bits.
#include "cpu/simd/integers-inl.h"
// All else is built on the vectors.
#include "cpu/kernels/fp8-inl.h"
#include "cpu/kernels/norm-inl.h"
#include "cpu/kernels/pairs-inl.h"
#include "cpu/kernels/rows-inl.h"
#include "cpu/kernels/stream-inl.h"
#include "cpu/kernels/tiles-inl.h"
#include "cpu/simd/functions-inl.h"
// Attention takes the exponential from the functions.
#include "cpu/kernels/attention-inl.h"
#include "cpu/kernels/attention_narrow-inl.h"
// So do what stands between dense products, and mixtures.
#include "cpu/kernels/dense-inl.h"
#include "cpu/kernels/mix-inl.h"
// Sums of lanes are those of mixtures.
#include "cpu/kernels/rotary-inl.h"
#include "cpu/kernels/router-inl.h"
// Words take add_product from the tiles.
#include "cpu/kernels/quant4-inl.h"
#include "cpu/kernels/quant8-inl.h"
// Bytes take the rounding of tokens from 4 bits; words have the table.
#include "cpu/kernels/bytes-inl.h"
#include "cpu/kernels/words-inl.h"

// --- table

template <class T, class S, int NV, bool kColumnForm, int M, int kMax>
void fill_micro(typename Kernels<T>::Micro* table) {
  if constexpr (M <= kMax) {
    table[M - 1] = &micro<T, S, M, NV, kColumnForm>;
    fill_micro<T, S, NV, kColumnForm, M + 1, kMax>(table);
  }
}

template <class T, int NV, int M, int kMax>
void fill_copying_micro(typename Kernels<T>::CopyingMicro* table) {
  if constexpr (M <= kMax) {
    table[M - 1] = &copying_micro<T, M, NV>;
    fill_copying_micro<T, NV, M + 1, kMax>(table);
  }
}

template <class T, class S, int M>
void fill_panel_tiles(typename Kernels<T>::PanelTile* table) {
  if constexpr (M <= MOE_MR2) {
    table[M - 1] = &panel_tile<T, S, M>;
    fill_panel_tiles<T, S, M + 1>(table);
  }
}

template <class T, class S, int M>
void fill_panel_streams(typename Kernels<T>::PanelStreams (*table)[kMaxStreamRows]) {
  if constexpr (M <= kStreamRows) {
    table[false][M - 1] = &panel_streams<T, S, M, false>;
    table[true][M - 1] = &panel_streams<T, S, M, true>;
    fill_panel_streams<T, S, M + 1>(table);
  }
}

#if defined(MOE_BASE)
template <class T>
Kernels<T> first_kernels() {
  return MOE_BASE::kernels_f32();
}
#else
// Those that write no half type and multiply neither pairs nor integers.
template <class T>
Kernels<T> first_kernels() {
  Kernels<T> k = {};
  k.lanes = kLanes<T>;
  k.mr1 = MOE_MR1;
  k.mr2 = MOE_MR2;
  k.dot_tokens = MOE_DOT_TOKENS;
  k.streams = MOE_VEC_BYTES >= 32;
  k.dot_max_rows = MOE_DOT_MAX_ROWS;
  k.strip_depth_of_row = kStripDepths;
  fill_micro<T, T, 1, false, 1, MOE_MR1>(k.row_a[0]);
  fill_micro<T, T, 2, false, 1, MOE_MR2>(k.row_a[1]);
  fill_micro<T, T, 1, true, 1, MOE_MR1>(k.col_a[0]);
  fill_micro<T, T, 2, true, 1, MOE_MR2>(k.col_a[1]);
  fill_copying_micro<T, 1, 1, MOE_MR2>(k.copying_row_a[0]);
  fill_copying_micro<T, 2, 1, MOE_MR2>(k.copying_row_a[1]);
  fill_panel_tiles<T, T, 1>(k.panel_tile[static_cast<int>(kAccumulate<T>)]);
  k.tile_lines = kTileLines;
  k.stream_rows = kStreamRows;
  for (int m = 1; m <= kStreamRows; ++m) k.num_panel_streams[m - 1] = num_panel_streams(m);
  fill_panel_streams<T, T, 1>(k.panel_streams[static_cast<int>(kAccumulate<T>)]);
  if constexpr (sizeof(T) == 4) {
    fill_panel_tiles<T, Bf16, 1>(k.panel_tile[static_cast<int>(DType::kBFloat16)]);
    fill_panel_streams<T, Bf16, 1>(k.panel_streams[static_cast<int>(DType::kBFloat16)]);
    fill_panel_tiles<T, Fp16, 1>(k.panel_tile[static_cast<int>(DType::kFloat16)]);
    fill_panel_streams<T, Fp16, 1>(k.panel_streams[static_cast<int>(DType::kFloat16)]);
    k.strip_widen = &strip_widen;
    k.widen_panel[static_cast<int>(DType::kBFloat16)] = &widen_panel<T, Bf16>;
    k.widen_tiles[static_cast<int>(DType::kBFloat16)] = MOE_VEC_BYTES == 64 ? 0 : 9;
    k.widen_panel[static_cast<int>(DType::kFloat16)] = &widen_panel<T, Fp16>;
    k.widen_tiles[static_cast<int>(DType::kFloat16)] = MOE_VEC_BYTES == 64 ? 2 : 3;
  }
  k.dot = &dot<T>;
  k.strip_tokens = kStripTokens;
  k.strip_max_rows = kStripMaxRows;
  k.strip_block = kStripBlockBytes / static_cast<int64_t>(sizeof(T));
  k.strip = &strip<T, T>;
  k.strip_sums = &strip_sums<T>;
  k.rank_update = &rank_update<T>;
  k.load_row = &load_row<T>;
  k.load_rows = &load_rows<T>;
  k.pack_panels = &pack_panels<T>;
  k.gather_rows = &gather_rows<T>;
  k.dot_rows = &dot_rows<T>;
  k.transpose = &transpose<T>;
  k.weighted_sum = &weighted_sum<T>;
  k.axpy = &axpy<T>;
  k.dot_row = &dot_row<T>;
  k.rotate_rows = &rotate_rows<T>;
  k.router_linear = &router_linear<T>;
  k.router_linear_bwd = &router_linear_bwd<T>;
  k.act_fwd = &act_fwd<T>;
  k.act_bwd = &act_bwd<T>;
  k.act_rows = &act_rows<T>;
  k.act_bwd_rows = &act_bwd_rows<T>;
  k.dense = dense_kernels<T>();
  k.attention = attention_kernels<T>();
  narrow_kernels(k.attention);
  k.mix = mix_kernels<T>();
  return k;
}
#endif

template <class T>
Kernels<T> make_kernels() {
  Kernels<T> k = first_kernels<T>();
  if constexpr (sizeof(T) == 4) {
#if defined(__AVX512BF16__) && MOE_VEC_BYTES == 64
    k.pairs = true;
    fill_micro<T, Pair, 1, false, 1, MOE_MR1>(k.pair_row_a[0]);
    fill_micro<T, Pair, 2, false, 1, MOE_MR2>(k.pair_row_a[1]);
    fill_micro<T, Pair, 1, true, 1, MOE_MR1>(k.pair_col_a[0]);
    fill_micro<T, Pair, 2, true, 1, MOE_MR2>(k.pair_col_a[1]);
    fill_panel_tiles<T, Pair, 1>(k.pair_panel_tile);
    fill_panel_streams<T, Pair, 1>(k.pair_panel_streams);
    k.pair_dot = &pair_dot;
    k.pair_rank_update = &pair_rank_update;
    k.pair_strip = &strip<T, Pair>;
    k.pack_pairs = &pack_pairs;
    k.pair_rows = &pair_rows;
#endif
    k.quant = quant_kernels();
    k.fp8 = fp8_kernels();
  }
  k.store_rows = &store_rows<T>;
  k.scatter_rows = &scatter_rows<T>;
  k.combine_rows = &combine_rows<T>;
  k.store_row = &store_row<T>;
  k.stream_row = &stream_row<T>;
  k.stream_fence = &stream_fence;
  k.norm_rows = &norm_rows<T>;
  k.norm_rows_bwd = &norm_rows_bwd<T>;
  return k;
}

}  // namespace

Kernels<float> kernels_f32() { return make_kernels<float>(); }
#if defined(MOE_BASE)
Kernels<double> kernels_f64() { return MOE_BASE::kernels_f64(); }
#else
Kernels<double> kernels_f64() { return make_kernels<double>(); }
#endif

}  // namespace moe_ops::cpu::MOE_ISA
