// Activations of the expert FFN.
#pragma once

namespace moe_ops {

// Every activation: its name in Python and its enumerator. Gated ones compute act(gate) * up.
#define MOE_OPS_GATED_ACTIVATIONS(X) \
  X("swiglu", kSwiglu)               \
  X("geglu", kGeglu)                 \
  X("geglu_tanh", kGegluTanh)        \
  X("reglu", kReglu)                 \
  X("swiglu_oai", kSwigluOai)        \
  X("swiglu_clamped", kSwigluClamped)
#define MOE_OPS_PLAIN_ACTIVATIONS(X) \
  X("silu", kSilu)                   \
  X("gelu", kGelu)                   \
  X("gelu_tanh", kGeluTanh)          \
  X("relu", kRelu)                   \
  X("relu2", kRelu2)
#define MOE_OPS_ACTIVATIONS(X) MOE_OPS_GATED_ACTIVATIONS(X) MOE_OPS_PLAIN_ACTIVATIONS(X)

// With g = min(gate, limit) and u = clamp(up, -limit, limit):
//   kSwigluOai      (u + 1) * g * sigmoid(alpha * g)   gpt-oss
//   kSwigluClamped  u * g * sigmoid(g)                 DeepSeek-V4
enum class Activation : int {
#define MOE_OPS_KIND(name, kind) kind,
  MOE_OPS_ACTIVATIONS(MOE_OPS_KIND)
#undef MOE_OPS_KIND
};

constexpr bool is_gated(Activation a) { return a < Activation::kSilu; }

// Returns whether the activation limits the gate and the up half.
constexpr bool has_limit(Activation a) {
  return a == Activation::kSwigluOai || a == Activation::kSwigluClamped;
}

struct ActivationParams {
  Activation kind = Activation::kSwiglu;
  bool interleaved = false;  // gate in even columns, up in odd ones; otherwise gate half first
  double alpha = 1.702;      // kSwigluOai only
  double limit = 7.0;        // with has_limit
};

}  // namespace moe_ops
