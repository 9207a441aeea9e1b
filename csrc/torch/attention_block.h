// Operands that blocks of attention on a few new tokens share, whatever their projections are.
#pragma once

#include <cmath>

#include "moe_ops/attention_block.h"
#include "torch/dense_layer.h"

namespace moe_ops::adapter {

// A cache [B, m, L, d] that is written in place, and what kernels write: itself, or a copy.
struct Kept {
  Tensor own, tensor;
  KeptHeads<void> heads;

  void write_back() {
    if (!is_aligned(own)) torch::stable::copy_(own, tensor);
  }
};

// Checks a cache that gets tokens up to `end`.
inline void check_heads(const Op& op, const char* name, const Tensor& t, const Tensor& x,
                        int64_t end) {
  check_same_dtype(op, name, t, "x", x);
  check_dim(op, name, t, 4, "[B, m, L, d]");
  check_size(op, name, t, 0, x.size(0), "B");
  MOE_CHECK(t.size(2) >= end, op, ": ", name, " must have room for start + S = ", end,
            " tokens, got shape ", shape_string(t), ".");
  MOE_CHECK(t.size(3) <= 1 || t.stride(3) == 1, op, ": ", name,
            " must have features side by side, got shape ", shape_string(t), " with a stride of ",
            t.stride(3), " in dimension 3.");
  for (int64_t d = 0; d < 3; ++d) {
    MOE_CHECK(t.size(d) <= 1 || t.stride(d) != 0, op, ": ", name,
              " must have memory of its own for each element, got an expanded tensor of shape ",
              shape_string(t), ".");
  }
}

inline Kept kept_heads(const Op& op, const char* name, const Tensor& t, const Tensor& x,
                       int64_t end) {
  check_heads(op, name, t, x, end);
  Kept kept{t, aligned(t), {}};
  const Tensor& into = kept.tensor;
  kept.heads.data = const_cast<void*>(into.const_data_ptr());
  kept.heads.stride_batch = into.stride(0);
  kept.heads.stride_head = into.stride(1);
  kept.heads.stride_token = into.size(2) <= 1 ? std::max<int64_t>(into.size(3), 1) : into.stride(2);
  return kept;
}

// Returns `t` in a type that kernels for x can read: kernels for float64 read only float64, the
// others all other types.
inline Tensor readable(const Tensor& t, const Tensor& x) {
  const bool wide = x.scalar_type() == ScalarType::Double;
  if ((t.scalar_type() == ScalarType::Double) == wide) return with_dense_rows(t);
  return contiguous_as(t, accumulate_type(x.scalar_type()));
}

inline int64_t stride_unless_one(const Tensor& t, int64_t d) {
  return t.size(d) == 1 ? 0 : t.stride(d);
}

// Sets x's sizes [B, S, H] and the position of its tokens; returns the number of cached tokens
// after the call.
inline int64_t take_tokens(const Op& op, AttentionBlock& p, const Tensor& x, int64_t start) {
  p.type = check_float(op, "x", x);
  check_dim(op, "x", x, 3, "[B, S, H]");
  p.batch = x.size(0);
  p.num_tokens = x.size(1);
  p.hidden_size = x.size(2);
  MOE_CHECK(start >= 0 && start <= std::numeric_limits<int32_t>::max() - p.num_tokens, op,
            ": start must be from 0 to 2^31 - 1 - S, got ", start, ".");
  p.start = start;
  return start + p.num_tokens;
}

inline void check_angles(const Op& op, const char* name, const Tensor& t, const Tensor& x,
                         int64_t half) {
  check_float(op, name, t);
  check_dim(op, name, t, 3, "[B or 1, S, r]");
  MOE_CHECK(t.size(0) == x.size(0) || t.size(0) == 1, op, ": ", name, " must have B = ", x.size(0),
            " or 1 in dimension 0, got shape ", shape_string(t), ".");
  check_size(op, name, t, 1, x.size(1), "S");
  MOE_CHECK(t.size(2) >= half, op, ": ", name, " must have at least rotary_size / 2 = ", half,
            " angles a token, got shape ", shape_string(t), ".");
}

// Arguments of a block that do not depend on its projections.
struct BlockInputs {
  const Tensor& x;               // [B, S, H]
  const OptTensor& norm_weight;  // [H] or none: no norm
  double eps;
  const Tensor& cos;       // [B or 1, S, r], r at least half the rotary size
  const Tensor& sin;       // like cos
  const OptTensor& mask;   // [B or 1, 1, S, start + S], bool or added to scores, or none
  const OptTensor& sinks;  // [heads] or none
  double scale;            // of the scores
  double residual_scale;   // of the block's output before x is added
};

// Operands of a block, and what keeps their memory alive.
struct BlockOperands {
  Tensor x, cos, sin;
  OptTensor norm_weight, mask, sinks;
};

inline const void* data_of(const OptTensor& t) {
  return t.has_value() ? t->const_data_ptr() : nullptr;
}

// Checks and sets everything but tokens, heads, `half` and the output projection, which `p` has
// already.
inline BlockOperands take_block(const Op& op, AttentionBlock& p, const BlockInputs& in) {
  const auto& [x, norm_weight, eps, cos, sin, mask, sinks, scale, residual_scale] = in;
  check_vector(op, "norm_weight", norm_weight, x, p.hidden_size, "H");
  MOE_CHECK(eps >= 0, op, ": eps must be at least 0, got ", eps, ".");
  check_angles(op, "cos", cos, x, p.half);
  check_angles(op, "sin", sin, x, p.half);
  check_same_dtype(op, "sin", sin, "cos", cos);
  MOE_CHECK(std::isfinite(scale), op, ": scale must be finite, got ", scale, ".");
  MOE_CHECK(std::isfinite(residual_scale), op, ": residual_scale must be finite, got ",
            residual_scale, ".");
  check_vector(op, "sinks", sinks, x, p.heads, "the number of query heads");
  check_num_slots(op, "x", p.batch * p.num_tokens * p.heads);

  BlockOperands own{dense(x), readable(cos, x), readable(sin, x), {}, {}, {}};
  if (mask.has_value()) {
    const int64_t end = p.start + p.num_tokens;
    p.mask.is_bool = mask->scalar_type() == ScalarType::Bool;
    if (!p.mask.is_bool) check_float(op, "mask", *mask);
    check_device(op, "mask", *mask);
    check_dim(op, "mask", *mask, 4, "[B or 1, 1, S, start + S]");
    MOE_CHECK(mask->size(0) == p.batch || mask->size(0) == 1, op, ": mask must have B = ", p.batch,
              " or 1 in dimension 0, got shape ", shape_string(*mask), ".");
    check_size(op, "mask", *mask, 1, 1, "the heads");
    check_size(op, "mask", *mask, 2, p.num_tokens, "S");
    check_size(op, "mask", *mask, 3, end, "start + S");
    own.mask = p.mask.is_bool ? with_dense_rows(*mask) : readable(*mask, x);
    if (!p.mask.is_bool) p.mask.type = check_float(op, "mask", *own.mask);
    p.mask.data = own.mask->const_data_ptr();
    p.mask.stride_batch = stride_unless_one(*own.mask, 0);
    p.mask.stride_token = stride_unless_one(*own.mask, 2);
  }
  // Both with the strides of one.
  if (own.cos.stride(0) != own.sin.stride(0) || own.cos.stride(1) != own.sin.stride(1)) {
    own.cos = dense(own.cos);
    own.sin = dense(own.sin);
  }
  if (norm_weight.has_value()) own.norm_weight = dense(*norm_weight);
  if (sinks.has_value()) own.sinks = dense(*sinks);
  p.x = own.x.const_data_ptr();
  p.norm_weight = data_of(own.norm_weight);
  p.eps = eps;
  p.cos = own.cos.const_data_ptr();
  p.sin = own.sin.const_data_ptr();
  p.angle_type = check_float(op, "cos", own.cos);
  p.angle_stride_batch = stride_unless_one(own.cos, 0);
  p.angle_stride_token = own.cos.stride(1);
  p.sinks = data_of(own.sinks);
  p.scale = scale;
  p.residual_scale = residual_scale;
  return own;
}

}  // namespace moe_ops::adapter
