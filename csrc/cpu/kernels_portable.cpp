// The portable level: 16-byte vectors, which are SSE2 on x86-64 and NEON on 64-bit Arm. Also holds
// the selection among the levels.
#define MOE_ISA portable
#define MOE_VEC_BYTES 16
#define MOE_MR1 8
#define MOE_MR2 4
#define MOE_DOT_TOKENS 2
#define MOE_DOT_MAX_ROWS 2
#include "cpu/cpu_isa.h"
#include "cpu/kernels-inl.h"
#include "cpu/self_test.h"

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

// What the processor decides beside the level.
template <class T>
Kernels<T> tuned(Kernels<T> k) {
  k.pairs_max_rows = pairs_max_rows();
  k.streams_ahead = streams_ahead();
  k.fetch_halves = fetches_halves();
  if (k.stream_rows > most_stream_rows()) k.stream_rows = most_stream_rows();
  k.panel_rows = panel_rows();
  k.dot_ahead = dot_ahead();
  k.dot_max_rows = dot_max_rows(k.dot_max_rows, k.dot_tokens);
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
