// Steps between the GEMMs of attention: scores to weights, and gradients of weights to gradients of
// scores, on fragments in registers.
//
// A fragment is a thread's part of an mma or wgmma result: among a warp's 16 rows, rows g and g + 8
// (g = lane / 4), and in each octet j of columns, columns 8 j + 2 q and 8 j + 2 q + 1 (q = lane %
// 4). A row is held by a quad of lanes; its columns are keys in order.
#pragma once

#include <cstdint>

#include "cuda/reduce.cuh"

namespace moe_ops::cuda::attention {

template <class T, int kTiles>
struct Fragment {
  static constexpr int kCount = kTiles;
  T v[kTiles][4];  // v[j][2 i + c]: row g + 8 i, column 8 j + 2 q + c

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) (&v[0][0])[i] = 0;
  }
  // Multiplies rows by factors.
  __device__ void scale_rows(const T (&factor)[2]) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) v[j][i] *= factor[i / 2];
    }
  }
};

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Results that are not normal numbers become zero.
__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float exponential(float x) { return exp2_of(x * kLog2E); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float quotient(float a, float b) { return __fdividef(a, b); }
__device__ __forceinline__ double quotient(double a, double b) { return a / b; }

template <class T>
constexpr T kLowest = sizeof(T) == 8 ? T(-1.7e308) : T(-3.4e38);
// Below this the exponential is no normal number: a stick so short is empty.
template <class T>
constexpr T kLogTiny = sizeof(T) == 8 ? T(-708.0) : T(-87.33);

// Returns log(1 + u) for u from 0 to 1. The polynomial times u has the least relative error, 3e-8;
// ours with rounding has 2e-7. It costs no second special function, whose unit is the bound of
// stick-breaking, and unlike a logarithm of 1 + u it keeps the digits of small u.
__device__ __forceinline__ float log_one_plus(float u) {
  constexpr float kTerms[] = {0.005232692696f, -0.02950523235f, 0.07822594047f,
                              -0.1366324425f,  0.1910600662f,   -0.2484298199f,
                              0.3331909776f,   -0.4999949336f,  0.9999999404f};
  float p = kTerms[0];
#pragma unroll
  for (int i = 1; i < 9; ++i) p = fmaf(p, u, kTerms[i]);
  return p * u;
}
__device__ __forceinline__ double log_one_plus(double u) { return log1p(u); }

template <class T>
struct LogSigmoid {
  T share, rest;  // log(sigmoid(x)) and log(1 - sigmoid(x))
};

template <class T>
__device__ __forceinline__ LogSigmoid<T> log_sigmoid(T x) {
  const T l = log_one_plus(exponential(x < T(0) ? x : -x));
  return {(x < T(0) ? x : T(0)) - l, -((x > T(0) ? x : T(0)) + l)};
}

template <class T>
__device__ __forceinline__ T sigmoid_of(T x) {
  const T u = exponential(x < T(0) ? x : -x);
  const T larger = quotient(T(1), T(1) + u);
  return x >= T(0) ? larger : u * larger;
}

// Returns tanh(x) = (1 - u) / (1 + u), u = e^-2|x|. Near zero 1 - u would cancel: there it is the
// Taylor sum of -expm1, whose remainder at |2x| < 0.35 is below half an ulp.
template <class T>
__device__ __forceinline__ T tanh_of(T x) {
  constexpr int kDegree = sizeof(T) == 8 ? 13 : 7;
  const T y = T(-2) * (x < T(0) ? -x : x);
  T p = 1;
#pragma unroll
  for (int i = kDegree; i >= 2; --i) p = p * y * T(1.0 / i) + T(1);
  const T m = y > T(-0.35) ? -y * p : T(1) - exponential(y);
  const T t = quotient(m, T(2) - m);
  return x < T(0) ? -t : t;
}

// Products to logits.
template <class T>
struct Logits {
  T scale, cap, inverse;  // cap 0: none
  __host__ __device__ Logits(double scale, double cap)
      : scale(static_cast<T>(scale)),
        cap(static_cast<T>(cap)),
        inverse(cap > 0 ? static_cast<T>(1 / cap) : T(0)) {}

  template <int kTiles>
  __device__ void apply(Fragment<T, kTiles>& s) const {
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) (&s.v[0][0])[i] *= scale;
    if (cap > 0) {
#pragma unroll
      for (int i = 0; i < 4 * kTiles; ++i) {
        T& x = (&s.v[0][0])[i];
        x = cap * tanh_of(x * inverse);
      }
    }
  }
  // Returns the derivative of a logit by its product, without the scale.
  __device__ T slope(T logit) const {
    const T t = logit * inverse;  // 0 without a cap
    return T(1) - t * t;
  }
};

