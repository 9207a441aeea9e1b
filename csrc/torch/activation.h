// Names of the activations.
#pragma once

#include <cmath>
#include <string>
#include <utility>

#include "moe_ops/activation.h"
#include "torch/checks.h"

namespace moe_ops::adapter {

inline constexpr std::pair<const char*, Activation> kActivations[] = {
    {"swiglu", Activation::kSwiglu},
    {"geglu", Activation::kGeglu},
    {"geglu_tanh", Activation::kGegluTanh},
    {"reglu", Activation::kReglu},
    {"swiglu_oai", Activation::kSwigluOai},
    {"silu", Activation::kSilu},
    {"gelu", Activation::kGelu},
    {"gelu_tanh", Activation::kGeluTanh},
    {"relu", Activation::kRelu},
    {"relu2", Activation::kRelu2},
};

inline ActivationParams check_activation(const Op& op, const std::string& name, bool interleaved,
                                         double alpha, double limit, bool gated_only) {
  for (const auto& [known, kind] : kActivations) {
    if (name != known) continue;
    if (gated_only && !is_gated(kind)) break;
    MOE_CHECK(std::isfinite(alpha), op, ": alpha must be finite, got ", alpha, ".");
    MOE_CHECK(limit > 0, op, ": limit must be positive, got ", limit, ".");
    return {kind, interleaved, alpha, limit};
  }
  fail(op, ": activation must be one of swiglu, geglu, geglu_tanh, reglu, swiglu_oai",
       gated_only ? "" : ", silu, gelu, gelu_tanh, relu, relu2", ", got '", name, "'.");
}

}  // namespace moe_ops::adapter
