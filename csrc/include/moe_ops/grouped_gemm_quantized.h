// grouped_gemm_quantized on the device: grouped_gemm with quantized weights, which are read as they
// are stored. The CPU's is cpu::grouped_gemm.
#pragma once

#include "moe_ops/moe_ffn_quantized.h"

namespace moe_ops::cuda {

// out[r] = b[e(r)] a[r] + bias[e(r)]. Codes are widened exactly and multiply a as it is; sums are
// in fp32, and out is rounded to a's type. Rows from expert_offsets[E] on become zero.
struct GroupedGemmQuantizedParams {
  const int32_t* expert_offsets = nullptr;  // [E+1]
  int64_t num_experts = 0;                  // E
  int64_t num_rows = 0;                     // N, at least expert_offsets[E]
  int64_t out_features = 0;                 // O
  int64_t in_features = 0;                  // K
  Rows a;                                   // [N, K], no index; not float64
  QuantizedMatrices b;                      // [E, O, K]
  ExpertVectors bias;                       // [E, O] or none
  void* out = nullptr;                      // [N, O] contiguous, a's type
  void* workspace = nullptr;                // grouped_gemm_quantized_workspace bytes
};

int64_t grouped_gemm_quantized_workspace(const GroupedGemmQuantizedParams& p);
Status grouped_gemm_quantized(const GroupedGemmQuantizedParams& p, Stream stream);

}  // namespace moe_ops::cuda