// Logits without a cap.
struct PlainLogits {
  float scale;
  template <int kTiles>
  __device__ void apply(Fragment<float, kTiles>& s) const {
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) (&s.v[0][0])[i] *= scale;
  }
  __device__ float slope(float) const { return 1.f; }
};

// Which columns of a tile this thread's two rows see.
struct Mask {
  int first[2], last[2];
  __device__ bool sees(int i, int j, int c) const {
    const int column = 8 * j + c;
    return column >= first[i] && column < last[i];
  }
  // Excludes rows whose stick is empty, which see nothing: the keys must not affect them, and
  // whether keys are read depends on the sticks of the rows beside them. Returns whether there is
  // such a row.
  template <class T>
  __device__ bool leave_out_empty_sticks(const T (&log_rest)[2]) {
    bool any = false;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool empty = log_rest[i] < kLogTiny<T>;
      if (empty) last[i] = first[i];
      any |= empty;
    }
    return any;
  }
};

// A tile that all rows of a warp see whole.
struct NoMask {
  __device__ bool sees(int, int, int) const { return true; }
};

template <class T>
__device__ __forceinline__ T quad_sum(T v) {
  v += __shfl_xor_sync(kAllLanes, v, 1);
  v += __shfl_xor_sync(kAllLanes, v, 2);
  return v;
}
template <class T>
__device__ __forceinline__ T quad_max(T v) {
  v = max_number(v, __shfl_xor_sync(kAllLanes, v, 1));
  return max_number(v, __shfl_xor_sync(kAllLanes, v, 2));
}

template <class T>
struct QuadScan {
  T others, total;
};
// Returns the sums of the lanes after this one and of all four, without subtraction.
template <class T>
__device__ __forceinline__ QuadScan<T> quad_after(T v) {
  const int q = static_cast<int>(threadIdx.x) % 4;
  const T neighbor = __shfl_xor_sync(kAllLanes, v, 1);
  const T pair = v + neighbor, others = __shfl_xor_sync(kAllLanes, pair, 2);
  return {(q % 2 == 0 ? neighbor : T(0)) + (q < 2 ? others : T(0)), pair + others};
}
// Like quad_after, but `others` sums the lanes before this one.
template <class T>
__device__ __forceinline__ QuadScan<T> quad_before(T v) {
  const int q = static_cast<int>(threadIdx.x) % 4;
  const T neighbor = __shfl_xor_sync(kAllLanes, v, 1);
  const T pair = v + neighbor, others = __shfl_xor_sync(kAllLanes, pair, 2);
  return {(q % 2 == 1 ? neighbor : T(0)) + (q >= 2 ? others : T(0)), pair + others};
}

// ---- Softmax ----

template <class T>
struct SoftmaxRows {
  T max[2] = {kLowest<T>, kLowest<T>};
  T sum[2] = {0, 0};  // of this thread's columns

  // Replaces logits by e^(logit - max); sets the factors by which earlier sums shrink.
  template <int kTiles, class Mask>
  __device__ void step(Fragment<T, kTiles>& s, const Mask& mask, T (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      T m = max[i];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          if (mask.sees(i, j, c)) m = max_number(m, s.v[j][2 * i + c]);
        }
      }
      m = quad_max(m);
      factor[i] = exponential(max[i] - m);
      max[i] = m;
      T total = sum[i] * factor[i];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          T& x = s.v[j][2 * i + c];
          x = mask.sees(i, j, c) ? exponential(x - m) : T(0);
          total += x;
        }
      }
      sum[i] = total;
    }
  }
};

