// Checks and layouts of float8_e4m3fn operands with their scales.
#pragma once

#include "moe_ops/grouped_gemm_fp8.h"
#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

inline int64_t fp8_blocks(int64_t n) { return ceil_div(n, kFp8Block); }

// Checks for a type that can be quantized to e4m3 and that sums of e4m3 products can have.
inline DType check_float_to_fp8(const Op& op, const char* name, const Tensor& t) {
  check_device(op, name, t);
  MOE_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16 ||
                t.scalar_type() == ScalarType::Half,
            op, ": ", name, " must be float32, bfloat16 or float16, got ",
            dtype_name(t.scalar_type()), ".");
  return check_float(op, name, t);
}

inline void check_fp8(const Op& op, const char* name, const Tensor& t) {
  check_device(op, name, t);
  MOE_CHECK(t.scalar_type() == ScalarType::Float8_e4m3fn, op, ": ", name,
            " must be float8_e4m3fn, got ", dtype_name(t.scalar_type()), ".");
}

inline void check_fp8_scale(const Op& op, const char* name, const Tensor& t) {
  check_device(op, name, t);
  MOE_CHECK(t.scalar_type() == ScalarType::Float, op, ": ", name, " must be float32, got ",
            dtype_name(t.scalar_type()), ".");
}

// Checks the type of a result that is independent of the operands' types.
inline DType check_out_dtype(const Op& op, ScalarType out_dtype) {
  switch (out_dtype) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      fail(op, ": out_dtype must be float32, bfloat16 or float16, got ", dtype_name(out_dtype),
           ".");
  }
}

// Checks a bias, whose type is independent of the operands' types.
inline DType fp8_bias_type(const Op& op, const char* name, const OptTensor& bias) {
  return bias.has_value() ? check_float_to_fp8(op, name, *bias) : DType::kFloat32;
}

// A weight [E, O, K] and its scales; `tensor` and `scale_tensor` keep copies alive where some were
// made.
struct Fp8Weights {
  Tensor tensor, scale_tensor;
  Fp8Matrices matrices;
};

inline void check_fp8_weights(const Op& op, const char* name, const char* scale_name,
                              const Tensor& w, const Tensor& scale, const char* shape) {
  check_fp8(op, name, w);
  check_dim(op, name, w, 3, shape);
  check_fp8_scale(op, scale_name, scale);
  check_dim(op, scale_name, scale, 3, "one scale for 128 x 128 of each expert");
  check_size(op, scale_name, scale, 0, w.size(0), "E");
  check_size(op, scale_name, scale, 1, fp8_blocks(w.size(1)), "the blocks of 128 features");
  check_size(op, scale_name, scale, 2, fp8_blocks(w.size(2)), "the blocks of 128 inputs");
}

// Returns the weights, copied if they are not dense along k.
inline Fp8Weights fp8_weights(const Tensor& w, const Tensor& scale) {
  Fp8Weights out{with_dense_rows(w), with_dense_rows(scale), {}};
  Fp8Matrices& m = out.matrices;
  m.data = static_cast<const uint8_t*>(out.tensor.const_data_ptr());
  m.stride_e = out.tensor.stride(0);
  m.stride_o = out.tensor.stride(1);
  m.scale = static_cast<const float*>(out.scale_tensor.const_data_ptr());
  m.scale_stride_e = out.scale_tensor.stride(0);
  m.scale_stride_o = out.scale_tensor.stride(1);
  return out;
}

// Checks quantized columns and the scales of their groups.
inline void check_fp8_columns(const Op& op, const char* name, const char* scale_name,
                              const Tensor& q, const Tensor& scale, const char* shape) {
  check_fp8(op, name, q);
  check_dim(op, name, q, 2, shape);
  check_fp8_scale(op, scale_name, scale);
  check_dim(op, scale_name, scale, 2, "[G, features]");
  check_size(op, scale_name, scale, 1, q.size(0), "the features");
  check_size(op, name, q, 1, kFp8Block * scale.size(0), "128 columns a group");
}

inline Fp8Columns fp8_columns(const Tensor& q, const Tensor& scale) {
  return {static_cast<const uint8_t*>(q.const_data_ptr()), row_stride(q),
          static_cast<const float*>(scale.const_data_ptr()), row_stride(scale)};
}

}  // namespace moe_ops::adapter
