// The activations as epilogues compute them: four families instead of eleven kinds, the rest are
// numbers. A kernel unrolls its epilogue once a family.
//   kSwiglu   x s(x) u                     swiglu
//   kSigmoid  x s(x (a + b x^2)) u         swiglu_oai, swiglu_clamped, geglu_tanh, silu, gelu_tanh
//   kNormal   x cdf(x) u                   geglu, gelu
//   kRelu     max(x, 0) u                  reglu, relu; relu2 with u = max(x, 0)
// x is the gate, at most `limit`; u is up, within +-limit, plus `offset`: 1 for activations without
// a gate, whose up counts as 0.
#pragma once

#include "cuda/activation.cuh"

namespace moe_ops::cuda {

enum class ActFamily { kSwiglu, kSigmoid, kNormal, kRelu };

struct FusedAct {
  ActFamily family;
  bool gated;
  bool square;  // relu2
  float a, b;
  float limit;  // infinite unless has_limit
  float offset;
};

inline FusedAct fused_act(const ActivationParams& act) {
  FusedAct f{};
  f.gated = is_gated(act.kind);
  f.square = act.kind == Activation::kRelu2;
  f.a = 1.f;
  f.limit = __builtin_inff();
  f.offset = f.gated ? 0.f : 1.f;
  switch (act.kind) {
    case Activation::kSwiglu:
      f.family = ActFamily::kSwiglu;
      break;
    case Activation::kSwigluOai:
      f.family = ActFamily::kSigmoid;
      f.a = static_cast<float>(act.alpha);
      f.limit = static_cast<float>(act.limit);
      f.offset = 1.f;
      break;
    case Activation::kSwigluClamped:
      f.family = ActFamily::kSigmoid;
      f.limit = static_cast<float>(act.limit);
      break;
    case Activation::kSilu:
      f.family = ActFamily::kSigmoid;
      break;
    case Activation::kGegluTanh:
    case Activation::kGeluTanh:
      // (1 + tanh(z)) / 2 = s(2z), z = sqrt(2/pi) (x + 0.044715 x^3)
      f.family = ActFamily::kSigmoid;
      f.a = 2.f * 0.7978845608f;
      f.b = f.a * 0.044715f;
      break;
    case Activation::kGeglu:
    case Activation::kGelu:
      f.family = ActFamily::kNormal;
      break;
    default:
      f.family = ActFamily::kRelu;
  }
  return f;
}

// Comparisons are written so that NaN stays.
__device__ __forceinline__ float at_most(float x, float limit) { return x > limit ? limit : x; }

// Returns x^2 for the polynomial of kSigmoid, limited where s is 0 or 1 anyway, so that 0 *
// infinity cannot arise when b is 0.
__device__ __forceinline__ float cut_square(float x) { return fminf(x * x, 1e6f); }

// Returns s(x) for results of 16 bits in four instructions; sigmoid() takes about 13. Its relative
// error is 1e-7 (1 + |x|), and it is 0 from about -87 on.
__device__ __forceinline__ float short_sigmoid(float x) {
  float z, s;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(z) : "f"(x * -1.4426950409f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1.f + z));
  return s;
}

// Returns h; kShort: with short_sigmoid.
template <ActFamily F, bool kShort = false>
__device__ __forceinline__ float fused_forward(const FusedAct& p, float gate, float up) {
  const auto s = [](float x) { return kShort ? short_sigmoid(x) : sigmoid(x).value; };
  if constexpr (F == ActFamily::kSwiglu) {
    return gate * s(gate) * up;
  } else if constexpr (F == ActFamily::kSigmoid) {
    const float x = at_most(gate, p.limit);
    float u = at_most(up, p.limit);
    u = (u < -p.limit ? -p.limit : u) + p.offset;
    return x * s(x * fmaf(p.b, cut_square(x), p.a)) * u;
  } else if constexpr (F == ActFamily::kNormal) {
    return gate * normal(gate).cdf * (up + p.offset);
  } else {
    const float x = gate < 0.f ? 0.f : gate;
    return x * (p.square ? x : up + p.offset);
  }
}

// Returns h, and dh times its derivatives.
template <ActFamily F>
__device__ __forceinline__ ActGrads<float> fused_backward(const FusedAct& p, float gate, float up,
                                                          float dh) {
  if constexpr (F == ActFamily::kSwiglu) {
    const Sigmoid<float> s = sigmoid(gate);
    const float v = gate * s.value;
    return {v * up, dh * up * fmaf(v, s.rest, s.value), dh * v};
  } else if constexpr (F == ActFamily::kSigmoid) {
    const float x = at_most(gate, p.limit);
    float u = at_most(up, p.limit);
    u = (u < -p.limit ? -p.limit : u) + p.offset;
    const float square = cut_square(x);
    const Sigmoid<float> s = sigmoid(x * fmaf(p.b, square, p.a));
    const float v = x * s.value;
    const float slope = fmaf(v * s.rest, fmaf(3.f * p.b, square, p.a), s.value);
    return {v * u, gate > p.limit ? 0.f : dh * u * slope,
            up > p.limit || up < -p.limit ? 0.f : dh * v};
  } else if constexpr (F == ActFamily::kNormal) {
    const Normal<float> n = normal(gate);
    const float v = gate * n.cdf, u = up + p.offset;
    return {v * u, dh * u * fmaf(gate, n.pdf, n.cdf), dh * v};
  } else {
    const float x = gate < 0.f ? 0.f : gate;
    const float u = p.square ? x : up + p.offset;
    const float slope = p.square ? x + x : gate > 0.f ? u : 0.f;
    return {x * u, dh * slope, dh * x};
  }
}

// Calls fn with the family as a constant.
template <class Fn>
__device__ __forceinline__ void with_family(ActFamily family, const Fn& fn) {
  switch (family) {
    case ActFamily::kSigmoid:
      return fn(std::integral_constant<ActFamily, ActFamily::kSigmoid>{});
    case ActFamily::kNormal:
      return fn(std::integral_constant<ActFamily, ActFamily::kNormal>{});
    case ActFamily::kRelu:
      return fn(std::integral_constant<ActFamily, ActFamily::kRelu>{});
    default:
      return fn(std::integral_constant<ActFamily, ActFamily::kSwiglu>{});
  }
}

}  // namespace moe_ops::cuda