// Replaces logits by gradients of logits (without the slope of the cap), and sets `w` to the
// weights.
template <class T, int kTiles, class Mask, class Logits>
__device__ void softmax_gradient(Fragment<T, kTiles>& s, Fragment<T, kTiles>& w,
                                 const Fragment<T, kTiles>& dp, const Mask& mask,
                                 const Logits& logits, const T (&log_sum)[2], const T (&delta)[2]) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int i = e / 2;
      const T x = s.v[j][e];
      const T p = mask.sees(i, j, e % 2) ? exponential(x - log_sum[i]) : T(0);
      w.v[j][e] = p;
      // Zero times what is not finite would be no zero.
      s.v[j][e] = mask.sees(i, j, e % 2) ? p * (dp.v[j][e] - delta[i]) * logits.slope(x) : T(0);
    }
  }
}

// ---- Stick-breaking ----

// Walks a tile from its last key to its first. log_rest: log of what is left of the stick, before
// and after. Logits become weights with kWeights.
template <bool kWeights, class T, int kTiles, class Mask>
__device__ void break_sticks(Fragment<T, kTiles>& s, const Mask& mask, T (&log_rest)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    T rest = log_rest[i];
#pragma unroll
    for (int j = kTiles - 1; j >= 0; --j) {
      T &x0 = s.v[j][2 * i], &x1 = s.v[j][2 * i + 1];
      LogSigmoid<T> l0 = log_sigmoid(x0), l1 = log_sigmoid(x1);
      const bool sees0 = mask.sees(i, j, 0), sees1 = mask.sees(i, j, 1);
      if (!sees0) l0.rest = 0;
      if (!sees1) l1.rest = 0;
      const QuadScan<T> scan = quad_after(l0.rest + l1.rest);
      if constexpr (kWeights) {
        const T r1 = rest + scan.others, r0 = r1 + l1.rest;
        x1 = sees1 ? exponential(l1.share + r1) : T(0);
        x0 = sees0 ? exponential(l0.share + r0) : T(0);
      }
      rest += scan.total;
    }
    log_rest[i] = rest;
  }
}

// Computes gradients of logits. With w = z_j P_j and P_j the product of 1 - z over the keys after
// j, logit j moves w_j by w_j (1 - z_j) and every weight of a key before j, and what remains, by
// -z_j times itself. `before` is the sum of weight times gradient over those; it grows from the
// first key on, so nothing is subtracted from a total. Logits become their gradients, `w` weights.
template <class T, int kTiles, class Mask, class Logits>
__device__ void stick_gradient(Fragment<T, kTiles>& s, Fragment<T, kTiles>& w,
                               const Fragment<T, kTiles>& dp, const Mask& mask,
                               const Logits& logits, T (&log_rest)[2], T (&before)[2]) {
  w = s;
  break_sticks<true>(w, mask, log_rest);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    T sum = before[i];
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      T &x0 = s.v[j][2 * i], &x1 = s.v[j][2 * i + 1];
      const bool sees0 = mask.sees(i, j, 0), sees1 = mask.sees(i, j, 1);
      const T g0 = sees0 ? w.v[j][2 * i] * dp.v[j][2 * i] : T(0);
      const T g1 = sees1 ? w.v[j][2 * i + 1] * dp.v[j][2 * i + 1] : T(0);
      const QuadScan<T> scan = quad_before(g0 + g1);
      const T b0 = sum + scan.others, b1 = b0 + g0;
      const T z0 = sigmoid_of(x0), z1 = sigmoid_of(x1);
      x0 = sees0 ? (g0 * (T(1) - z0) - z0 * b0) * logits.slope(x0) : T(0);
      x1 = sees1 ? (g1 * (T(1) - z1) - z1 * b1) * logits.slope(x1) : T(0);
      sum += scan.total;
    }
    before[i] = sum;
  }
}

}  // namespace moe_ops::cuda::attention
