// Quantized weights as the adapters take them: the name of a format says what their tensors are.
#pragma once

#include <array>
#include <span>
#include <string>
#include <string_view>

#include "moe_ops/moe_ffn_quantized.h"
#include "moe_ops/weight_format.h"
#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

// A weight and its scales; the tensors keep copies alive where some were made.
struct Quantized {
  Tensor tensor, scale;
  OptTensor zero;
  QuantizedMatrices matrices;
  int64_t experts, features, depth;
};

// The names of `Count` weights: one for all of them, or one for each, "q4_k, q6_k". They are parts
// of `text`.
template <size_t Count>
std::array<std::string_view, Count> format_names(const Op& op, const char* arg,
                                                 std::string_view text) {
  std::array<std::string_view, Count> names;
  names.fill(text);
  if (text.find(", ") == text.npos) return names;
  std::string_view rest = text;
  for (size_t i = 0; i < Count; ++i) {
    const size_t end = rest.find(", ");
    MOE_CHECK((end == rest.npos) == (i + 1 == Count), op, ": ", arg,
              " must be one name or one for each of ", Count, " weights, got '", text, "'.");
    names[i] = rest.substr(0, end);
    if (end != rest.npos) rest.remove_prefix(end + 2);
  }
  return names;
}

inline WeightFormat format_of(const Op& op, const char* arg, std::string_view name) {
  const std::optional<WeightFormat> found = parse_weight_format(name);
  MOE_CHECK(found.has_value(), op, ": ", arg,
            " must name a format of quantized weights such as 'int8', 'int4 g64' or 'mxfp4', got '",
            name, "'.");
  return *found;
}

inline ScalarType type_of(Codes codes) {
  if (codes == Codes::kFp8 || codes == Codes::kE4m3) return ScalarType::Float8_e4m3fn;
  return codes == Codes::kInt8 ? ScalarType::Char : ScalarType::Byte;
}

inline ScalarType type_of(ScaleType type) {
  switch (type) {
    case ScaleType::kFloat32:
      return ScalarType::Float;
    case ScaleType::kBFloat16:
      return ScalarType::BFloat16;
    case ScaleType::kFloat16:
      return ScalarType::Half;
    default:
      return ScalarType::Byte;
  }
}

inline void check_part(const Op& op, const std::string& part, const Tensor& t, ScalarType type,
                       std::span<const int64_t> shape, std::string_view format) {
  bool fits = t.scalar_type() == type && t.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = t.size(i) == shape[i];
  MOE_CHECK(fits, op, ": ", part, " must be ", dtype_name(type), " ",
            shape_string({shape.data(), shape.size()}), " for ", format, ", got ",
            dtype_name(t.scalar_type()), " of shape ", shape_string(t), ".");
}

inline void check_given(const Op& op, const std::string& part, const OptTensor& t, bool wanted,
                        std::string_view format) {
  MOE_CHECK(t.has_value() == wanted, op, ": ", part, " must be ", wanted ? "given" : "None",
            " for ", format, ", got ", t.has_value() ? "shape " + shape_string(*t) : "None", ".");
}

// w [E, O, D] of the format that `name` names, or [O, D] of one expert (dims 2).
inline Quantized quantized_of(const Op& op, const std::string& what, const Tensor& w,
                              const Tensor& scale, const OptTensor& zero, const WeightFormat& how,
                              std::string_view name, int64_t dims = 3) {
  const std::string scale_name = what + "_scale";
  const FormatRow& row = how.row;
  check_device(op, what.c_str(), w);
  check_device(op, scale_name.c_str(), scale);
  const char* last = row.bits == 8 ? "D]" : row.bits == 4 ? "D/2]" : "3D/4]";
  MOE_CHECK(w.scalar_type() == type_of(row.codes) && w.dim() == dims, op, ": ", what, " must be ",
            dtype_name(type_of(row.codes)), dims == 3 ? " [E, O, " : " [O, ", last, " for ", name,
            ", got ", dtype_name(w.scalar_type()), " of shape ", shape_string(w), ".");
  const int64_t experts = dims == 3 ? w.size(0) : 1, features = w.size(dims - 2);
  const int64_t stored = w.size(dims - 1), depth = stored * 8 / row.bits;
  MOE_CHECK(depth % how.multiple() == 0 && depth * row.bits / 8 == stored, op, ": ", what,
            " must have rows of a multiple of ", how.multiple(), " weights for ", name,
            ", got shape ", shape_string(w), ".");
  // Scales of a row, each of `record` bytes or one number.
  const int64_t groups = how.group == 0 ? 1 : ceil_div(depth, how.group);
  const int64_t scale_rows = ceil_div(features, row.rows);
  const int64_t sizes[] = {experts, scale_rows, row.head + groups, row.record};
  const int64_t first = dims == 3 ? 0 : 1, last_zero = how.group == 0 ? 2 : 3;
  const std::span<const int64_t> zero_shape(sizes + first, sizes + last_zero);
  const std::span<const int64_t> shape(sizes + first, sizes + last_zero + (row.record != 0));
  check_part(op, scale_name, scale, type_of(how.scale), shape, name);
  const bool strided = row.bits != 6;  // strides must come out even in weights of 6 bits
  Quantized out{
      strided ? with_dense_rows(w) : dense(w), dense(scale), {}, {}, experts, features, depth};
  QuantFormat& format = out.matrices.format;
  format.codes = row.codes;
  format.bits = row.bits;
  format.group = how.group == 0 ? depth : how.group;
  format.scale_type = how.scale;
  format.scale_rows = row.rows;
  format.has_kernels = how.has_kernels();
  format.scales = out.scale.const_data_ptr();
  format.scale = static_cast<const float*>(format.scales);
  format.scale_stride_o = row.head + groups * std::max<int64_t>(row.record, 1);
  format.scale_stride_e = format.scale_stride_o * scale_rows;
  out.matrices.data = out.tensor.const_data_ptr();
  out.matrices.stride_e = dims == 3 ? out.tensor.stride(0) : 0;
  out.matrices.stride_o = dims == 3 ? out.tensor.stride(1) : row_stride(out.tensor);
  const std::string zero_name = what + "_zero";
  check_given(op, zero_name, zero, how.zero, name);
  if (how.zero) {
    check_device(op, zero_name.c_str(), *zero);
    check_part(op, zero_name, *zero, ScalarType::Byte, zero_shape, name);
    out.zero = dense(*zero);
    format.zero = static_cast<const uint8_t*>(out.zero->const_data_ptr());
  }
  return out;
}

// Copies records of scales that start anywhere to memory of their own: device kernels read words of
// them.
inline void align_records(Quantized& q) {
  QuantFormat& format = q.matrices.format;
  if (format.scale_type != ScaleType::kBytes) return;
  if (reinterpret_cast<uintptr_t>(format.scales) % 4 == 0) return;
  q.scale = copy_of(q.scale, [](const Tensor& t) { return torch::stable::clone(t); });
  format.scales = q.scale.const_data_ptr();
  format.scale = static_cast<const float*>(format.scales);
}

}  // namespace moe_ops::adapter
