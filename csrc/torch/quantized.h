// Weights of few bits as the adapters take them. The format is told by the types and shapes of a
// weight and its scales:
//
//   int8 [E,O,D]            float32 [E,O]                     int8, a scale a row
//   int8 [E,O,D]            float [E,O,D/G]                   int8 in groups
//   uint8 [E,O,D/2]         float [E,O,D/G]                   4 bits, with zero points or without
//   uint8 [E,O,D/2]         uint8 [E,O,D/32]                  MXFP4
//   float8_e4m3fn [E,O,D]   float32 [E,O/128,D/128]           fp8 in blocks
//   uint8 [E,O,D/2]         uint8 [E,O,D/256,16]              ggml's q4_K
//   uint8 [E,O,3D/4]        uint8 [E,O,D/256,18]              ggml's q6_K
#pragma once

#include "moe_ops/moe_ffn_quantized.h"
#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

// A weight and its scales; the tensors keep copies alive where some were made.
struct Quantized {
  Tensor tensor, scale;
  OptTensor zero;
  QuantizedMatrices matrices;
  int64_t experts, features, depth;
};

// Which formats an op takes: those with kernels of their own, or all.
enum class Formats : int { kWithKernels, kAll };

inline ScaleType scale_type_of(const Op& op, const char* scale_name, const Tensor& scale,
                               Formats formats) {
  switch (scale.scalar_type()) {
    case ScalarType::Float:
      return ScaleType::kFloat32;
    case ScalarType::BFloat16:
      if (formats == Formats::kAll) return ScaleType::kBFloat16;
      break;
    case ScalarType::Half:
      if (formats == Formats::kAll) return ScaleType::kFloat16;
      break;
    case ScalarType::Byte:
      if (formats == Formats::kAll) return ScaleType::kBytes;
      break;
    default:
      break;
  }
  fail(op, ": ", scale_name, " must be float32",
       formats == Formats::kAll ? ", bfloat16, float16, or bytes of MXFP4, q4_K or q6_K" : "",
       ", got ", dtype_name(scale.scalar_type()), ".");
}

inline void set_zero(const Op& op, const char* scale_name, const OptTensor& zero, Quantized& q) {
  if (!zero.has_value()) return;
  check_device(op, scale_name, *zero);
  bool same = zero->scalar_type() == ScalarType::Byte && zero->dim() == q.scale.dim();
  for (int64_t i = 0; same && i < zero->dim(); ++i) same = zero->size(i) == q.scale.size(i);
  MOE_CHECK(same && q.matrices.format.codes == Codes::kInt4, op,
            ": zero points must be uint8 of the shape of ", scale_name,
            " beside 4-bit weights with scales of groups, got ", dtype_name(zero->scalar_type()),
            " of shape ", shape_string(*zero), ".");
  q.zero = dense(*zero);
  q.matrices.format.zero = static_cast<const uint8_t*>(q.zero->const_data_ptr());
  q.matrices.format.has_kernels = false;
}

