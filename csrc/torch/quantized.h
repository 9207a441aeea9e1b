// Weights of 8 or 4 bits as the adapters take them.
#pragma once

#include "moe_ops/moe_ffn_quantized.h"
#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

// A weight and its scales; the tensors keep copies alive where some were made.
struct Quantized {
  Tensor tensor, scale;
  QuantizedMatrices matrices;
  int64_t experts, features, depth;
};

inline Quantized quantized_of(const Op& op, const char* name, const char* scale_name,
                              const Tensor& w, const Tensor& scale) {
  check_device(op, name, w);
  check_device(op, scale_name, scale);
  const ScalarType type = w.scalar_type();
  MOE_CHECK(type == ScalarType::Char || type == ScalarType::Byte, op, ": ", name,
            " must be int8, or uint8 with two 4-bit weights a byte, got ", dtype_name(type), ".");
  check_dim(op, name, w, 3, type == ScalarType::Char ? "[E, O, D]" : "[E, O, D/2]");
  MOE_CHECK(scale.scalar_type() == ScalarType::Float, op, ": ", scale_name,
            " must be float32, got ", dtype_name(scale.scalar_type()), ".");
  const bool four = type == ScalarType::Byte;
  check_dim(op, scale_name, scale, four ? 3 : 2,
            four ? "[E, O, D/G] beside 4-bit weights" : "[E, O] beside int8 weights");
  Quantized out{with_dense_rows(w), dense(scale), {},
                w.size(0),          w.size(1),    w.size(2) * (four ? 2 : 1)};
  check_size(op, scale_name, scale, 0, out.experts, "E");
  check_size(op, scale_name, scale, 1, out.features, "the number of features");
  QuantFormat& format = out.matrices.format;
  format.bits = four ? 4 : 8;
  format.group = out.depth;
  int64_t groups = 1;
  if (four) {
    groups = scale.size(2);
    format.group = groups == 0 ? 0 : out.depth / groups;
    const bool known = format.group == 32 || format.group == 64 || format.group == 128;
    MOE_CHECK(groups * format.group == out.depth && (known || out.depth == 0), op, ": ", scale_name,
              " must have a scale for each group of 32, 64 or 128 of the ", out.depth,
              " weights of a row, got shape ", shape_string(scale), ".");
  }
  format.scale = static_cast<const float*>(out.scale.const_data_ptr());
  format.scale_stride_o = groups;
  format.scale_stride_e = groups * out.features;
  out.matrices.data = out.tensor.const_data_ptr();
  out.matrices.stride_e = out.tensor.stride(0);
  out.matrices.stride_o = out.tensor.stride(1);
  return out;
}

}  // namespace moe_ops::adapter
