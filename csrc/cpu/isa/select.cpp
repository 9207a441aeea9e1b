// The kernels that all calls use: those of the active target, with the numbers of this processor.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/isa/isa.h"
#include "cpu/isa/self_test.h"
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
Kernels<T> tuned(Kernels<T> k, const Tuning& t = tuning()) {
  GemmKernels<T>& g = k.gemm;
  const bool avx2 = g.gemv.max_tokens == 2;
  g.bf16_max_rows = t.bf16_max_rows;
  g.prefetch_halves = t.prefetch_halves;
  g.packed.stream_distance = t.stream_distance;
  g.packed.stream_min_bytes =
      avx2 && !t.avx2_prefetches_streams ? Tuning::kNoLimit : t.stream_min_bytes;
  g.packed.stream_rows = std::min(g.packed.stream_rows, t.stream_rows);
  g.packed.max_rows = t.packed_max_rows;
  g.gemv.prefetch_distance = t.gemv_distance;
  if (avx2) g.gemv.max_rows = std::min(g.gemv.max_rows, t.avx2_gemv_max_rows);
  g.outer.one_pass = t.outer_one_pass;
  g.blocked_gemv.one_pass_min_depth = t.blocked_one_pass_min_depth;
  g.blocked_gemv.max_rows = std::min(g.blocked_gemv.max_rows, t.blocked_max_rows);
  g.blocked_gemv.block_k = std::min(g.blocked_gemv.block_k, t.blocked_k);
  return k;
}

// Those of a target under test, for the calls of this thread. Read by every call, so without the
// function call that a library's thread-local variables would otherwise cost.
#if defined(__linux__)
#define MOE_TLS __attribute__((tls_model("initial-exec"))) thread_local
#else
#define MOE_TLS thread_local
#endif
MOE_TLS const Kernels<float>* tested_f32 = nullptr;
MOE_TLS const Kernels<double>* tested_f64 = nullptr;

template <class T>
const Kernels<T>& active_kernels() {
  static const Kernels<T> k = tuned(kernels_of<T>(active_isa()));
  return k;
}

template <class T>
const Kernels<T>& kernels() {
  if constexpr (sizeof(T) == 4) {
    if (tested_f32 != nullptr) [[unlikely]]
      return *tested_f32;
  } else {
    if (tested_f64 != nullptr) [[unlikely]]
      return *tested_f64;
  }
  return active_kernels<T>();
}

// The results of a self-test with the kernels of a target.
std::vector<SelfTest::Result> results_of(Isa isa, DType type) {
  const Kernels<float> f32 = tuned(kernels_of<float>(isa));
  const Kernels<double> f64 = tuned(kernels_of<double>(isa));
  tested_f32 = &f32;
  tested_f64 = &f64;
  std::vector<SelfTest::Result> results = SelfTest(type).run();
  tested_f32 = nullptr;
  tested_f64 = nullptr;
  return results;
}

template <class T>
bool close(const SelfTest::Result& a, const SelfTest::Result& b) {
  if (a.tolerance < 0) return a.data == b.data;
  const int64_t n = static_cast<int64_t>(a.data.size()) / dtype_size(a.type);
  std::vector<T> x(static_cast<size_t>(n)), y(x);
  const RowKernels<T> portable = kernels_of<T>(Isa::kPortable).rows;
  portable.load_row(a.type, a.data.data(), x.data(), n, T(1));
  portable.load_row(b.type, b.data.data(), y.data(), n, T(1));
  T most = 1;
  for (const T v : y) most = std::max(most, std::isfinite(v) ? std::abs(v) : T(0));
  for (int64_t i = 0; i < n; ++i) {
    if (x[i] != y[i] && !(std::abs(x[i] - y[i]) <= a.tolerance * most)) return false;
  }
  return true;
}

}  // namespace

template <class T>
Kernels<T> kernels_for(Isa isa, const Tuning& t) {
  return tuned(kernels_of<T>(isa), t);
}
template Kernels<float> kernels_for<float>(Isa, const Tuning&);
template Kernels<double> kernels_for<double>(Isa, const Tuning&);

const char* failing_kernel(Isa isa) {
  const char* tile = failing_tile(kernels_of<float>(isa));
  if (tile == nullptr) tile = failing_tile(kernels_of<double>(isa));
  if (tile != nullptr) return tile;
  for (const DType type : {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64}) {
    const std::vector<SelfTest::Result> right = results_of(Isa::kPortable, type);
    const std::vector<SelfTest::Result> found = results_of(isa, type);
    for (size_t i = 0; i < right.size(); ++i) {
      const bool wide = right[i].type == DType::kFloat64;
      if (!(wide ? close<double> : close<float>)(found[i], right[i])) return right[i].name;
    }
  }
  return nullptr;
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
