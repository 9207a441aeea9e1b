// All kernels of a target, family by family. Users include and take only the family that they need,
// as row_kernels<T>(); the whole is for isa/ and the self-test.
#pragma once

#include "cpu/isa/targets.h"
#include "cpu/kernels/activation.h"
#include "cpu/kernels/attention.h"
#include "cpu/kernels/fp8.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/low_rank.h"
#include "cpu/kernels/mix.h"
#include "cpu/kernels/quant.h"
#include "cpu/kernels/router.h"
#include "cpu/kernels/rows.h"

namespace moe_ops::cpu {

// T is the accumulate type: float for float32, bfloat16 and float16 operands, double for float64.
template <class T>
struct Kernels {
  RowKernels<T> rows;
  GemmKernels<T> gemm;
  ActivationKernels<T> activation;
  AttentionKernels<T> attention;
  LowRankKernels<T> low_rank;
  MixKernels<T> mix;
  RouterKernels<T> router;
  QuantKernels quant;  // T = float only, as is the next
  Fp8Kernels fp8;
};

struct Tables {
  Kernels<float> f32;
  Kernels<double> f64;

  template <class T>
  const Kernels<T>& of() const {
    if constexpr (sizeof(T) == 4) {
      return f32;
    } else {
      return f64;
    }
  }
};

// Those of a target with the numbers of a processor, which need not be of this machine.
enum class Isa : int;
struct Tuning;
Tables tables_for(Isa isa, const Tuning& t);
// Sets the kernels that calls of this thread use, until it is called with nullptr. For the
// self-test.
void use_tables(const Tables* tables);

// Those of each target, in the file of its name. A target that the build lacks is declared only.
#define MOE_DECLARE(name, enumerator, has) \
  namespace name {                         \
  Kernels<float> kernels_f32();            \
  Kernels<double> kernels_f64();           \
  }
MOE_FOR_EACH_TARGET(MOE_DECLARE)
#undef MOE_DECLARE

}  // namespace moe_ops::cpu
