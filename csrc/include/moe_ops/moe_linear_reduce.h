// moe_linear_reduce: y[t] = the sum over k of weight[t, k] * (W[id[t, k]] h[t, k] + bias).
#pragma once

#include <cstdint>

#include "moe_ops/common.h"
#include "moe_ops/grouped_gemm.h"
#include "moe_ops/routing.h"

namespace moe_ops {

struct MoeLinearReduceParams {
  Routing routing;            // CPU: topk_ids; CUDA: maps
  const void* topk_weights;   // [T, K] in the accumulate type
  int64_t hidden_size;        // H
  int64_t in_features;        // D
  const void* h;              // [T, K, D] contiguous, w's type
  ExpertMatrices w;           // [E, H, D]
  ExpertVectors bias;         // [E, H] or none
  void* y;                    // [T, H] contiguous, w's type
  void* workspace = nullptr;  // CUDA: moe_linear_reduce_workspace bytes, aligned to 256
};

struct MoeLinearReduceBwdParams {
  Routing routing;
  const void* topk_weights;
  int64_t hidden_size, in_features;
  Rows grad_y;                // [T, H], no index
  const void* h;              // [T, K, D] contiguous
  ExpertMatrices w;           // [E, H, D]
  ExpertVectors bias;         // [E, H] or none: enters the gradient of the routing weights
  void *grad_h, *grad_w;      // [T, K, D], [E, H, D] contiguous, w's type; nullptr: not wanted
  void* grad_topk_weights;    // [T, K] in the accumulate type; nullptr: not wanted
  void* grad_bias;            // [E, H] contiguous, w's type; nullptr: not wanted
  void* workspace = nullptr;  // CUDA: moe_linear_reduce_bwd_workspace bytes, aligned to 256
};

namespace cpu {
void moe_linear_reduce(const MoeLinearReduceParams& p, const Parallel& par);
void moe_linear_reduce_bwd(const MoeLinearReduceBwdParams& p, const Parallel& par);
}  // namespace cpu

namespace cuda {
int64_t moe_linear_reduce_workspace(const MoeLinearReduceParams& p);
int64_t moe_linear_reduce_bwd_workspace(const MoeLinearReduceBwdParams& p);
Status moe_linear_reduce(const MoeLinearReduceParams& p, Stream stream);
Status moe_linear_reduce_bwd(const MoeLinearReduceBwdParams& p, Stream stream);
}  // namespace cuda

}  // namespace moe_ops
