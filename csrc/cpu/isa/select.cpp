// The kernels that all calls use: those of the active target, with the numbers of this processor.
#include <algorithm>
#include <limits>

#include "cpu/isa/isa.h"
#include "cpu/isa/targets.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/self_test.h"

namespace moe_ops::cpu {

namespace {

template <class T>
Kernels<T> kernels_of(Isa isa) {
  switch (isa) {
#define MOE_CASE(name, enumerator, has)           \
  case Isa::enumerator:                           \
    if constexpr (has && sizeof(T) == 4) {        \
      return name::kernels_f32();                 \
    } else if constexpr (has && sizeof(T) == 8) { \
      return name::kernels_f64();                 \
    }                                             \
    break;
    MOE_FOR_EACH_TARGET(MOE_CASE)
#undef MOE_CASE
  }
  return {};
}

template <class T>
Kernels<T> tuned(Kernels<T> k, const Tuning& t) {
  GemmKernels<T>& g = k.gemm;
  const bool avx2 = g.gemv.max_tokens == 2;
  g.bf16_max_rows = t.pairs_max_rows;
  g.prefetch_halves = t.fetch_halves;
  g.packed.stream_distance = t.stream_ahead;
  g.packed.stream_min_bytes =
      avx2 && !t.avx2_streams_ahead ? std::numeric_limits<int64_t>::max() : t.stream_ahead_bank;
  g.packed.stream_rows = std::min(g.packed.stream_rows, t.stream_rows);
  g.packed.max_rows = t.panel_rows;
  g.gemv.prefetch_distance = t.dot_ahead;
  if (avx2) g.gemv.max_rows = std::min(g.gemv.max_rows, t.dot_rows_by_two);
  g.outer.one_pass = t.rank_one_pass;
  g.blocked_gemv.one_pass_min_depth = t.strip_one_pass_depth;
  g.blocked_gemv.max_rows = std::min(g.blocked_gemv.max_rows, t.strip_max_rows);
  g.blocked_gemv.block_k = std::min(g.blocked_gemv.block_k, t.strip_block);
  return k;
}

template <class T>
const Kernels<T>& kernels() {
  static const Kernels<T> k = tuned(kernels_of<T>(active_isa()), tuning());
  return k;
}

}  // namespace

template <class T>
Kernels<T> kernels_for(Isa isa, const Tuning& t) {
  return tuned(kernels_of<T>(isa), t);
}
template Kernels<float> kernels_for<float>(Isa, const Tuning&);
template Kernels<double> kernels_for<double>(Isa, const Tuning&);

const char* failing_kernel(Isa isa) {
  const char* name = failing_kernel(kernels_of<float>(isa), kernels_of<float>(Isa::kPortable));
  if (name != nullptr) return name;
  return failing_kernel(kernels_of<double>(isa), kernels_of<double>(Isa::kPortable));
}

#define MOE_FAMILY(Family, function, member) \
  template <class T>                         \
  const Family<T>& function() {              \
    return kernels<T>().member;              \
  }                                          \
  template const Family<float>& function();  \
  template const Family<double>& function();
MOE_FAMILY(RowKernels, row_kernels, rows)
MOE_FAMILY(GemmKernels, gemm_kernels, gemm)
MOE_FAMILY(ActivationKernels, activation_kernels, activation)
MOE_FAMILY(AttentionKernels, attention_kernels, attention)
MOE_FAMILY(MixKernels, mix_kernels, mix)
MOE_FAMILY(RouterKernels, router_kernels, router)
#undef MOE_FAMILY

const QuantKernels& quant_kernels() { return kernels<float>().quant; }
const Fp8Kernels& fp8_kernels() { return kernels<float>().fp8; }

}  // namespace moe_ops::cpu
