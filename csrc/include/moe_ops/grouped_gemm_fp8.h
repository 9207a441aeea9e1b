// grouped_gemm_fp8: the ragged-M product of float8_e4m3fn operands with a scale for 1 x 128 of a
// and for 128 x 128 of b.
#pragma once

#include <cstdint>

#include "moe_ops/common.h"
#include "moe_ops/grouped_gemm.h"
#include "moe_ops/quantize_fp8.h"

namespace moe_ops {

// One matrix [O, K] of e4m3 codes an expert, with scales [E, ceil(O / 128), ceil(K / 128)].
struct Fp8Matrices {
  const uint8_t* data = nullptr;
  int64_t stride_e = 0, stride_o = 0, stride_k = 1;  // the CPU kernels want stride_k = 1
  const float* scale = nullptr;
  int64_t scale_stride_e = 0, scale_stride_o = 0;  // dense along k
};

// out[r, o] = bias[e, o] + sum over blocks kb of a_scale[r, kb] * b_scale[e, o / 128, kb] *
//             (sum over k in the block of a[r, k] * b[e, o, k]), both sums in fp32, k increasing.
struct GroupedGemmFp8Params {
  const int64_t* expert_offsets = nullptr;  // [E+1], from 0, never falling
  int64_t num_experts = 0;                  // E
  int64_t out_features = 0;                 // O
  int64_t in_features = 0;                  // K
  Fp8Rows a;                                // [rows, K]
  Fp8Matrices b;                            // [E, O, K]
  ExpertVectors bias;                       // [E, O], or none
  MutableRows out;                          // [rows, O]; float32, bfloat16 or float16
};

namespace cpu {
void grouped_gemm_fp8(const GroupedGemmFp8Params& p, const Parallel& par);
}  // namespace cpu

}  // namespace moe_ops
