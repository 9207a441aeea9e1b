// Maps run-time values to template arguments: the lambda is called with a tag whose type (or
// constexpr value) holds the value.
#pragma once

#include <type_traits>

#include "cuda/vec.cuh"
#include "moe_ops/activation.h"

namespace moe_ops::cuda {

template <class T>
struct TypeTag {
  using type = T;
};

template <auto V>
using Constant = std::integral_constant<decltype(V), V>;

template <class Fn>
auto with_type(DType type, Fn&& fn) {
  switch (type) {
    case DType::kFloat64:
      return fn(TypeTag<double>{});
    case DType::kFloat32:
      return fn(TypeTag<float>{});
    case DType::kBFloat16:
      return fn(TypeTag<bf16>{});
    default:
      return fn(TypeTag<fp16>{});
  }
}

template <class Fn>
auto with_bool(bool value, Fn&& fn) {
  return value ? fn(Constant<true>{}) : fn(Constant<false>{});
}

template <class Fn>
auto with_activation(Activation kind, Fn&& fn) {
  switch (kind) {
#define MOE_OPS_CASE(name, kind) \
  case Activation::kind:         \
    return fn(Constant<Activation::kind>{});
    MOE_OPS_ACTIVATIONS(MOE_OPS_CASE)
#undef MOE_OPS_CASE
  }
  return fn(Constant<Activation::kSwiglu>{});
}

}  // namespace moe_ops::cuda
