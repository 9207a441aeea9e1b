// gated_mlp_decode: a dense network with a gate on few tokens, with the norm before it and the sum after.
#pragma once

#include <cstdint>

#include "moe_ops/activation.h"
#include "moe_ops/common.h"
#include "moe_ops/dense_layer.h"

namespace moe_ops {

struct GatedMlpDecodeParams {
  const void* x = nullptr;            // [T, H] contiguous
  DType type = DType::kFloat32;       // of all but codes
  int64_t num_tokens = 0;             // T
  const void* norm_weight = nullptr;  // [H] or nullptr: no norm
  double eps = 0;
  DenseLayer gate, up, down;  // [I, H] twice, [O, I]
  Activation activation = Activation::kSwiglu;
  const void* output_gate = nullptr;  // [H] or nullptr: its product with norm(x), through sigmoid
  const void* residual = nullptr;     // [T, O] contiguous, or nullptr: zeros
  double residual_scale = 1;          // of what is added to it
  void* y = nullptr;                  // [T, O] contiguous, out
};

namespace cpu {
void gated_mlp_decode(const GatedMlpDecodeParams& p, const Parallel& par);
}  // namespace cpu

}  // namespace moe_ops
