// The activations as epilogues compute them: four families instead of ten kinds, the rest are
// numbers. A kernel unrolls its epilogue once a family.
//   kSwiglu   x s(x) u                     swiglu
//   kSigmoid  x s(x (a + b x^2)) u         swiglu_oai, geglu_tanh, silu, gelu_tanh
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
  float limit;  // infinite except for swiglu_oai
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

// x^2 for the polynomial of kSigmoid: where it is cut off, s has long been 0 or 1, and 0 * infinity
// cannot arise when b is 0.
__device__ __forceinline__ float cut_square(float x) { return fminf(x * x, 1e6f); }

template <ActFamily F>
__device__ __forceinline__ float fused_forward(const FusedAct& p, float gate, float up) {
  if constexpr (F == ActFamily::kSwiglu) {
    return gate * sigmoid(gate).value * up;
  } else if constexpr (F == ActFamily::kSigmoid) {
    const float x = at_most(gate, p.limit);
    float u = at_most(up, p.limit);
    u = (u < -p.limit ? -p.limit : u) + p.offset;
    return x * sigmoid(x * fmaf(p.b, cut_square(x), p.a)).value * u;
  } else if constexpr (F == ActFamily::kNormal) {
    return gate * normal(gate).cdf * (up + p.offset);
  } else {
    const float x = gate < 0.f ? 0.f : gate;
    return x * (p.square ? x : up + p.offset);
  }
}

// s(x) of two numbers of a row, for results of 16 bits. Both denominators lie in [1, 2], so that
// one reciprocal of their product serves both. A NaN reaches both; it makes the row NaN in the down
// projection anyway.
__device__ __forceinline__ float2 sigmoid_pair(float x0, float x1) {
  const auto exp_minus_abs = [](float x) {
    float z;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(z) : "f"(fabsf(x) * -1.4426950409f));
    return z;
  };
  const float z0 = exp_minus_abs(x0), z1 = exp_minus_abs(x1);
  const float d0 = 1.f + z0, d1 = 1.f + z1;
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(d0 * d1));
  return {(x0 < 0.f ? z0 : 1.f) * (r * d1), (x1 < 0.f ? z1 : 1.f) * (r * d0)};
}

// fused_forward of two.
template <ActFamily F>
__device__ __forceinline__ float2 fused_forward_pair(const FusedAct& p, const float (&gate)[2],
                                                     const float (&up)[2]) {
  if constexpr (F == ActFamily::kSwiglu) {
    const float2 s = sigmoid_pair(gate[0], gate[1]);
    return {gate[0] * s.x * up[0], gate[1] * s.y * up[1]};
  } else if constexpr (F == ActFamily::kSigmoid) {
    float x[2], u[2], z[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      x[c] = at_most(gate[c], p.limit);
      u[c] = at_most(up[c], p.limit);
      u[c] = (u[c] < -p.limit ? -p.limit : u[c]) + p.offset;
      z[c] = x[c] * fmaf(p.b, cut_square(x[c]), p.a);
    }
    const float2 s = sigmoid_pair(z[0], z[1]);
    return {x[0] * s.x * u[0], x[1] * s.y * u[1]};
  } else {
    return {fused_forward<F>(p, gate[0], up[0]), fused_forward<F>(p, gate[1], up[1])};
  }
}

// h, and dh times its derivatives.
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
