// token_cross_entropy: -log softmax(logits)[target] of each token, and its gradient.
#pragma once

#include <cstdint>

#include "moe_ops/common.h"

namespace moe_ops {

struct TokenCrossEntropyParams {
  const void* logits;  // [T, V], rows stride elements apart
  DType type;          // of logits and grad
  int64_t stride;
  int64_t num_tokens, vocab;
  const int64_t* targets;  // [T] in [0, V), or negative: loss and gradient are zero
  void* losses;            // [T], accumulate type
  void* grad;              // [T, V] contiguous
};

namespace cpu {
void token_cross_entropy(const TokenCrossEntropyParams& p, const Parallel& par);
}  // namespace cpu

}  // namespace moe_ops
