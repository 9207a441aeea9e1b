#include "moe_ops/attention_step.h"

#include <cmath>

#include "torch/quantized.h"
#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

namespace {

constexpr const char* kOp = "attention_step";

// A dense layer, and what keeps its memory alive.
struct Dense {
  Tensor weight;
  OptTensor scale, bias;
  DenseLayer layer;
};

void check_vector(const char* name, const OptTensor& t, const Tensor& x, int64_t size,
                  const char* what) {
  if (!t.has_value()) return;
  check_same_dtype(kOp, name, *t, "x", x);
  check_dim(kOp, name, *t, 1, "a vector");
  check_size(kOp, name, *t, 0, size, what);
}

Dense quantized_layer(const std::string& scale_name, const Tensor& w, const Tensor& scale) {
  check_device(kOp, scale_name.c_str(), scale);
  const bool four = w.scalar_type() == ScalarType::Byte;
  MOE_CHECK(scale.scalar_type() == ScalarType::Float, kOp, ": ", scale_name,
            " must be float32, got ", dtype_name(scale.scalar_type()), ".");
  check_dim(kOp, scale_name.c_str(), scale, four ? 2 : 1,
            four ? "[O, K/G] beside 4-bit weights" : "[O] beside int8 weights");
  check_size(kOp, scale_name.c_str(), scale, 0, w.size(0), "the number of features");
  Dense out{with_dense_rows(w), dense(scale), {}, {}};
  const int64_t depth = w.size(1) * (four ? 2 : 1), groups = four ? scale.size(1) : 1;
  const int64_t group = groups == 0 ? 0 : depth / groups;
  const bool known = !four || group == 32 || group == 64 || group == 128;
  MOE_CHECK(groups * group == depth && (known || depth == 0), kOp, ": ", scale_name,
            " must have a scale for each group of 32, 64 or 128 of the ", depth,
            " weights of a row, got shape ", shape_string(scale), ".");
  QuantizedMatrices m;
  m.data = out.weight.const_data_ptr();
  m.stride_o = row_stride(out.weight);
  m.format = {four ? 4 : 8, group, static_cast<const float*>(out.scale->const_data_ptr()), 0,
              groups};
  out.layer = {matrices_of(m, DType::kFloat32), {}, w.size(0), depth};
  return out;
}

// w [features, depth] with its scale and bias; features -1: any number.
Dense dense_layer(const char* name, const Tensor& w, const OptTensor& scale, const OptTensor& bias,
                  const Tensor& x, DType type, int64_t features, int64_t depth) {
  const std::string what = name, scale_name = what + "_scale";
  check_device(kOp, name, w);
  const ScalarType dtype = w.scalar_type();
  const bool codes = dtype == ScalarType::Char || dtype == ScalarType::Byte;
  MOE_CHECK(codes == scale.has_value(), kOp, ": ", scale_name,
            codes ? " must be given beside codes, got None."
                  : " must be None beside a weight that is no codes.");
  check_dim(kOp, name, w, 2, "[O, K]");
  Dense out{w, {}, {}, {}};
  if (codes) {
    MOE_CHECK(type != DType::kFloat64, kOp,
              ": x must be float32, bfloat16 or float16 beside codes, got float64.");
    out = quantized_layer(scale_name, w, *scale);
    out.layer.weight.type = type;
  } else {
    check_same_dtype(kOp, name, w, "x", x);
    const bool usable = w.size(1) <= 1 || w.stride(1) == 1 || w.stride(0) == 1;
    out.weight = usable && w.stride(0) >= 0 ? aligned(w) : dense(w);
    const Tensor& t = out.weight;
    ExpertMatrices& m = out.layer.weight;
    m = {t.const_data_ptr(), type, 0, t.stride(0), t.stride(1)};
    if (t.size(1) <= 1) m.stride_k = 1;
    if (t.size(0) <= 1 && m.stride_k != 1) m.stride_o = 1;
    out.layer.out_features = w.size(0);
    out.layer.in_features = w.size(1);
  }
  MOE_CHECK(out.layer.in_features == depth, kOp, ": ", name, " must have rows of ", depth,
            " weights, got ", out.layer.in_features, " (shape ", shape_string(w), ").");
  if (features >= 0) check_size(kOp, name, w, 0, features, "the number of features");
  if (bias.has_value()) {
    const std::string bias_name = "b" + what.substr(1);
    check_vector(bias_name.c_str(), bias, x, w.size(0), "the number of features");
    out.bias = dense(*bias);
    out.layer.bias = {out.bias->const_data_ptr(), type, 0};
  }
  return out;
}

// [B, m, L, d], written in place, so no copy will do.
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
  MOE_CHECK(is_aligned(t), kOp, ": ", name,
            " must begin at a multiple of the size of an element, got an address between them.");
  KeptHeads<void> heads;
  heads.data = const_cast<void*>(t.const_data_ptr());
  heads.stride_batch = t.stride(0);
  heads.stride_head = t.stride(1);
  heads.stride_token = t.size(2) <= 1 ? std::max<int64_t>(t.size(3), 1) : t.stride(2);
  return heads;
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
  p.keys = kept_heads("keys", keys, x, end);
  p.values = kept_heads("values", values, x, end);
  p.kv_heads = keys.size(1);
  p.head_size = keys.size(3);
  const int64_t d = p.head_size;
  MOE_CHECK(p.kv_heads >= 1 && d >= 1, kOp,
            ": keys must have at least one head of at least one feature, got shape ",
            shape_string(keys), ".");
  check_size(kOp, "values", values, 1, p.kv_heads, "m");
  check_size(kOp, "values", values, 3, d, "d");
  const int64_t H = p.hidden_size, kv_width = p.kv_heads * d;
  const Dense q = dense_layer("w_q", w_q, w_q_scale, b_q, x, p.type, -1, H);
  const int64_t q_width = q.layer.out_features;
  MOE_CHECK(q_width > 0 && q_width % kv_width == 0, kOp,
            ": w_q must have a multiple of m d = ", kv_width, " features, got shape ",
            shape_string(w_q), ".");
  p.heads = q_width / d;
  const Dense k = dense_layer("w_k", w_k, w_k_scale, b_k, x, p.type, kv_width, H);
  const Dense v = dense_layer("w_v", w_v, w_v_scale, b_v, x, p.type, kv_width, H);
  const Dense o = dense_layer("w_o", w_o, w_o_scale, b_o, x, p.type, H, q_width);
  check_vector("norm_weight", norm_weight, x, H, "H");
  MOE_CHECK(eps >= 0, kOp, ": eps must be at least 0, got ", eps, ".");
  MOE_CHECK(head_eps >= 0, kOp, ": head_eps must be at least 0, got ", head_eps, ".");
  MOE_CHECK(q_norm.has_value() == k_norm.has_value(), kOp,
            ": q_norm and k_norm must be given together, got one.");
  if (q_norm.has_value()) {
    p.norms_heads = q_norm->dim() != 1 || q_norm->size(0) == d;
    check_vector("q_norm", q_norm, x, p.norms_heads ? d : q_width, "d, or n d");
    check_vector("k_norm", k_norm, x, p.norms_heads ? d : kv_width, "d, or m d");
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
  check_vector("sinks", sinks, x, p.heads, "the number of query heads");
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
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) { m.impl("attention_step", MOE_BOX(attention_step)); }

}  // namespace moe_ops::adapter
