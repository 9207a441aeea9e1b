// Scores of single logits, which are all but the softmax, and their slopes. Division is exact: a
// rounding that differs from the CPU's could choose differently.
#pragma once

#include "moe_ops/score_func.h"

namespace moe_ops::cuda {

__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }
__device__ __forceinline__ float log1p_of(float x) { return log1pf(x); }
__device__ __forceinline__ double log1p_of(double x) { return log1p(x); }
__device__ __forceinline__ float sqrt_of(float x) { return __fsqrt_rn(x); }
__device__ __forceinline__ double sqrt_of(double x) { return __dsqrt_rn(x); }

template <class T>
__device__ __forceinline__ T sigmoid_score(T x) {
  const T z = exp_of(x > T(0) ? -x : x);
  return (x > T(0) ? T(1) : z) / (T(1) + z);
}

// sqrt(log(1 + e^x)); cpu/kernels/router_score-inl.h has the derivation.
template <class T>
struct SqrtSoftplus {
  T factor, root, u;

  __device__ __forceinline__ explicit SqrtSoftplus(T x) {
    const T h = exp_of((x > T(0) ? -x : x) * T(0.5));
    u = h * h;
    const T rest = log1p_of(u);
    // Where u is so small, log(1 + u) is u, and u may be zero.
    const T ratio = u < T(1e-20) ? T(1) : rest / u;
    root = sqrt_of(x > T(0) ? x + rest : ratio);
    factor = x > T(0) ? T(1) : h;
  }
  __device__ __forceinline__ T score() const { return factor * root; }
  __device__ __forceinline__ T slope() const { return factor * T(0.5) / ((T(1) + u) * root); }
};

template <class T>
__device__ __forceinline__ T score_of(ScoreFunc f, T x) {
  if (f == ScoreFunc::kSqrtSoftplus) return SqrtSoftplus<T>(x).score();
  return sigmoid_score(x);
}

template <class T>
__device__ __forceinline__ T slope_of(ScoreFunc f, T x) {
  if (f == ScoreFunc::kSqrtSoftplus) return SqrtSoftplus<T>(x).slope();
  // s(-x) is 1 - s(x) without the cancellation.
  return sigmoid_score(x) * sigmoid_score(-x);
}

}  // namespace moe_ops::cuda
