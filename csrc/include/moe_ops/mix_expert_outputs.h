// mix_expert_outputs: y[t, m] = sum_e weights[t, m, e] * act(n[t, e]) with n = outputs, or outputs
// normalized over tokens; times factor[t / repeats, m] if there is one. Letters: T tokens, E
// experts, O outputs of one, M mixtures.
#pragma once

#include <cstdint>

#include "moe_ops/common.h"

namespace moe_ops {

enum class MixActivation : int { kNone, kRelu, kSilu, kSigmoid };

// Normalization n of the outputs before they are mixed; operands are [E, O] in the accumulate type.
// If norm_weight is nullptr, n = outputs; otherwise n = (outputs - mean) * norm_weight / sqrt(var +
// eps) + norm_bias.
struct MixNorm {
  const void* norm_weight;
  const void* norm_bias;
  void* mean;
  void* var;  // of all tokens, divided by their number
  double eps;
  bool batch;  // mean and var are those of these tokens, and written by the forward pass
};

// All operands are contiguous and of `type` if not said otherwise.
struct MixExpertOutputsParams {
  DType type;
  MixActivation act;
  int64_t num_tokens, num_experts, size, num_mixtures;  // T, E, O, M
  const void* outputs;                                  // [T, E, O]
  const void* weights;                                  // [T, M, E]
  const void* factor;                                   // [T / repeats, M, O] or nullptr
  int64_t repeats;                                      // divides T
  MixNorm norm;
  void* y;  // [T, M, O], out
};

// Outputs that are nullptr are not wanted, but for grad_outputs.
struct MixExpertOutputsBwdParams {
  DType type;
  MixActivation act;
  int64_t num_tokens, num_experts, size, num_mixtures;
  const void* grad_y;  // [T, M, O]
  const void* outputs;
  const void* weights;
  const void* factor;
  int64_t repeats;
  MixNorm norm;
  void* grad_outputs;  // [T, E, O]
  // [T, E, O] in the accumulate type, scratch: gradients of n, whose sums over tokens those of
  // outputs need. It may be grad_outputs itself. Used where norm.batch.
  void* grad_normed;
  void* grad_weights;      // [T, M, E]
  void* grad_factor;       // [T / repeats, M, O]
  void* grad_norm_weight;  // [E, O] in the accumulate type
  void* grad_norm_bias;
};

namespace cpu {
void mix_expert_outputs(const MixExpertOutputsParams& p, const Parallel& par);
void mix_expert_outputs_bwd(const MixExpertOutputsBwdParams& p, const Parallel& par);
}  // namespace cpu

}  // namespace moe_ops
