// grouped_gemm_fp8: the ragged-M product of float8_e4m3fn operands with a scale for 1 x 128 of a
// and for 128 x 128 of b; grouped_gemm_fp8_wgrad: its weight gradient (ragged K).
#pragma once

#include <cstdint>

#include "moe_ops/common.h"
#include "moe_ops/grouped_gemm.h"
#include "moe_ops/quantize_fp8.h"

namespace moe_ops {

// One matrix [O, K] of e4m3 codes an expert, dense along k, with scales
// [E, ceil(O / 128), ceil(K / 128)].
struct Fp8Matrices {
  const uint8_t* data = nullptr;
  int64_t stride_e = 0, stride_o = 0;
  const float* scale = nullptr;
  int64_t scale_stride_e = 0, scale_stride_o = 0;  // dense along k
};

// out[r, o] = bias[e, o] + sum over blocks kb of a_scale[r, kb] * b_scale[e, o / 128, kb] *
//             (sum over k in the block of a[r, k] * b[e, o, k]), both sums in fp32, k increasing.
struct GroupedGemmFp8Params {
  const int32_t* expert_offsets = nullptr;  // [E+1], from 0, never falling
  int64_t num_experts = 0;                  // E
  int64_t out_features = 0;                 // O
  int64_t in_features = 0;                  // K
  Fp8Rows a;                                // [rows, K]
  Fp8Matrices b;                            // [E, O, K]
  int64_t b_stride_k = 1;                   // else b is dense along O
  ExpertVectors bias;                       // [E, O], or none
  MutableRows out;                          // [rows, O]; float32, bfloat16 or float16
};

// Codes of e4m3 that quantize_fp8_columns made: [features, 128 G], dense, with scales [G,
// features].
struct Fp8Columns {
  const uint8_t* data = nullptr;
  int64_t stride = 0;
  const float* scale = nullptr;
  int64_t scale_stride = 0;  // the scales of a group are dense
};

// out[e, o, k] (+)= sum over the groups g of e of grad_scale[g, o] * a_scale[g, k] *
//                   (sum over the columns c of g of grad[o, c] * a[k, c]), both sums in fp32 and in
//                   order.
struct GroupedGemmFp8WgradParams {
  const int32_t* expert_offsets = nullptr;  // [E+1]
  int64_t num_experts = 0;                  // E
  int64_t num_groups = 0;                   // G
  int64_t out_features = 0;                 // O
  int64_t in_features = 0;                  // K
  Fp8Columns grad;                          // [O, 128 G]
  Fp8Columns a;                             // [K, 128 G]
  void* out = nullptr;                      // [E, O, K] contiguous; every element is written
  DType out_type = DType::kFloat32;         // float32, bfloat16 or float16
  bool accumulate = false;                  // add to out; experts without rows are left alone

  // Returns the largest number of rows that fits the groups.
  constexpr int64_t max_rows() const {
    return kFp8Block * (num_groups - num_experts) + kFp8Block - 1;
  }
};

namespace cpu {
void grouped_gemm_fp8_wgrad(const GroupedGemmFp8WgradParams& p, const Parallel& par);
void grouped_gemm_fp8(const GroupedGemmFp8Params& p, const Parallel& par);
}  // namespace cpu

namespace cuda {

// Row r of the permuted order is row index[r] / index_divisor of codes and scales (r itself when
// index is nullptr); a source row outside [0, limit) counts as zeros.
struct DeviceFp8Rows {
  const uint8_t* data = nullptr;
  int64_t stride = 0;
  const float* scale = nullptr;
  int64_t scale_stride = 0;  // the scales of a row are dense
  const int32_t* index = nullptr;
  int32_t index_divisor = 1;
  int64_t limit = 0;
};

// Device counterpart of moe_ops::GroupedGemmFp8Params; every sum is multiplied by factor(r) before
// the bias is added.
struct GroupedGemmFp8Params {
  const int32_t* expert_offsets = nullptr;  // [E+1]
  int64_t num_experts = 0;                  // E
  int64_t num_rows = 0;                     // N, at least expert_offsets[E]
  int64_t out_features = 0;                 // O
  int64_t in_features = 0;                  // K
  DeviceFp8Rows a;                          // [N, K]
  RowScale factor;                          // [N] fp32
  Fp8Matrices b;                            // [E, O, K]
  ExpertVectors bias;                       // [E, O]; float32, bfloat16 or float16
  MutableRows out;                          // [N, O], no index; float32, bfloat16 or float16
  bool zero_tail = true;  // rows from expert_offsets[E] on become zero; otherwise they stay
};

Status grouped_gemm_fp8(const GroupedGemmFp8Params& p, Stream stream);
Status grouped_gemm_fp8_wgrad(const GroupedGemmFp8WgradParams& p, Stream stream);

}  // namespace cuda

}  // namespace moe_ops
