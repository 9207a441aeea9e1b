#include "moe_ops/attention_decode.h"

#include "torch/attention_block.h"

namespace moe_ops::adapter {

namespace {

constexpr const char* kOp = "attention_decode";

Tensor attention_decode(const Tensor& x, const Tensor& w_q, const Tensor& w_k, const Tensor& w_v,
                        const Tensor& w_o, const Tensor& cos, const Tensor& sin, const Tensor& keys,
                        const Tensor& values, int64_t start, int64_t rotary_size, double scale,
                        const OptTensor& norm_weight, double eps, const OptTensor& b_q,
                        const OptTensor& b_k, const OptTensor& b_v, const OptTensor& b_o,
                        const OptTensor& w_q_scale, const OptTensor& w_k_scale,
                        const OptTensor& w_v_scale, const OptTensor& w_o_scale,
                        const OptTensor& q_norm, const OptTensor& k_norm, double head_eps,
                        const OptTensor& mask, const OptTensor& sinks, double residual_scale,
                        std::string formats) {
  AttentionDecodeParams p;
  const int64_t end = take_tokens(kOp, p, x, start);
  Kept own_keys = kept_heads(kOp, "keys", keys, x, end);
  Kept own_values = kept_heads(kOp, "values", values, x, end);
  p.keys = own_keys.heads;
  p.values = own_values.heads;
  p.kv_heads = keys.size(1);
  p.head_size = keys.size(3);
  const int64_t d = p.head_size;
  MOE_CHECK(p.kv_heads >= 1 && d >= 1, kOp,
            ": keys must have at least one head of at least one feature, got shape ",
            shape_string(keys), ".");
  check_size(kOp, "values", values, 1, p.kv_heads, "m");
  check_size(kOp, "values", values, 3, d, "d");
  const int64_t H = p.hidden_size, kv_width = p.kv_heads * d;
  const auto names = format_names<4>(kOp, "formats", formats);
  const Dense q = dense_layer(kOp, {"w_q", w_q, w_q_scale, b_q, names[0]}, x, p.type, -1, H);
  const int64_t q_width = q.layer.out_features;
  MOE_CHECK(q_width > 0 && q_width % kv_width == 0, kOp,
            ": w_q must have a multiple of m d = ", kv_width, " features, got shape ",
            shape_string(w_q), ".");
  p.heads = q_width / d;
  const Dense k = dense_layer(kOp, {"w_k", w_k, w_k_scale, b_k, names[1]}, x, p.type, kv_width, H);
  const Dense v = dense_layer(kOp, {"w_v", w_v, w_v_scale, b_v, names[2]}, x, p.type, kv_width, H);
  const Dense o = dense_layer(kOp, {"w_o", w_o, w_o_scale, b_o, names[3]}, x, p.type, H, q_width);
  MOE_CHECK(head_eps >= 0, kOp, ": head_eps must be at least 0, got ", head_eps, ".");
  MOE_CHECK(q_norm.has_value() == k_norm.has_value(), kOp,
            ": q_norm and k_norm must be given together, got one.");
  OptTensor head_q, head_k;
  if (q_norm.has_value()) {
    p.norms_heads = q_norm->dim() != 1 || q_norm->size(0) == d;
    check_vector(kOp, "q_norm", q_norm, x, p.norms_heads ? d : q_width, "d, or n d");
    check_vector(kOp, "k_norm", k_norm, x, p.norms_heads ? d : kv_width, "d, or m d");
    head_q = dense(*q_norm);
    head_k = dense(*k_norm);
  }
  MOE_CHECK(rotary_size >= 0 && rotary_size <= d && rotary_size % 2 == 0, kOp,
            ": rotary_size must be even and from 0 to d = ", d, ", got ", rotary_size, ".");
  p.half = rotary_size / 2;
  const BlockOperands own = take_block(kOp, p,
                                       {.x = x,
                                        .norm_weight = norm_weight,
                                        .eps = eps,
                                        .cos = cos,
                                        .sin = sin,
                                        .mask = mask,
                                        .sinks = sinks,
                                        .scale = scale,
                                        .residual_scale = residual_scale});
  p.query = q.layer;
  p.key = k.layer;
  p.value = v.layer;
  p.out = o.layer;
  p.query_norm = data_of(head_q);
  p.key_norm = data_of(head_k);
  p.head_eps = head_eps;
  Tensor y = empty_cpu(kOp, {p.batch, p.num_tokens, H}, x.scalar_type());
  p.y = y.mutable_data_ptr();
  cpu::attention_decode(p, torch_parallel());
  own_keys.write_back();
  own_values.write_back();
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) {
  m.impl("attention_decode", MOE_BOX(attention_decode));
}

}  // namespace moe_ops::adapter
