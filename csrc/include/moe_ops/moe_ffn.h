// moe_ffn: the whole expert FFN block, forward and backward. P = 2I for gated activations, else I.
//
// On CUDA all pointers are device pointers, and intermediate tensors between the GEMMs (the
// pre-activation, the activation, an expert's output, and their gradients) are rounded to x's type;
// sums are not.
#pragma once

#include <cstdint>

#include "moe_ops/activation.h"
#include "moe_ops/common.h"
#include "moe_ops/grouped_gemm.h"
#include "moe_ops/routing.h"
#include "moe_ops/sort_by_expert.h"

namespace moe_ops {

// Description shared by all kinds of weights and by forward and backward.
struct MoeFfnDesc {
  Routing routing;
  const void* topk_weights = nullptr;  // [T, K] in the accumulate type
  int64_t hidden_size = 0;             // H
  int64_t intermediate_size = 0;       // I
  ActivationParams act;
  bool apply_router_weight_on_input = false;

  int64_t width() const { return is_gated(act.kind) ? 2 * intermediate_size : intermediate_size; }
};

// Low-rank terms (LoRA) of a weight: w + scale * b a. The rows of one group share a pair of
// factors.
struct LowRankFactors {
  int64_t rank = 0;         // r; 0: none
  const void* a = nullptr;  // [G, r, D] contiguous, accumulate type; D: inputs of the weight
  const void* b = nullptr;  // [G, O, r], likewise; O: outputs of the weight
  bool a_shared = false, b_shared = false;  // the factor is [1, ...]: all rows share it
};

// Low-rank terms of both weights. CPU only.
struct LowRankParams {
  LowRankFactors gate_up, down;
  const int32_t* group_offsets = nullptr;  // [G+1] rows; each expert has G / E groups
  int64_t num_groups = 0;                  // G
  const void* row_scale = nullptr;         // [N] in the accumulate type; 0: a row without terms
  // [N, r] contiguous in the accumulate type: scale * a x and scale * a h. Forward writes and
  // backward reads them.
  void *low_gate_up = nullptr, *low_down = nullptr;
};

// Gradients of the factors in the accumulate type, contiguous; nullptr where not wanted.
struct LowRankGradients {
  void* a_gate_up = nullptr;  // [G, r, H]
  void* b_gate_up = nullptr;  // [G, P, r]
  void* a_down = nullptr;     // [G, r, I]
  void* b_down = nullptr;     // [G, H, r]
};

struct MoeFfnParams {
  MoeFfnDesc desc;                 // on the CPU, the routing may be without maps
  Rows x;                          // [T, H], no index
  const float* x_scale = nullptr;  // [H], factors of x; on the CPU, with float32 sums
  ExpertMatrices w_gate_up;        // [E, P, H]
  ExpertMatrices w_down;           // [E, H, I]
  ExpertVectors b_gate_up;         // [E, P] or none
  ExpertVectors b_down;            // [E, H] or none
  void* y = nullptr;               // [T, H] contiguous, out, of type y_type
  DType y_type = DType::kFloat32;  // x's, or its accumulate type
  void* preact = nullptr;  // [N, P] contiguous, out, x's type; zeros in rows without an expert;
                           // nullptr: not wanted
  const LowRankParams* low_rank = nullptr;
  void* workspace = nullptr;  // CUDA: moe_ffn_workspace bytes, aligned to 256
  // CUDA: makes the routing's maps, which the call does itself where that is faster. Without a
  // pre-activation, row_to_slot need not be written.
  SortByExpertParams sort{};
};

struct MoeFfnBwdParams {
  MoeFfnDesc desc;           // with maps
  Rows grad_y;               // [T, H], no index; on the CPU, x's type or its accumulate type
  Rows x;                    // [T, H], no index
  ExpertMatrices w_gate_up;  // [E, P, H]
  ExpertMatrices w_down;     // [E, H, I]
  ExpertVectors b_down;      // [E, H] or none: enters the gradient of the routing weights
  const void* preact;        // [N, P] contiguous, x's type
  // Outputs, contiguous, x's type unless said, nullptr where not wanted.
  void* grad_x;          // [T, H]
  void* grad_w_gate_up;  // [E, P, H] of type grad_w_gate_up_type
  void* grad_w_down;     // [E, H, I] of type grad_w_down_type
  DType grad_w_gate_up_type, grad_w_down_type;
  bool accumulate_w_gate_up, accumulate_w_down;  // add to what is there
  // CUDA: the gradient is [E, H, P], that of w_down [E, I, H].
  bool transpose_grad_w_gate_up = false, transpose_grad_w_down = false;
  void* grad_b_gate_up;     // [E, P]
  void* grad_b_down;        // [E, H]
  void* grad_topk_weights;  // [T, K] in the accumulate type
  const LowRankParams* low_rank = nullptr;
  LowRankGradients grad_low_rank = {};
  void* workspace = nullptr;  // CUDA: moe_ffn_bwd_workspace bytes, as above
};

namespace cpu {
void moe_ffn(const MoeFfnParams& p, const Parallel& par);
void moe_ffn_bwd(const MoeFfnBwdParams& p, const Parallel& par);
}  // namespace cpu

namespace cuda {
// Return the size of the workspace in bytes.
int64_t moe_ffn_workspace(const MoeFfnParams& p);
int64_t moe_ffn_bwd_workspace(const MoeFfnBwdParams& p);

Status moe_ffn(const MoeFfnParams& p, Stream stream);
Status moe_ffn_bwd(const MoeFfnBwdParams& p, Stream stream);
}  // namespace cuda

}  // namespace moe_ops
