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

// The name of a weight in x's dtype among the formats of a block's weights.
inline constexpr std::string_view kFloatWeight = "float";

// The weight of a layer, with what belongs to it.
struct LayerWeights {
  const char* name;         // "w_..."; the scale and the bias are named after it
  const Tensor& w;          // [features, depth] in x's dtype, or of `format`
  const OptTensor& scale;   // of a quantized weight
  const OptTensor& bias;    // [features] or none
  std::string_view format;  // its name, or kFloatWeight
};

// Checks a layer on x, which has type `type`; features -1: any number.
inline Dense dense_layer(const Op& op, const LayerWeights& weights, const Tensor& x, DType type,
                         int64_t features, int64_t depth) {
  const auto& [what, w, scale, bias, name] = weights;
  const std::string weight = what, scale_name = weight + "_scale";
  check_device(op, what, w);
  const bool floats = name == kFloatWeight;
  const std::optional<WeightFormat> how = parse_weight_format(name);
  MOE_CHECK(floats || (how.has_value() && how->has_kernels()), op,
            ": formats must have 'float', 'int8' or 'int4 g32', 'int4 g64' or 'int4 g128' for ",
            what, ", got '", name, "'.");
  check_given(op, scale_name, scale, !floats, name);
  Dense out{w, {}, {}, {}};
  if (floats) {
    check_same_dtype(op, what, w, "x", x);
    check_dim(op, what, w, 2, "[O, K]");
    const bool usable = w.size(1) <= 1 || w.stride(1) == 1 || w.stride(0) == 1;
    out.weight = usable && w.stride(0) >= 0 ? aligned(w) : dense(w);
    const Tensor& t = out.weight;
    ExpertMatrices& m = out.layer.weight;
    m = {t.const_data_ptr(), type, 0, t.stride(0), t.stride(1)};
    if (t.size(1) <= 1) m.stride_k = 1;
    if (t.size(0) <= 1 && m.stride_k != 1) m.stride_o = 1;
    out.layer.out_features = w.size(0);
    out.layer.in_features = w.size(1);
  } else {
    MOE_CHECK(type != DType::kFloat64, op, ": x must be float32, bfloat16 or float16 for ", name,
              ", got float64.");
    Quantized q = quantized_of(op, weight, w, *scale, {}, *how, name, 2);
    out.layer = {matrices_of(q.matrices, type), {}, q.features, q.depth};
    out.weight = std::move(q.tensor);
    out.scale = std::move(q.scale);
  }
  MOE_CHECK(out.layer.in_features == depth, op, ": ", what, " must have rows of ", depth,
            " weights, got ", out.layer.in_features, " (shape ", shape_string(w), ").");
  if (features >= 0) check_size(op, what, w, 0, features, "the number of features");
  if (bias.has_value()) {
    const std::string bias_name = "b" + weight.substr(1);
    check_vector(op, bias_name.c_str(), bias, x, w.size(0), "the number of features");
    out.bias = dense(*bias);
    out.layer.bias = {out.bias->const_data_ptr(), type, 0};
  }
  return out;
}

}  // namespace moe_ops::adapter
