#include "moe_ops/attention_step.h"

#include <cmath>

#include "torch/dense_layer.h"

namespace moe_ops::adapter {

namespace {

constexpr const char* kOp = "attention_step";

// [B, m, L, d], written in place.
KeptHeads<void> kept_heads(const char* name, const Tensor& t, const Tensor& x, int64_t end) {
  check_same_dtype(kOp, name, t, "x", x);
  check_dim(kOp, name, t, 4, "[B, m, L, d]");
  check_size(kOp, name, t, 0, x.size(0), "B");
  MOE_CHECK(t.size(2) >= end, kOp, ": ", name, " must have room for start + S = ", end,
            " tokens, got shape ", shape_string(t), ".");
  MOE_CHECK(t.size(3) <= 1 || t.stride(3) == 1, kOp, ": ", name,
            " must have features side by side, got shape ", shape_string(t), " with a stride of ",
            t.stride(3), " in dimension 3.");
  for (int64_t d = 0; d < 3; ++d) {
    MOE_CHECK(t.size(d) <= 1 || t.stride(d) != 0, kOp, ": ", name,
              " must have memory of its own for each element, got an expanded tensor of shape ",
              shape_string(t), ".");
  }
  KeptHeads<void> heads;
  heads.data = const_cast<void*>(t.const_data_ptr());
  heads.stride_batch = t.stride(0);
  heads.stride_head = t.stride(1);
  heads.stride_token = t.size(2) <= 1 ? std::max<int64_t>(t.size(3), 1) : t.stride(2);
  return heads;
}

// What kernels wrote into a copy.
void write_back(const Tensor& copy, const Tensor& t) {
  Tensor target = t;
  torch::stable::copy_(target, copy);
}

void check_angles(const char* name, const Tensor& t, const Tensor& x, int64_t half) {
  check_float(kOp, name, t);
  check_dim(kOp, name, t, 3, "[B or 1, S, r]");
  MOE_CHECK(t.size(0) == x.size(0) || t.size(0) == 1, kOp, ": ", name, " must have B = ", x.size(0),
            " or 1 in dimension 0, got shape ", shape_string(t), ".");
  check_size(kOp, name, t, 1, x.size(1), "S");
  MOE_CHECK(t.size(2) >= half, kOp, ": ", name, " must have at least rotary_size / 2 = ", half,
            " angles a token, got shape ", shape_string(t), ".");
}

// Numbers that kernels for x can read: those for float64 read nothing else, the others all else.
Tensor readable(const Tensor& t, const Tensor& x) {
  const bool wide = x.scalar_type() == ScalarType::Double;
  if ((t.scalar_type() == ScalarType::Double) == wide) return with_dense_rows(t);
  return contiguous_as(t, accumulate_type(x.scalar_type()));
}

int64_t stride_unless_one(const Tensor& t, int64_t d) { return t.size(d) == 1 ? 0 : t.stride(d); }

Tensor attention_step(const Tensor& x, const Tensor& w_q, const Tensor& w_k, const Tensor& w_v,
                      const Tensor& w_o, const Tensor& cos, const Tensor& sin, const Tensor& keys,
                      const Tensor& values, int64_t start, int64_t rotary_size, double scale,
                      const OptTensor& norm_weight, double eps, const OptTensor& b_q,
                      const OptTensor& b_k, const OptTensor& b_v, const OptTensor& b_o,
                      const OptTensor& w_q_scale, const OptTensor& w_k_scale,
                      const OptTensor& w_v_scale, const OptTensor& w_o_scale,
                      const OptTensor& q_norm, const OptTensor& k_norm, double head_eps,
                      const OptTensor& mask, const OptTensor& sinks, double residual_scale) {
  AttentionStepParams p;
  p.type = check_float(kOp, "x", x);
  check_dim(kOp, "x", x, 3, "[B, S, H]");
  p.batch = x.size(0);
  p.num_tokens = x.size(1);
  p.hidden_size = x.size(2);
  MOE_CHECK(start >= 0 && start <= std::numeric_limits<int32_t>::max() - p.num_tokens, kOp,
            ": start must be from 0 to 2^31 - 1 - S, got ", start, ".");
  const int64_t end = start + p.num_tokens;
  Tensor own_keys = aligned(keys), own_values = aligned(values);
  p.keys = kept_heads("keys", own_keys, x, end);
  p.values = kept_heads("values", own_values, x, end);
  p.kv_heads = keys.size(1);
  p.head_size = keys.size(3);
  const int64_t d = p.head_size;
  MOE_CHECK(p.kv_heads >= 1 && d >= 1, kOp,
            ": keys must have at least one head of at least one feature, got shape ",
            shape_string(keys), ".");
  check_size(kOp, "values", values, 1, p.kv_heads, "m");
  check_size(kOp, "values", values, 3, d, "d");
  const int64_t H = p.hidden_size, kv_width = p.kv_heads * d;
  const Dense q = dense_layer(kOp, "w_q", w_q, w_q_scale, b_q, x, p.type, -1, H);
  const int64_t q_width = q.layer.out_features;
  MOE_CHECK(q_width > 0 && q_width % kv_width == 0, kOp,
            ": w_q must have a multiple of m d = ", kv_width, " features, got shape ",
            shape_string(w_q), ".");
  p.heads = q_width / d;
  const Dense k = dense_layer(kOp, "w_k", w_k, w_k_scale, b_k, x, p.type, kv_width, H);
  const Dense v = dense_layer(kOp, "w_v", w_v, w_v_scale, b_v, x, p.type, kv_width, H);
  const Dense o = dense_layer(kOp, "w_o", w_o, w_o_scale, b_o, x, p.type, H, q_width);
  check_vector(kOp, "norm_weight", norm_weight, x, H, "H");
  MOE_CHECK(eps >= 0, kOp, ": eps must be at least 0, got ", eps, ".");
  MOE_CHECK(head_eps >= 0, kOp, ": head_eps must be at least 0, got ", head_eps, ".");
  MOE_CHECK(q_norm.has_value() == k_norm.has_value(), kOp,
            ": q_norm and k_norm must be given together, got one.");
  if (q_norm.has_value()) {
    p.norms_heads = q_norm->dim() != 1 || q_norm->size(0) == d;
    check_vector(kOp, "q_norm", q_norm, x, p.norms_heads ? d : q_width, "d, or n d");
    check_vector(kOp, "k_norm", k_norm, x, p.norms_heads ? d : kv_width, "d, or m d");
  }
  MOE_CHECK(rotary_size >= 0 && rotary_size <= d && rotary_size % 2 == 0, kOp,
            ": rotary_size must be even and from 0 to d = ", d, ", got ", rotary_size, ".");
  p.half = rotary_size / 2;
  check_angles("cos", cos, x, p.half);
  check_angles("sin", sin, x, p.half);
  check_same_dtype(kOp, "sin", sin, "cos", cos);
  MOE_CHECK(std::isfinite(scale), kOp, ": scale must be finite, got ", scale, ".");
  MOE_CHECK(std::isfinite(residual_scale), kOp, ": residual_scale must be finite, got ",
            residual_scale, ".");
  check_vector(kOp, "sinks", sinks, x, p.heads, "the number of query heads");
  check_num_slots(kOp, "x", p.batch * p.num_tokens * p.heads);

  OptTensor seen;
  if (mask.has_value()) {
    p.mask.is_bool = mask->scalar_type() == ScalarType::Bool;
    if (!p.mask.is_bool) check_float(kOp, "mask", *mask);
    check_device(kOp, "mask", *mask);
    check_dim(kOp, "mask", *mask, 4, "[B or 1, 1, S, start + S]");
    MOE_CHECK(mask->size(0) == p.batch || mask->size(0) == 1, kOp, ": mask must have B = ", p.batch,
              " or 1 in dimension 0, got shape ", shape_string(*mask), ".");
    check_size(kOp, "mask", *mask, 1, 1, "the heads");
    check_size(kOp, "mask", *mask, 2, p.num_tokens, "S");
    check_size(kOp, "mask", *mask, 3, end, "start + S");
    seen = p.mask.is_bool ? with_dense_rows(*mask) : readable(*mask, x);
    if (!p.mask.is_bool) p.mask.type = check_float(kOp, "mask", *seen);
    p.mask.data = seen->const_data_ptr();
    p.mask.stride_batch = stride_unless_one(*seen, 0);
    p.mask.stride_token = stride_unless_one(*seen, 2);
  }
  Tensor src = dense(x), c = readable(cos, x), s = readable(sin, x);
  // Both with the strides of one.
  if (c.stride(0) != s.stride(0) || c.stride(1) != s.stride(1)) {
    c = dense(c);
    s = dense(s);
  }
  OptTensor norm, head_q, head_k, sink;
  if (norm_weight.has_value()) norm = dense(*norm_weight);
  if (q_norm.has_value()) {
    head_q = dense(*q_norm);
    head_k = dense(*k_norm);
  }
  if (sinks.has_value()) sink = dense(*sinks);
  const auto data = [](const OptTensor& t) {
    return t.has_value() ? t->const_data_ptr() : nullptr;
  };
  Tensor y = empty_cpu(kOp, {p.batch, p.num_tokens, H}, x.scalar_type());
  p.x = src.const_data_ptr();
  p.norm_weight = data(norm);
  p.eps = eps;
  p.query = q.layer;
  p.key = k.layer;
  p.value = v.layer;
  p.out = o.layer;
  p.query_norm = data(head_q);
  p.key_norm = data(head_k);
  p.head_eps = head_eps;
  p.cos = c.const_data_ptr();
  p.sin = s.const_data_ptr();
  p.angle_type = check_float(kOp, "cos", c);
  p.angle_stride_batch = stride_unless_one(c, 0);
  p.angle_stride_token = c.stride(1);
  p.start = start;
  p.sinks = data(sink);
  p.scale = scale;
  p.residual_scale = residual_scale;
  p.y = y.mutable_data_ptr();
  cpu::attention_step(p, torch_parallel());
  if (!is_aligned(keys)) write_back(own_keys, keys);
  if (!is_aligned(values)) write_back(own_values, values);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) { m.impl("attention_step", MOE_BOX(attention_step)); }

}  // namespace moe_ops::adapter
