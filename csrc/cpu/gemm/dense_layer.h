// The product of a dense layer.
#pragma once

#include "moe_ops/dense_layer.h"

namespace moe_ops::cpu {

// out = the layer of a, [rows, O] of `type`, contiguous.
inline void multiply(const DenseLayer& layer, const Rows& a, int64_t rows, void* out, DType type,
                     const Parallel& par) {
  const int32_t offsets[] = {0, static_cast<int32_t>(rows)};
  GroupedGemmParams g;
  g.expert_offsets = offsets;
  g.num_experts = 1;
  g.out_features = layer.out_features;
  g.in_features = layer.in_features;
  g.a = a;
  g.b = layer.weight;
  g.bias = layer.bias;
  g.out = {out, type, layer.out_features, nullptr};
  grouped_gemm(g, par);
}

}  // namespace moe_ops::cpu
