// The source of every inner loop, compiled once per target. The including file (isa/target_*.cpp)
// defines MOE_ISA (a namespace name), MOE_VEC_BYTES, MOE_MR1, MOE_MR2, MOE_DOT_TOKENS,
// MOE_DOT_MAX_ROWS. With MOE_BASE, a target of the same vectors, kernels to which the added
// instructions make no difference are not compiled again but taken from there.
//
// GNU vector types carry the arithmetic, so one source serves SSE2, AVX2, AVX-512 and NEON;
// intrinsics appear only where the compiler has no good lowering (half conversion, transposes).
// Nothing here may have external linkage or include a header with inline functions: see
// CMakeLists.txt.

#include <stdint.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "cpu/kernels/kernels.h"

namespace moe_ops::cpu::MOE_ISA {
namespace {

// Each file may use those above it; the last one of a family fills its table.
// clang-format off
#include "cpu/simd/vector-inl.h"
#include "cpu/simd/integers-inl.h"
#include "cpu/simd/reduce-inl.h"
#include "cpu/simd/math-inl.h"
#include "cpu/kernels/norm-inl.h"
#include "cpu/kernels/rotary-inl.h"
#include "cpu/kernels/rows-inl.h"
#include "cpu/kernels/gemm_bf16-inl.h"
#include "cpu/kernels/gemv-inl.h"
#include "cpu/kernels/gemm_tiles-inl.h"
#include "cpu/kernels/activation-inl.h"
#include "cpu/kernels/dense-inl.h"
#include "cpu/kernels/attention-inl.h"
#include "cpu/kernels/attention_narrow-inl.h"
#include "cpu/kernels/low_rank-inl.h"
#include "cpu/kernels/mix-inl.h"
#include "cpu/kernels/router_score-inl.h"
#include "cpu/kernels/router_choice-inl.h"
#include "cpu/kernels/router_soa-inl.h"
#include "cpu/kernels/router_linear-inl.h"
#include "cpu/kernels/fp8-inl.h"
#include "cpu/kernels/quant_scales-inl.h"
#include "cpu/kernels/quant_codes-inl.h"
#include "cpu/kernels/quant_w4-inl.h"
#include "cpu/kernels/quant_w4_dot-inl.h"
#include "cpu/kernels/quant_w8-inl.h"
#include "cpu/kernels/quant_int8-inl.h"
#include "cpu/kernels/quant_decoded-inl.h"
#include "cpu/kernels/quant_repack-inl.h"
// clang-format on

template <class T>
Kernels<T> make_kernels() {
  Kernels<T> k = {};
#if defined(MOE_BASE)
  k = MOE_BASE::kernels_f32();
#else
  k.activation = activation_table<T>();
  k.attention = attention_table<T>();
  k.low_rank = low_rank_table<T>();
  k.mix = mix_table<T>();
  k.router = router_table<T>();
#endif
  fill_rows(k.rows);
  fill_gemm(k.gemm);
  if constexpr (sizeof(T) == 4) {
    k.quant = quant_table();
    k.fp8 = fp8_table();
  }
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
