// Dense layers and vectors as the adapters of whole blocks take them.
#pragma once

#include <string>

#include "moe_ops/dense_layer.h"
#include "torch/quantized.h"
#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

// A dense layer, and what keeps its memory alive.
struct Dense {
  Tensor weight;
  OptTensor scale, bias;
  DenseLayer layer;
};

inline void check_vector(const Op& op, const char* name, const OptTensor& t, const Tensor& x,
                         int64_t size, const char* what) {
  if (!t.has_value()) return;
  check_same_dtype(op, name, *t, "x", x);
  check_dim(op, name, *t, 1, "a vector");
  check_size(op, name, *t, 0, size, what);
}

// Returns the name of a format of grouped_gemm_quantized that blocks do not support, or "" for any
// other pair.
inline std::string refused_format(const Tensor& w, const OptTensor& scale) {
  const ScalarType dtype = w.scalar_type();
  if (dtype == ScalarType::Float8_e4m3fn) return "fp8 in blocks";
  if (!scale.has_value() || w.dim() != 2) return "";
  const ScalarType of_scale = scale->scalar_type();
  if (dtype == ScalarType::Char) return scale->dim() == 2 ? "int8 in groups" : "";
  if (dtype != ScalarType::Byte) return "";
  if (of_scale == ScalarType::Byte) {
    if (scale->dim() == 2) return "MXFP4";
    if (scale->dim() != 3) return "";
    return scale->size(2) == 16 ? "q4_K" : scale->size(2) == 18 ? "q6_K" : "";
  }
  if (scale->dim() != 2) return "";
  if (of_scale == ScalarType::Half || of_scale == ScalarType::BFloat16) {
    return std::string("4 bits with scales in ") + dtype_name(of_scale);
  }
  const int64_t depth = 2 * w.size(1), groups = scale->size(1);
  if (of_scale != ScalarType::Float || groups == 0 || depth % groups != 0) return "";
  const int64_t group = depth / groups;
  if (group == 0 || group % 32 != 0 || group == 32 || group == 64 || group == 128) return "";
  return "4 bits in groups of " + std::to_string(group);
}

inline Dense quantized_layer(const Op& op, const std::string& scale_name, const Tensor& w,
                             const Tensor& scale) {
  check_device(op, scale_name.c_str(), scale);
  const bool four = w.scalar_type() == ScalarType::Byte;
  MOE_CHECK(scale.scalar_type() == ScalarType::Float, op, ": ", scale_name,
            " must be float32, got ", dtype_name(scale.scalar_type()), ".");
  check_dim(op, scale_name.c_str(), scale, four ? 2 : 1,
            four ? "[O, K/G] beside 4-bit weights" : "[O] beside int8 weights");
  check_size(op, scale_name.c_str(), scale, 0, w.size(0), "the number of features");
  Dense out{with_dense_rows(w), dense(scale), {}, {}};
  const int64_t depth = w.size(1) * (four ? 2 : 1), groups = four ? scale.size(1) : 1;
  const int64_t group = groups == 0 ? 0 : depth / groups;
  const bool known = !four || group == 32 || group == 64 || group == 128;
  MOE_CHECK(groups * group == depth && (known || depth == 0), op, ": ", scale_name,
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

// The weight of a layer, with what belongs to it.
struct LayerWeights {
  const char* name;        // "w_..."; the scale and the bias are named after it
  const Tensor& w;         // [features, depth], or codes of it
  const OptTensor& scale;  // beside codes
  const OptTensor& bias;   // [features] or none
};

// Checks a layer on x, which has type `type`; features -1: any number.
inline Dense dense_layer(const Op& op, const LayerWeights& weights, const Tensor& x, DType type,
                         int64_t features, int64_t depth) {
  const auto& [name, w, scale, bias] = weights;
  const std::string what = name, scale_name = what + "_scale";
  check_device(op, name, w);
  const ScalarType dtype = w.scalar_type();
  const bool codes = dtype == ScalarType::Char || dtype == ScalarType::Byte;
  if (const std::string format = refused_format(w, scale); !format.empty()) {
    fail(op, ": ", name, " must be ", dtype_name(x.scalar_type()),
         " like x, int8 with float32 scales [O], or 4 bits (uint8) with float32 scales [O, K/G] "
         "of G = 32, 64 or 128, got ",
         format, " (", dtype_name(dtype), " of shape ", shape_string(w),
         scale.has_value() ? std::string(" with ") + dtype_name(scale->scalar_type()) +
                                 " scales of shape " + shape_string(*scale)
                           : std::string(" without scales"),
         ").");
  }
  if (codes) {
    MOE_CHECK(scale.has_value(), op, ": ", scale_name, " must be given beside codes, got None.");
  } else if (scale.has_value()) {
    fail(op, ": ", scale_name, " must be None beside a weight that is no codes, got shape ",
         shape_string(*scale), " beside ", dtype_name(dtype), ".");
  }
  check_dim(op, name, w, 2, "[O, K]");
  Dense out{w, {}, {}, {}};
  if (codes) {
    MOE_CHECK(type != DType::kFloat64, op,
              ": x must be float32, bfloat16 or float16 beside codes, got float64.");
    out = quantized_layer(op, scale_name, w, *scale);
    out.layer.weight.type = type;
  } else {
    check_same_dtype(op, name, w, "x", x);
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
  MOE_CHECK(out.layer.in_features == depth, op, ": ", name, " must have rows of ", depth,
            " weights, got ", out.layer.in_features, " (shape ", shape_string(w), ").");
  if (features >= 0) check_size(op, name, w, 0, features, "the number of features");
  if (bias.has_value()) {
    const std::string bias_name = "b" + what.substr(1);
    check_vector(op, bias_name.c_str(), bias, x, w.size(0), "the number of features");
    out.bias = dense(*bias);
    out.layer.bias = {out.bias->const_data_ptr(), type, 0};
  }
  return out;
}

}  // namespace moe_ops::adapter
