// Mixtures of the outputs of all experts (mix_expert_outputs). Every count of elements is a
// multiple of lanes.
#pragma once

#include <cstdint>

#include "moe_ops/mix_expert_outputs.h"

namespace moe_ops::cpu {

// Normalization of one token's outputs, (x - mean) * scale + shift; mean == nullptr: none.
template <class T>
struct MixNormRows {
  const T *mean = nullptr, *scale = nullptr, *shift = nullptr;
};

// c[i*ld + j] = sum_k a[i*step_i + k*step_k] * b[k*ld + j] for i < rows, j < ld.
template <class T>
struct MixProduct {
  int64_t rows, depth;
  const T* a;
  int64_t step_i, step_k;
  const T* b;
  T* c;
  int64_t ld;
};
// d *= slope; sum += d, sum_x += d * (x - mean) where they are not nullptr.
template <class T>
struct MixSlope {
  int64_t n;
  const T* slope;
  const T* mean;
  const T* x;
  T *d, *sum, *sum_x;
};
// out = scale * (d - at - by * (x - mean)), without the last two where at is nullptr.
template <class T>
struct MixNormGrad {
  int64_t n;
  MixNormRows<T> norm;
  const T *at, *by, *x, *d;
  T* out;
};

template <class T>
struct MixKernels {
  // z = act(normalized x), slope = act' of it where it is not nullptr.
  void (*act)(MixActivation kind, const MixNormRows<T>& norm, const T* x, int64_t n, T* z,
              T* slope);
  void (*product)(const MixProduct<T>& p);
  // out[i*count + e] = sum_j g[i*ld + j] * z[e*ld + j] for i < rows, e < count.
  void (*weight_grads)(int64_t rows, int64_t count, const T* g, const T* z, T* out, int64_t ld);
  void (*slope)(const MixSlope<T>& p);
  void (*norm_grad)(const MixNormGrad<T>& p);
  // Means and sums of squared distances from them, over `count` rows of n.
  void (*moments)(int64_t count, int64_t n, const T* x, T* mean, T* squares);
};

template <class T>
const MixKernels<T>& mix_kernels();

}  // namespace moe_ops::cpu
