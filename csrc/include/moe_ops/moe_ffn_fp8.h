// moe_ffn_fp8: moe_ffn with e4m3 weights that have a scale per 128 x 128 block, forward only. P =
// 2I for gated activations, else I.
#pragma once

#include <cstdint>

#include "moe_ops/grouped_gemm_fp8.h"
#include "moe_ops/moe_ffn.h"

namespace moe_ops {

// x is quantized per token in blocks of 1 x 128, unless it is passed quantized, and rows are
// gathered from the result; the activated features are quantized per row. A routing weight on the
// input multiplies the sums of the up projection, which equals scaling the token's scales.
struct MoeFfnFp8Params {
  MoeFfnDesc desc;  // topk_weights in fp32; on the CPU, the routing may be
                    // without maps
  Rows x;           // [T, H], no index; not float64; not read if has_codes
  bool has_codes = false;
  Fp8Rows x_codes;            // x as codes with scales, no index
  Fp8Matrices w_gate_up;      // [E, P, H]
  Fp8Matrices w_down;         // [E, H, I]
  ExpertVectors b_gate_up;    // [E, P] or none
  ExpertVectors b_down;       // [E, H] or none
  void* y = nullptr;          // [T, H] contiguous, out
  DType y_type;               // float32, bfloat16 or float16
  void* workspace = nullptr;  // CUDA: moe_ffn_fp8_workspace bytes, aligned to 256
};

namespace cpu {
void moe_ffn_fp8(const MoeFfnFp8Params& p, const Parallel& par);
}  // namespace cpu

namespace cuda {
int64_t moe_ffn_fp8_workspace(const MoeFfnFp8Params& p);
Status moe_ffn_fp8(const MoeFfnFp8Params& p, Stream stream);
}  // namespace cuda

}  // namespace moe_ops
