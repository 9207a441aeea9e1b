// A dense layer among the operands of a whole block.
#pragma once

#include "moe_ops/grouped_gemm.h"

namespace moe_ops {

// One matrix [O, K] and its bias, stored as the weights of a single expert.
struct DenseLayer {
  ExpertMatrices weight;
  ExpertVectors bias;
  int64_t out_features = 0, in_features = 0;
};

}  // namespace moe_ops
