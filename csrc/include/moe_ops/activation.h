// Activations of the expert FFN.
#pragma once

namespace moe_ops {

enum class Activation : int {
  // Gated: act(gate) * up.
  kSwiglu,
  kGeglu,
  kGegluTanh,
  kReglu,
  kSwigluOai,  // gpt-oss: (clamp(up) + 1) * min(gate, limit) * sigmoid(alpha * min(gate, limit))
  // Not gated.
  kSilu,
  kGelu,
  kGeluTanh,
  kRelu,
  kRelu2,
};

constexpr bool is_gated(Activation a) { return a <= Activation::kSwigluOai; }

struct ActivationParams {
  Activation kind = Activation::kSwiglu;
  bool interleaved = false;  // gate in even columns, up in odd ones; otherwise gate half first
  double alpha = 1.702;      // kSwigluOai only
  double limit = 7.0;        // kSwigluOai only
};

}  // namespace moe_ops
