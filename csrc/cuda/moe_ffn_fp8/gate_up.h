// The up product with gate, activation and quantization in its epilogue: h goes to memory as e4m3,
// and the pre-activation does not. For sm_90a and SwiGLU with gate half first; other blocks take
// grouped_gemm_fp8 and a launch for the activation.
#pragma once

#include "moe_ops/grouped_gemm_fp8.h"

namespace moe_ops::cuda::sm90::fp8 {

struct GateUpParams {
  GroupedGemmFp8Params product;  // out_features: 2I; out is not used
  uint8_t* q = nullptr;          // [N, I] contiguous
  float* scale = nullptr;        // [N, I / 128] contiguous
};

// Returns whether the kernel supports a call and is faster: I is a multiple of 128, so that a block
// of scales has rows of one half, and experts have more than 64 rows on average.
bool supports(const GateUpParams& p);

Status gate_up_swiglu(const GateUpParams& p, Stream stream);

}  // namespace moe_ops::cuda::sm90::fp8
