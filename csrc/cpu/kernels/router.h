// Routers: the linear map to logits.
#pragma once

#include <cstdint>

namespace moe_ops::cpu {

// Counts of experts are multiples of this.
constexpr int kRouterExperts = 4;

// out[t*ld_out + e] = bias[e] + sum_i x[t*ld_x + i] * w[e*ld_w + i] for t < tokens, e < experts,
// i < n, a multiple of lanes.
template <class T>
struct RouterLinear {
  int64_t tokens, experts, n;
  const T* x;
  int64_t ld_x;
  const T* w;
  int64_t ld_w;
  const T* bias;
  T* out;
  int64_t ld_out;
};
template <class T>
struct RouterLinearBwd {
  int64_t tokens, experts, n;
  const T* g;  // [tokens, experts], gradients of logits
  int64_t ld_g;
  const T* x;  // [tokens, n]
  int64_t ld_x;
  const T* w;  // [experts, n]
  int64_t ld_w;
  T* grad_x;  // [tokens, n], or nullptr
  int64_t ld_grad_x;
  T* grad_w;  // [experts, n], added to, or nullptr
  int64_t ld_grad_w;
};

template <class T>
struct RouterKernels {
  void (*linear)(const RouterLinear<T>& p);
  void (*linear_bwd)(const RouterLinearBwd<T>& p);
};

template <class T>
const RouterKernels<T>& router_kernels();

}  // namespace moe_ops::cpu
