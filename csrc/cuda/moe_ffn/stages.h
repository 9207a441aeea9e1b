// The stages of moe_ffn that have kernels of their own, for sm_90a. supports() says whether they
// take a call (bfloat16 or float16, rows of 16-byte pieces); others are composed of grouped_gemm
// and gated_act. P = 2I for gated activations, else I. Rows past the last expert's stay as they are
// unless said.
#pragma once

#include "moe_ops/activation.h"
#include "moe_ops/grouped_gemm.h"

namespace moe_ops::cuda {

// Maps that a stage computes itself: those of sort_by_expert.h except row_to_slot, which no later
// stage of inference reads. In slot_to_row, -1 is a slot without an expert.
struct FewSort {
  IndexMap ids;  // [T, K]; data is nullptr: rows are sorted
  int num_slots = 0, top_k = 0;
  int32_t* expert_offsets = nullptr;  // [E+1], out
  int32_t* slot_to_row = nullptr;     // [T, K], out
};

constexpr int kFewSortByExpert = 1024, kFewSortExperts = 1024;

// h[r] = act(scale(r) * w[e(r)] x[r] + bias[e(r)])
struct FfnUpParams {
  const int32_t* expert_offsets = nullptr;  // [E+1]
  int64_t num_experts = 0;                  // E
  int64_t num_rows = 0;                     // N, at least expert_offsets[E]
  int64_t hidden_size = 0;                  // H
  int64_t intermediate_size = 0;            // I
  ActivationParams act;
  DeviceRows x;            // [N, H] by index
  RowScale x_scale;        // [N]
  ExpertMatrices w;        // [E, P, H]
  ExpertVectors bias;      // [E, P] or none
  void* h = nullptr;       // [N, I] contiguous, out, x's type
  void* preact = nullptr;  // [N, P] contiguous, out, or not wanted; rows past the last become zero
  FewSort sort;            // only where sorts_few() is true
};

bool supports(const FfnUpParams& p);
// Returns whether a supported stage can sort the slots itself: few tokens, no scale.
bool sorts_few(const FfnUpParams& p);
Status ffn_up(const FfnUpParams& p, Stream stream);

// out[r] = w[e(r)] h[r] + bias[e(r)] for few tokens, no more than kFfnFewTokens: weights are read
// once, by as many blocks as there are.
struct FfnDownParams {
  const int32_t* expert_offsets = nullptr;
  int64_t num_experts = 0;
  int64_t num_rows = 0;
  int64_t num_tokens = 0;  // T
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  DeviceRows h;         // [N, I]
  ExpertMatrices w;     // [E, H, I]
  ExpertVectors bias;   // [E, H] or none
  void* out = nullptr;  // [N, H] contiguous, out
};

constexpr int64_t kFfnFewTokens = 64;

bool supports(const FfnDownParams& p);
Status ffn_down(const FfnDownParams& p, Stream stream);

// Columns of I that give one partial sum of a routing weight's gradient.
constexpr int64_t kFfnPartialColumns = 128;

// u[r] = w[e(r)]^T grad_y[r]; from u and the pre-activation: h[r] = weight(r) * act(preact[r]),
// dpre[r] = weight(r) * its gradient. With weight_on_input neither carries the weight, and
// dpre_weighted does.
struct FfnDownBwdParams {
  const int32_t* expert_offsets = nullptr;
  int64_t num_experts = 0;
  int64_t num_rows = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  ActivationParams act;
  DeviceRows grad_y;  // [N, H] by index
  RowScale weight;    // [N]
  bool weight_on_input = false;
  ExpertMatrices w;               // [E, H, I]
  const void* preact = nullptr;   // [N, P] contiguous
  void* dpre = nullptr;           // [N, P] contiguous, out, x's type, or not wanted
  void* dpre_weighted = nullptr;  // as dpre, or not wanted
  void* h = nullptr;              // [N, I] contiguous, out, or not wanted
  // [N, ceil(I / kFfnPartialColumns)] out, or not wanted: <act(preact[r]), u[r]> by columns.
  float* partial = nullptr;
};

bool supports(const FfnDownBwdParams& p);
Status ffn_down_bwd(const FfnDownBwdParams& p, Stream stream);

// grad_topk_weights[row_to_slot[r]] = sum of partial[r] + <b_down[e(r)], grad_y[r]>, in a fixed
// order; zero where r has no expert.
struct FfnRouterGradParams {
  const int32_t* expert_offsets = nullptr;
  int64_t num_experts = 0;
  int64_t num_rows = 0;
  int64_t hidden_size = 0;
  int64_t num_partials = 0;        // of a row
  const float* partial = nullptr;  // [N, num_partials]
  DeviceRows grad_y;               // [N, H] by index; read with b_down only
  ExpertVectors b_down;            // [E, H] or none
  const int32_t* row_to_slot = nullptr;
  float* grad_topk_weights = nullptr;  // [N] by slot, out
};

Status ffn_router_grad(const FfnRouterGradParams& p, Stream stream);

}  // namespace moe_ops::cuda
