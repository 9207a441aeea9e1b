// The attention block of a decoder layer on a few new tokens, as far as its keys and values may be
// made in any way: what attention_decode and mla_decode have in common.
#pragma once

#include <cstdint>

#include "moe_ops/common.h"
#include "moe_ops/dense_layer.h"

namespace moe_ops {

// [B, m, L, d]; features are dense, the other strides in elements.
template <class P>
struct KeptHeads {
  P* data = nullptr;
  int64_t stride_batch = 0, stride_head = 0, stride_token = 0;
};

// [B, 1, S, L], keys are dense: whether a query sees a key, or what is added to its score. The
// strides in elements.
struct AttentionMask {
  const void* data = nullptr;  // nullptr: a query sees its own token and those before
  bool is_bool = false;        // a byte each; otherwise numbers of `type`
  DType type = DType::kFloat32;
  int64_t stride_batch = 0, stride_token = 0;
};

struct AttentionBlock {
  const void* x = nullptr;                             // [B, S, H] contiguous
  DType type = DType::kFloat32;                        // of x, y, what is kept, norms and sinks
  int64_t batch = 0, num_tokens = 0, hidden_size = 0;  // B, S, H
  int64_t heads = 0;                                   // n, of queries
  const void* norm_weight = nullptr;                   // [H] or nullptr: no norm
  double eps = 0;
  DenseLayer out;  // of what all heads give
  // [B, S, half] in angle_type, the last dense
  const void *cos = nullptr, *sin = nullptr;
  DType angle_type = DType::kFloat32;
  int64_t angle_stride_batch = 0, angle_stride_token = 0;
  int64_t half = 0;   // 2 * half features of a head are rotated
  int64_t start = 0;  // tokens before these: what is kept is read up to there, and written
  AttentionMask mask;
  const void* sinks = nullptr;  // [n] or nullptr: a score of each head that has no value
  double scale = 1;             // of scores
  double residual_scale = 1;    // y = x + residual_scale * attention
  void* y = nullptr;            // [B, S, H] contiguous, out
};

}  // namespace moe_ops
