// moe_linear_map: h[t, k] = W[id[t, k]] x[t] + bias, by slot; slots without an expert get zeros.
#pragma once

#include <cstdint>

#include "moe_ops/common.h"
#include "moe_ops/grouped_gemm.h"
#include "moe_ops/routing.h"

namespace moe_ops {

struct MoeLinearMapParams {
  Routing routing;       // CPU: topk_ids; CUDA: maps
  int64_t out_features;  // O
  int64_t in_features;   // H
  Rows x;                // [T, H], no index
  ExpertMatrices w;      // [E, O, H]
  ExpertVectors bias;    // [E, O] or none
  void* h;               // [T, K, O] contiguous, x's type
};

struct MoeLinearMapBwdParams {
  Routing routing;
  int64_t out_features, in_features;
  const void* grad_h;         // [T, K, O] contiguous, x's type
  Rows x;                     // [T, H], no index
  ExpertMatrices w;           // [E, O, H]; read with grad_x only
  void *grad_x, *grad_w;      // [T, H], [E, O, H] contiguous, x's type; nullptr: not wanted
  void* grad_bias;            // [E, O] contiguous; nullptr: not wanted
  void* workspace = nullptr;  // CUDA: moe_linear_map_bwd_workspace bytes, aligned to 256
};

namespace cpu {
void moe_linear_map(const MoeLinearMapParams& p, const Parallel& par);
void moe_linear_map_bwd(const MoeLinearMapBwdParams& p, const Parallel& par);
}  // namespace cpu

namespace cuda {
int64_t moe_linear_map_bwd_workspace(const MoeLinearMapBwdParams& p);
Status moe_linear_map(const MoeLinearMapParams& p, Stream stream);
Status moe_linear_map_bwd(const MoeLinearMapBwdParams& p, Stream stream);
}  // namespace cuda

}  // namespace moe_ops