inline Quantized quantized_of(const Op& op, const char* name, const char* scale_name,
                              const Tensor& w, const Tensor& scale, Formats formats,
                              const OptTensor& zero = {}) {
  const bool all = formats == Formats::kAll;
  check_device(op, name, w);
  check_device(op, scale_name, scale);
  const ScalarType type = w.scalar_type();
  const bool fp8 = all && type == ScalarType::Float8_e4m3fn;
  MOE_CHECK(type == ScalarType::Char || type == ScalarType::Byte || fp8, op, ": ", name,
            " must be int8, or uint8 with two 4-bit weights a byte, got ", dtype_name(type), ".");
  const bool eight = type == ScalarType::Char;
  check_dim(op, name, w, 3, type == ScalarType::Byte ? "[E, O, D/2]" : "[E, O, D]");
  const ScaleType scale_type = scale_type_of(op, scale_name, scale, formats);
  const bool bytes = scale_type == ScaleType::kBytes;
  Quantized out{with_dense_rows(w), dense(scale), {}, {}, w.size(0), w.size(1), w.size(2)};
  QuantFormat& format = out.matrices.format;
  format.scale_type = scale_type;
  // Scales [E, O, groups], each of `unit` bytes or one float, for `group` steps of k.
  int64_t groups = 1, unit = 1, dims = 3;
  if (fp8) {
    format.codes = Codes::kFp8;
    format.bits = 8;
    format.scale_rows = format.group = kFp8Block;
    groups = ceil_div(out.depth, kFp8Block);
    MOE_CHECK(scale_type == ScaleType::kFloat32, op, ": ", scale_name, " must be float32 beside ",
              name, " of float8_e4m3fn, got ", dtype_name(scale.scalar_type()), ".");
  } else if (eight) {
    format.codes = Codes::kInt8;
    format.bits = 8;
    dims = all && scale.dim() == 3 ? 3 : 2;
    format.has_kernels = dims == 2;
    MOE_CHECK(!bytes && (dims == 3 || scale_type == ScaleType::kFloat32), op, ": ", scale_name,
              " must be float32 [E, O] beside int8 weights, got ", dtype_name(scale.scalar_type()),
              ".");
  } else if (bytes && scale.dim() == 4) {
    unit = scale.size(3);
    format.codes = unit == 16 ? Codes::kQ4K : Codes::kQ6K;
    format.bits = unit == 16 ? 4 : 6;
    if (unit != 16) out.tensor = dense(w);  // strides must come out even in weights of 6 bits
    dims = 4;
    MOE_CHECK(unit == 16 || unit == 18, op, ": ", scale_name,
              " must have 16 bytes (q4_K) or 18 (q6_K) for each 256 weights, got shape ",
              shape_string(scale), ".");
  } else {
    format.codes = bytes ? Codes::kMxfp4 : Codes::kInt4;
    format.bits = 4;
  }
  out.depth = out.depth * 8 / format.bits;
  check_dim(op, scale_name, scale, dims,
            dims == 2 ? "[E, O] beside int8 weights" : "[E, O, D/G] beside 4-bit weights");
  check_size(op, scale_name, scale, 0, out.experts, "E");
  check_size(op, scale_name, scale, 1, ceil_div(out.features, format.scale_rows),
             fp8 ? "O / 128" : "the number of features");
  if (dims >= 3 && !fp8) {
    groups = scale.size(2);
    format.group = groups == 0 ? 0 : out.depth / groups;
    const bool common = format.group == 32 || format.group == 64 || format.group == 128;
    bool known = common;
    if (bytes) {
      known = format.group == (dims == 4 ? 256 : 32);
      format.has_kernels = false;
    } else if (all) {
      known = format.group > 0 && format.group % 32 == 0;
      format.has_kernels &= common && scale_type == ScaleType::kFloat32;
    }
    MOE_CHECK(groups * format.group == out.depth && (known || out.depth == 0), op, ": ", scale_name,
              " must have a scale for each group of ",
              bytes ? (dims == 4 ? "256" : "32")
              : all ? "a multiple of 32"
                    : "32, 64 or 128",
              " of the ", out.depth, " weights of a row, got shape ", shape_string(scale), ".");
  } else if (fp8) {
    check_size(op, scale_name, scale, 2, groups, "D / 128");
    format.has_kernels = false;
  } else {
    format.group = out.depth;
  }
  format.scales = out.scale.const_data_ptr();
  format.scale = static_cast<const float*>(format.scales);
  format.scale_stride_o = groups * unit;
  format.scale_stride_e = format.scale_stride_o * ceil_div(out.features, format.scale_rows);
  out.matrices.data = out.tensor.const_data_ptr();
  out.matrices.stride_e = out.tensor.stride(0);
  out.matrices.stride_o = out.tensor.stride(1);
  set_zero(op, scale_name, zero, out);
  return out;
}

}  // namespace moe_ops::adapter
