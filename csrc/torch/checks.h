// Checks of the adapters. Every failure is one sentence: op, tensor, what was expected, what came.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "moe_ops/common.h"

namespace moe_ops::adapter {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream s;
  (s << ... << parts);
  throw std::invalid_argument(s.str());  // arrives in Python as ValueError
}

// Arrives in Python as MemoryError.
class OutOfMemory : public std::bad_alloc {
 public:
  const char* what() const noexcept override {
    return "moe_ops: out of memory: the result or the working memory of an op could not be "
           "allocated.";
  }
};

#define MOE_CHECK(condition, ...)            \
  do {                                       \
    if (!(condition)) [[unlikely]] {         \
      ::moe_ops::adapter::fail(__VA_ARGS__); \
    }                                        \
  } while (false)

inline std::string shape_string(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::ostringstream s;
  s << "[";
  for (size_t i = 0; i < sizes.size(); ++i) s << (i ? ", " : "") << sizes[i];
  s << "]";
  return s.str();
}

inline std::string shape_string(const Tensor& t) { return shape_string(t.sizes()); }

inline const char* dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Float8_e4m3fnuz:
      return "float8_e4m3fnuz";
    case ScalarType::Float8_e5m2:
      return "float8_e5m2";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default:
      return "another dtype";
  }
}

// The op as checks see it: the name that messages start with, and where all its tensors must be. An
// adapter for CUDA names the first tensor; the others must be on its device.
struct Op {
  const char* name;
  bool on_cuda = false;
  int32_t device_index = -1;

  Op(const char* name) : name(name) {}  // on the CPU
  Op(const char* name, const Tensor& like)
      : name(name), on_cuda(like.is_cuda()), device_index(on_cuda ? like.get_device_index() : -1) {}
};

inline std::ostream& operator<<(std::ostream& s, const Op& op) { return s << op.name; }

inline std::string device_string(const Tensor& t) {
  if (t.is_cpu()) return "a CPU tensor";
  if (!t.is_cuda()) return "a tensor on another device";
  return "a CUDA tensor (cuda:" + std::to_string(t.get_device_index()) + ")";
}

inline void check_device(const Op& op, const char* name, const Tensor& t) {
  if (!op.on_cuda) {
    MOE_CHECK(t.is_cpu(), op, ": ", name, " must be on the CPU like the other tensors, got ",
              device_string(t), ".");
    return;
  }
  MOE_CHECK(t.is_cuda() && t.get_device_index() == op.device_index, op, ": ", name,
            " must be on cuda:", op.device_index, " like the other tensors, got ", device_string(t),
            ".");
}

inline void check_dim(const Op& op, const char* name, const Tensor& t, int64_t dim,
                      const char* shape) {
  MOE_CHECK(t.dim() == dim, op, ": ", name, " must be ", shape, " (", dim,
            " dimensions), got shape ", shape_string(t), ".");
}

// Expects size `n` in dimension `d`; `what` says where the number comes from.
inline void check_size(const Op& op, const char* name, const Tensor& t, int64_t d, int64_t n,
                       const char* what) {
  MOE_CHECK(t.size(d) == n, op, ": ", name, " must have ", what, " = ", n, " in dimension ", d,
            ", got shape ", shape_string(t), ".");
}

inline DType check_float(const Op& op, const char* name, const Tensor& t) {
  check_device(op, name, t);
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      fail(op, ": ", name, " must be float64, float32, bfloat16 or float16, got ",
           dtype_name(t.scalar_type()), ".");
  }
}

inline void check_same_dtype(const Op& op, const char* name, const Tensor& t, const char* like_name,
                             const Tensor& like) {
  check_device(op, name, t);
  MOE_CHECK(t.scalar_type() == like.scalar_type(), op, ": ", name, " must be ",
            dtype_name(like.scalar_type()), " like ", like_name, ", got ",
            dtype_name(t.scalar_type()), ".");
}

inline void check_index(const Op& op, const char* name, const Tensor& t) {
  check_device(op, name, t);
  MOE_CHECK(t.scalar_type() == ScalarType::Int || t.scalar_type() == ScalarType::Long, op, ": ",
            name, " must be int32 or int64, got ", dtype_name(t.scalar_type()), ".");
}

}  // namespace moe_ops::adapter
