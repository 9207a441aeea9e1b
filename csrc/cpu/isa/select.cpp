// The kernels that all calls use: those of the active target, with the numbers of this processor.
#include <algorithm>
#include <atomic>

#include "cpu/isa/isa.h"
#include "cpu/isa/targets.h"
#include "cpu/isa/tuning.h"
#include "cpu/kernels/kernels.h"

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
  g.bf16_max_rows = t.bf16_max_rows;
  g.prefetch_halves = t.prefetch_halves;
  g.packed.stream_distance = t.stream_distance;
  g.packed.stream_min_bytes =
      avx2 && !t.avx2_prefetches_streams ? Tuning::kNoLimit : t.stream_min_bytes;
  g.packed.stream_rows = std::min(g.packed.stream_rows, t.stream_rows);
  for (int m = g.packed.stream_rows; m < kMaxStreamRows; ++m) {  // Nothing calls these now.
    for (auto& of_type : g.packed.streams) of_type[0][m] = of_type[1][m] = nullptr;
    g.packed.bf16_streams[0][m] = g.packed.bf16_streams[1][m] = nullptr;
  }
  g.packed.max_rows = t.packed_max_rows;
  g.gemv.prefetch_distance = t.gemv_distance;
  if (avx2) g.gemv.max_rows = std::min(g.gemv.max_rows, t.avx2_gemv_max_rows);
  g.outer.one_pass = t.outer_one_pass;
  g.blocked_gemv.one_pass_min_depth = t.blocked_one_pass_min_depth;
  g.blocked_gemv.max_rows = std::min(g.blocked_gemv.max_rows, t.blocked_max_rows);
  g.blocked_gemv.block_k = std::min(g.blocked_gemv.block_k, t.blocked_k);
  return k;
}

// Those of a target under test, for the calls of this thread. A thread-local variable costs every
// call a function call, so it is looked at only while some thread tests a target. (The model
// initial-exec would save that too, but puts all thread-local variables of the library, 4 KiB of
// the CUDA runtime among them, into memory of which a library that is loaded late gets no more
// than 2.)
thread_local const Tables* tested = nullptr;
std::atomic<int> testing = 0;  // threads with tables under test

template <class T>
const Kernels<T>& kernels() {
  if (testing.load(std::memory_order_relaxed) != 0 && tested != nullptr) [[unlikely]]
    return tested->of<T>();
  static const Kernels<T> active = tuned(kernels_of<T>(active_isa()), tuning());
  return active;
}

}  // namespace

Tables tables_for(Isa isa, const Tuning& t) {
  return {tuned(kernels_of<float>(isa), t), tuned(kernels_of<double>(isa), t)};
}

void use_tables(const Tables* tables) {
  testing += int{tables != nullptr} - int{tested != nullptr};
  tested = tables;
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
MOE_FAMILY(LowRankKernels, low_rank_kernels, low_rank)
MOE_FAMILY(MixKernels, mix_kernels, mix)
MOE_FAMILY(RouterKernels, router_kernels, router)
#undef MOE_FAMILY

const QuantKernels& quant_kernels() { return kernels<float>().quant; }
const Fp8Kernels& fp8_kernels() { return kernels<float>().fp8; }

}  // namespace moe_ops::cpu
