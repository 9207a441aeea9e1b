// rotary: rotates pairs of features by the angle of their token.
#pragma once

#include <cstdint>

#include "moe_ops/common.h"

namespace moe_ops {

struct RotaryParams {
  // [B, S, heads, d]; heads and features of a token are dense, the strides of the rest in elements.
  const void* t;
  DType type;
  int64_t stride_batch, stride_token;
  int64_t batch, num_tokens, heads;
  int64_t half;  // d / 2
  // [B, S, d / 2] in the accumulate type; angles_stride_batch 0: the same for all of B.
  const void *cos, *sin;
  int64_t angles_stride_batch;
  bool inverse;  // by minus the angle
  void* out;     // [B, S, heads, d] contiguous
};

namespace cpu {
void rotary(const RotaryParams& p, const Parallel& par);
}  // namespace cpu

}  // namespace moe_ops
