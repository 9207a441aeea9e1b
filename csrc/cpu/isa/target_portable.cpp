// The portable level: 16-byte vectors, which are SSE2 on x86-64 and NEON on 64-bit Arm. Also holds
// the selection among the levels.
#define MOE_ISA portable
#define MOE_VEC_BYTES 16
#define MOE_MR1 8
#define MOE_MR2 4
#define MOE_DOT_TOKENS 2
#define MOE_DOT_MAX_ROWS 2
#include <algorithm>
#include <limits>

#include "cpu/isa/isa.h"
#include "cpu/kernels/kernels-inl.h"
#include "cpu/kernels/self_test.h"

namespace moe_ops::cpu {

#if defined(__x86_64__)
#if defined(MOE_OPS_HAS_AMX)
#define MOE_SELECT_AMX(isa, fn) (isa) == Isa::kAmx ? amx::fn():
#else
#define MOE_SELECT_AMX(isa, fn)
#endif
#define MOE_SELECT(isa, fn)                                             \
  (MOE_SELECT_AMX(isa, fn)(isa) == Isa::kAvx512Bf16 ? avx512_bf16::fn() \
   : (isa) == Isa::kAvx512                          ? avx512::fn()      \
   : (isa) == Isa::kAvx2                            ? avx2::fn()        \
                                                    : portable::fn())
#else
#define MOE_SELECT(isa, fn) portable::fn()
#endif

const char* failing_kernel(Isa isa) {
  const char* name = failing_kernel(MOE_SELECT(isa, kernels_f32), portable::kernels_f32());
  if (name != nullptr) return name;
  return failing_kernel(MOE_SELECT(isa, kernels_f64), portable::kernels_f64());
}

namespace {

template <class T>
Kernels<T> tuned(Kernels<T> k) {
  const Tuning& t = tuning();
  k.pairs_max_rows = t.pairs_max_rows;
  k.stream_ahead = t.stream_ahead;
  const bool avx2 = k.dot_tokens == 2;
  k.stream_ahead_bank =
      avx2 && !t.avx2_streams_ahead ? std::numeric_limits<int64_t>::max() : t.stream_ahead_bank;
  k.fetch_halves = t.fetch_halves;
  k.stream_rows = std::min(k.stream_rows, t.stream_rows);
  k.panel_rows = t.panel_rows;
  k.dot_ahead = t.dot_ahead;
  if (avx2) k.dot_max_rows = std::min(k.dot_max_rows, t.dot_rows_by_two);
  k.rank_one_pass = t.rank_one_pass;
  k.strip_one_pass_depth = t.strip_one_pass_depth;
  k.strip_max_rows = std::min(k.strip_max_rows, t.strip_max_rows);
  k.strip_block = std::min(k.strip_block, t.strip_block);
  return k;
}

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
  static const Kernels<float> k = tuned(MOE_SELECT(active_isa(), kernels_f32));
  return k;
}

template <>
const Kernels<double>& kernels<double>() {
  static const Kernels<double> k = tuned(MOE_SELECT(active_isa(), kernels_f64));
  return k;
}

}  // namespace moe_ops::cpu
