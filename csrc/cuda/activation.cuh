// Activations of the expert FFN, one element at a time in the accumulate type (float or double):
// the value, and the value with its derivatives. For elementwise kernels and GEMM epilogues; what a
// caller does not use of a result is not computed.
#pragma once

#include "moe_ops/activation.h"

namespace moe_ops::cuda {

// For activations with has_limit; alpha for kSwigluOai.
template <class T>
struct ActLimits {
  T alpha, limit;
};

template <class T>
ActLimits<T> act_limits(const ActivationParams& act) {
  return {static_cast<T>(act.alpha), static_cast<T>(act.limit)};
}

// s(x) and s(-x) = 1 - s(x), neither with cancellation nor overflow: only e^-|x| is taken, so the
// denominator lies in [1, 2], where the fast division is good to 2 ulp.
template <class T>
struct Sigmoid {
  T value, rest;
};

__device__ __forceinline__ Sigmoid<float> sigmoid(float x) {
  const float z = expf(-fabsf(x));
  const float big = __fdividef(1.0f, 1.0f + z), small = z * big;
  return x >= 0.0f ? Sigmoid<float>{big, small} : Sigmoid<float>{small, big};
}

__device__ __forceinline__ Sigmoid<double> sigmoid(double x) {
  const double z = exp(-fabs(x));
  const double big = 1.0 / (1.0 + z), small = z * big;
  return x >= 0.0 ? Sigmoid<double>{big, small} : Sigmoid<double>{small, big};
}

// The normal distribution: cdf = erfc(-x / sqrt 2) / 2 and pdf = e^(-x^2/2) / sqrt(2 pi).
template <class T>
struct Normal {
  T cdf, pdf;
};

__device__ __forceinline__ Normal<float> normal(float x) {
  // erfc(z) = t Q(t) e^(-z^2) with t = 1 / (1 + z/2); Q is a degree-9 least-squares fit on
  // Chebyshev nodes over z in [0, 10], relative error 1.3e-7 in fp32. The exponential serves both.
  constexpr float q[] = {0.28206289f, 0.28289402f,  0.23828822f, 0.22744551f,  -0.10452848f,
                         0.43415189f, -0.68704581f, 0.44281113f, -0.12961404f, 0.01353465f};
  const float z = fabsf(x) * 0.70710678f;
  const float e = expf(-z * z);
  const float t = __fdividef(1.0f, 1.0f + 0.5f * fminf(z, 16.0f));  // e is 0 well before 16
  float p = q[9];
#pragma unroll
  for (int i = 8; i >= 0; --i) p = fmaf(p, t, q[i]);
  const float half_erfc = 0.5f * t * p * e;
  return {x < 0.0f ? half_erfc : 1.0f - half_erfc, 0.39894228f * e};
}

__device__ __forceinline__ Normal<double> normal(double x) {
  return {0.5 * erfc(-x * 0.70710678118654752), 0.3989422804014327 * exp(-0.5 * x * x)};
}

template <class T>
struct ValueSlope {
  T value, slope;
};

// Returns a(x) and a'(x); the limits of kSwigluOai are applied in act_forward.
template <Activation A, class T>
__device__ __forceinline__ ValueSlope<T> activate(T x) {
  if constexpr (A == Activation::kSwiglu || A == Activation::kSilu) {
    const Sigmoid<T> s = sigmoid(x);
    return {x * s.value, s.value * (T(1) + x * s.rest)};
  } else if constexpr (A == Activation::kGeglu || A == Activation::kGelu) {
    const Normal<T> n = normal(x);
    return {x * n.cdf, n.cdf + x * n.pdf};
  } else if constexpr (A == Activation::kGegluTanh || A == Activation::kGeluTanh) {
    // (1 + tanh(u)) / 2 = sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
    constexpr T c = T(2 * 0.7978845608028654);
    const Sigmoid<T> s = sigmoid(c * (x + T(0.044715) * x * x * x));
    return {x * s.value, s.value + x * s.value * s.rest * c * (T(1) + T(3 * 0.044715) * x * x)};
  } else if constexpr (A == Activation::kRelu2) {
    const T r = x < T(0) ? T(0) : x;  // NaN stays
    return {r * r, r + r};
  } else {
    static_assert(A == Activation::kReglu || A == Activation::kRelu);
    return {x < T(0) ? T(0) : x, x > T(0) ? T(1) : T(0)};
  }
}

// Returns h = act(gate) * up, or act(gate) for activations without a gate, which do not read up.
template <Activation A, class T>
__device__ __forceinline__ T act_forward(T gate, T up, const ActLimits<T>& p) {
  if constexpr (has_limit(A)) {
    const T g = gate > p.limit ? p.limit : gate;
    T u = up > p.limit ? p.limit : up;
    u = u < -p.limit ? -p.limit : u;
    if constexpr (A == Activation::kSwigluClamped) return u * g * sigmoid(g).value;
    return (u + T(1)) * g * sigmoid(p.alpha * g).value;
  } else if constexpr (is_gated(A)) {
    return activate<A, T>(gate).value * up;
  } else {
    return activate<A, T>(gate).value;
  }
}

// h as above, and dh times its derivatives in gate and up.
template <class T>
struct ActGrads {
  T h, gate, up;
};

template <Activation A, class T>
__device__ __forceinline__ ActGrads<T> act_backward(T gate, T up, T dh, const ActLimits<T>& p) {
  if constexpr (has_limit(A)) {
    constexpr bool kOai = A == Activation::kSwigluOai;
    const T alpha = kOai ? p.alpha : T(1);
    const T g = gate > p.limit ? p.limit : gate;
    T u = up > p.limit ? p.limit : up;
    u = (u < -p.limit ? -p.limit : u) + T(kOai ? 1 : 0);
    const Sigmoid<T> s = sigmoid(alpha * g);
    const T dgate = dh * u * s.value * (T(1) + alpha * g * s.rest);
    const T dup = dh * g * s.value;
    return {u * g * s.value, gate > p.limit ? T(0) : dgate,
            up > p.limit || up < -p.limit ? T(0) : dup};
  } else {
    const ValueSlope<T> a = activate<A, T>(gate);
    if constexpr (is_gated(A)) {
      return {a.value * up, dh * up * a.slope, dh * a.value};
    } else {
      return {a.value, dh * a.slope, T(0)};
    }
  }
}

}  // namespace moe_ops::cuda
