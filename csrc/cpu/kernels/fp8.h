// float8_e4m3fn with a scale for each kFp8Block of k (moe_ops/quantize_fp8.h).
#pragma once

#include <cstdint>

#include "cpu/kernels/gemm.h"
#include "moe_ops/common.h"

namespace moe_ops::cpu {

constexpr int kFp8DotTokens = 2;

// GEMV (gemm.h) of at most kFp8DotTokens tokens, which are widened and zero up to a whole vector.
// Scales of weight row f: w_scale[f], of token t: x_scale[t], one a block.
struct Fp8DotParams {
  int features, tokens;
  int64_t k;
  const void* w;
  int64_t ldw;
  const float* const* w_scale;
  const float* x;
  int64_t ldx;
  const float* const* x_scale;
  float* out;
  int64_t ldo, out_step;
};

// sums[i][j] (+)= block[i][j] * row_scale[i] * col_scale[j]; cols is a multiple of lanes.
struct Fp8PromoteParams {
  int64_t rows, cols;
  const float* block;
  int64_t ld_block;
  const float *row_scale, *col_scale;
  float* sums;
  int64_t ld_sums;
  bool accumulate;
};

struct Fp8Kernels {
  // At most kFp8Block numbers as codes; returns their scale.
  float (*quantize)(const float* x, int64_t n, uint8_t* q);
  // Codes as numbers, exact in both types. The second where GemmKernels::has_bf16.
  void (*decode)(const uint8_t* q, float* dst, int64_t n);
  void (*decode_bf16)(const uint8_t* q, uint16_t* dst, int64_t n);
  void (*dot)(const Fp8DotParams& p);
  // Like dot, bitwise, with weights that are already widened to float.
  void (*dot_widened)(const Fp8DotParams& p);
  void (*promote)(const Fp8PromoteParams& p);
};

const Fp8Kernels& fp8_kernels();

}  // namespace moe_ops::cpu
