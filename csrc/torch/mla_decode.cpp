#include "moe_ops/mla_decode.h"

#include "torch/attention_block.h"

namespace moe_ops::adapter {

namespace {

constexpr const char* kOp = "mla_decode";

Tensor mla_decode(const Tensor& x, const Tensor& w_q, const Tensor& w_kv_a, const Tensor& kv_norm,
                  const Tensor& w_kv_b, const Tensor& w_o, const Tensor& cos, const Tensor& sin,
                  const Tensor& latents, const Tensor& rope_keys, int64_t start, int64_t num_heads,
                  double scale, const OptTensor& norm_weight, double eps, const OptTensor& w_q_a,
                  const OptTensor& q_norm, double latent_eps, const OptTensor& b_q,
                  const OptTensor& b_q_a, const OptTensor& b_kv_a, const OptTensor& b_o,
                  const OptTensor& w_q_scale, const OptTensor& w_q_a_scale,
                  const OptTensor& w_kv_a_scale, const OptTensor& w_o_scale, bool interleaved,
                  bool interleaved_keys, const OptTensor& mask, double residual_scale,
                  std::string formats) {
  MlaDecodeParams p;
  const int64_t end = take_tokens(kOp, p, x, start);
  Kept own_latents = kept_heads(kOp, "latents", latents, x, end);
  Kept own_keys = kept_heads(kOp, "rope_keys", rope_keys, x, end);
  p.latents = own_latents.heads;
  p.rope_keys = own_keys.heads;
  check_size(kOp, "latents", latents, 1, 1, "the heads");
  check_size(kOp, "rope_keys", rope_keys, 1, 1, "the heads");
  const int64_t H = p.hidden_size, n = num_heads, r = latents.size(3), rope = rope_keys.size(3);
  MOE_CHECK(r >= 1, kOp, ": latents must have at least one feature, got shape ",
            shape_string(latents), ".");
  MOE_CHECK(rope >= 2 && rope % 2 == 0, kOp,
            ": rope_keys must have an even number of features, at least 2, got shape ",
            shape_string(rope_keys), ".");
  MOE_CHECK(n >= 1 && n <= std::numeric_limits<int32_t>::max(), kOp,
            ": num_heads must be from 1 to 2^31 - 1, got ", n, ".");
  p.heads = n;
  p.rank = r;
  p.half = rope / 2;

  // The formats of w_q, w_kv_a, w_o and, where there is one, w_q_a.
  std::array<std::string_view, 4> names;
  if (w_q_a.has_value()) {
    names = format_names<4>(kOp, "formats", formats);
  } else {
    std::ranges::copy(format_names<3>(kOp, "formats", formats), names.begin());
  }
  std::optional<Dense> down;
  OptTensor inner_norm;
  if (w_q_a.has_value()) {
    down = dense_layer(kOp, {"w_q_a", *w_q_a, w_q_a_scale, b_q_a, names[3]}, x, p.type, -1, H);
    p.query_down = down->layer;
    p.query_rank = p.query_down.out_features;
    MOE_CHECK(p.query_rank >= 1, kOp, ": w_q_a must have at least one feature, got shape ",
              shape_string(*w_q_a), ".");
    check_vector(kOp, "q_norm", q_norm, x, p.query_rank, "the number of features of w_q_a");
    if (q_norm.has_value()) inner_norm = dense(*q_norm);
  } else {
    MOE_CHECK(!q_norm.has_value() && !b_q_a.has_value() && !w_q_a_scale.has_value(), kOp,
              ": q_norm, b_q_a and w_q_a_scale must be None without w_q_a, got one.");
  }
  const int64_t depth = w_q_a.has_value() ? p.query_rank : H;
  const Dense q = dense_layer(kOp, {"w_q", w_q, w_q_scale, b_q, names[0]}, x, p.type, -1, depth);
  const int64_t q_size = q.layer.out_features / n;
  MOE_CHECK(q_size > rope && q_size * n == q.layer.out_features, kOp, ": w_q must have more than ",
            rope, " features for each of num_heads = ", n, " heads, got shape ", shape_string(w_q),
            ".");
  p.nope_size = q_size - rope;
  const Dense kv_a =
      dense_layer(kOp, {"w_kv_a", w_kv_a, w_kv_a_scale, b_kv_a, names[1]}, x, p.type, r + rope, H);
  check_vector(kOp, "kv_norm", kv_norm, x, r, "r");
  check_same_dtype(kOp, "w_kv_b", w_kv_b, "x", x);
  const Dense kv_b = dense_layer(kOp, {"w_kv_b", w_kv_b, {}, {}, kFloatWeight}, x, p.type, -1, r);
  p.value_size = kv_b.layer.out_features / n - p.nope_size;
  MOE_CHECK(p.value_size >= 1 && (p.nope_size + p.value_size) * n == kv_b.layer.out_features, kOp,
            ": w_kv_b must have more than ", p.nope_size, " features for each of num_heads = ", n,
            " heads, got shape ", shape_string(w_kv_b), ".");
  const Dense o =
      dense_layer(kOp, {"w_o", w_o, w_o_scale, b_o, names[2]}, x, p.type, H, n * p.value_size);
  MOE_CHECK(latent_eps >= 0, kOp, ": latent_eps must be at least 0, got ", latent_eps, ".");
  const BlockOperands own = take_block(kOp, p,
                                       {.x = x,
                                        .norm_weight = norm_weight,
                                        .eps = eps,
                                        .cos = cos,
                                        .sin = sin,
                                        .mask = mask,
                                        .sinks = {},
                                        .scale = scale,
                                        .residual_scale = residual_scale});
  const Tensor latent_norm = dense(kv_norm);
  p.query_norm = data_of(inner_norm);
  p.query = q.layer;
  p.latent = kv_a.layer;
  p.latent_norm = latent_norm.const_data_ptr();
  p.latent_eps = latent_eps;
  p.heads_of_latent = kv_b.layer.weight;
  p.out = o.layer;
  p.interleaved = interleaved;
  p.interleaved_keys = interleaved_keys;
  Tensor y = empty_cpu(kOp, {p.batch, p.num_tokens, H}, x.scalar_type());
  p.y = y.mutable_data_ptr();
  cpu::mla_decode(p, torch_parallel());
  own_latents.write_back();
  own_keys.write_back();
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) { m.impl("mla_decode", MOE_BOX(mla_decode)); }

}  // namespace moe_ops::adapter
