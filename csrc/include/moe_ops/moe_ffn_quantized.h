// moe_ffn_quantized: moe_ffn with quantized weights, which have no gradient. P = 2I for gated
// activations, else I.
#pragma once

#include <cstdint>

#include "moe_ops/moe_ffn.h"

namespace moe_ops {

// Matrices [E, O, D] of `format.bits` bits per weight; see QuantFormat. Every row is dense.
struct QuantizedMatrices {
  const void* data = nullptr;
  int64_t stride_e = 0, stride_o = 0;  // bytes
  QuantFormat format;
};

// Returns the matrices as an operand of grouped GEMM on the CPU; x_type is the type of the tokens.
inline ExpertMatrices matrices_of(const QuantizedMatrices& q, DType x_type) {
  ExpertMatrices m;
  m.data = q.data;
  m.type = x_type;
  m.stride_e = q.stride_e * 8 / q.format.bits;
  m.stride_o = q.stride_o * 8 / q.format.bits;
  m.stride_k = 1;
  m.quant = q.format;
  return m;
}

struct MoeFfnQuantizedParams {
  MoeFfnDesc desc;              // topk_weights in fp32; on the CPU, the routing may be without maps
  Rows x;                       // [T, H], no index; not float64
  const float* x_scale;         // [H], or nullptr: ones
  QuantizedMatrices w_gate_up;  // [E, P, H]
  QuantizedMatrices w_down;     // [E, H, I]
  ExpertVectors b_gate_up;      // [E, P] or none
  ExpertVectors b_down;         // [E, H] or none
  void* y;                      // [T, H] contiguous, out, x's type
  void* preact = nullptr;       // CPU: see MoeFfnParams
  void* workspace = nullptr;    // CUDA: moe_ffn_quantized_workspace bytes, aligned to 256
};

namespace cpu {
void moe_ffn_quantized(const MoeFfnQuantizedParams& p, const Parallel& par);
}  // namespace cpu

// On CUDA, codes are widened exactly and multiply tokens as they are. x times x_scale, the
// activated features and an expert's output are rounded to x's type; sums are in fp32.
namespace cuda {
int64_t moe_ffn_quantized_workspace(const MoeFfnQuantizedParams& p);
Status moe_ffn_quantized(const MoeFfnQuantizedParams& p, Stream stream);
}  // namespace cuda

}  // namespace moe_ops
