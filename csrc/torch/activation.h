// Names of the activations.
#pragma once

#include <cmath>
#include <string>
#include <utility>

#include "moe_ops/activation.h"
#include "torch/checks.h"

namespace moe_ops::adapter {

inline constexpr std::pair<const char*, Activation> kActivations[] = {
#define MOE_OPS_PAIR(name, kind) {name, Activation::kind},
    MOE_OPS_ACTIVATIONS(MOE_OPS_PAIR)
#undef MOE_OPS_PAIR
};

// Returns the names of the activations, separated by commas.
inline std::string activation_names(bool gated_only) {
  std::string names;
  for (const auto& [name, kind] : kActivations) {
    if (gated_only && !is_gated(kind)) continue;
    names += (names.empty() ? "" : ", ") + std::string(name);
  }
  return names;
}

inline ActivationParams check_activation(const Op& op, const std::string& name, bool interleaved,
                                         double alpha, double limit, bool gated_only) {
  for (const auto& [known, kind] : kActivations) {
    if (name != known) continue;
    if (gated_only && !is_gated(kind)) break;
    MOE_CHECK(std::isfinite(alpha), op, ": alpha must be finite, got ", alpha, ".");
    MOE_CHECK(limit > 0, op, ": limit must be positive, got ", limit, ".");
    return {kind, interleaved, alpha, limit};
  }
  fail(op, ": activation must be one of ", activation_names(gated_only), ", got '", name, "'.");
}

}  // namespace moe_ops::adapter
