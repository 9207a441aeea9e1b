// The kernels of the stages for sm_90a: bfloat16 and float16 (instantiations/).
#pragma once

#include "cuda/grouped_gemm/sm90_operands.h"
#include "cuda/moe_ffn/config.h"
#include "cuda/moe_ffn/stages.h"

namespace moe_ops::cuda::sm90 {

// Layout of gate and up of a column in w_gate_up: in two halves, or side by side. Activations
// without a gate use kJoint.
enum class GateUp { kHalves, kJoint };

// Matrices [E, O, K] lie along K, or along O.
inline bool dense_along_k(const ExpertMatrices& w) { return w.stride_k == 1; }

// Returns the weights as a tensor that TMA reads, the dense dimension first.
inline TensorMapDesc ffn_matrices(const ExpertMatrices& w, int64_t num_experts,
                                  int64_t out_features, int64_t in_features) {
  const bool along_k = dense_along_k(w);
  const int64_t lines = along_k ? out_features : in_features;
  const int64_t stride = along_k ? w.stride_o : w.stride_k;
  const int64_t stride_e = num_experts > 1 ? w.stride_e : lines * stride;
  return matrices(matrix(w.data, w.type, along_k ? in_features : out_features, lines, stride),
                  num_experts, stride_e);
}
inline TensorMapDesc ffn_weights(const FfnUpParams& p) {
  const int64_t width = p.intermediate_size * (is_gated(p.act.kind) ? 2 : 1);
  return ffn_matrices(p.w, p.num_experts, width, p.hidden_size);
}
inline TensorMapDesc ffn_weights(const FfnDownBwdParams& p) {
  return ffn_matrices(p.w, p.num_experts, p.hidden_size, p.intermediate_size);
}
inline TensorMapDesc ffn_weights(const FfnDownParams& p) {
  return ffn_matrices(p.w, p.num_experts, p.hidden_size, p.intermediate_size);
}

// A product of few rows an expert: out[r] = act(scale(r) * w[e(r)] rows[r] + bias[e(r)]).
struct FewProduct {
  const int32_t* expert_offsets = nullptr;
  int64_t num_experts = 0;
  int64_t num_rows = 0;
  int64_t out_features = 0;  // of the result: I or H
  int64_t in_features = 0;
  bool gated = false;
  bool activate = false;
  ActivationParams act;
  DeviceRows rows;
  RowScale scale;
  FewSort sort;
  TensorMapDesc block[2];  // gate and up if they are halves, else twice the weights
  bool along_k = true;     // how these lie
  ExpertVectors bias;
  void* out = nullptr;  // [N, out_features]
};

FewProduct few_product(const FfnUpParams& p);
FewProduct few_product(const FfnDownParams& p);

// Runs a product. `rows`: rows of an expert at a time, 32 or 64.
template <DType type, int rows>
Status run_few(const FewProduct& f, Stream stream);

template <DType type, GateUp layout, FfnTile tile>
Status run_up(const FfnUpParams& p, Stream stream);

template <DType type, FfnTile tile>
Status run_down_bwd(const FfnDownBwdParams& p, Stream stream);

}  // namespace moe_ops::cuda::sm90
