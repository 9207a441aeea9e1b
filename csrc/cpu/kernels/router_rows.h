// Rows of logits for the kernels of routers: scores of one row, and rows of tokens to structures of
// arrays and back.
#pragma once

#include <algorithm>

#include "cpu/kernels/router.h"
#include "cpu/kernels/rows.h"
#include "moe_ops/score_func.h"

namespace moe_ops::cpu {

// Returns exp_sum of one row.
template <class T>
T exp_sum_of(const RouterKernels<T>& k, const T* x, T* e, int64_t n) {
  T sum;
  k.exp_sum(x, e, 1, 0, n, &sum);
  return sum;
}

// Computes out[i] = score of x[i] for i < n; x and e have `padded` elements.
template <class T>
void scores_of(const RouterKernels<T>& k, ScoreFunc f, const T* x, T* e, int64_t padded, int64_t n,
               T* out) {
  if (is_softmax(f)) {
    const T sum = exp_sum_of(k, x, e, padded);
    for (int64_t i = 0; i < n; ++i) out[i] = e[i] / sum;
  } else {
    k.score_row(f, x, e, padded);
    std::copy_n(e, n, out);
  }
}

template <int64_t kWidth, class From, class To>
void to_soa_of(const From* rows, int64_t stride, int64_t tokens, int64_t width, To* arrays) {
  const int64_t n = kWidth > 0 ? kWidth : width;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = 0; i < n; ++i) {
      arrays[i * kSoaTokens + t] = static_cast<To>(rows[t * stride + i]);
    }
  }
}

// Transposes rows to arrays; tokens after the last, up to the end of a vector, become `rest`.
template <class From, class To>
void to_soa(const From* rows, int64_t stride, int64_t tokens, int64_t width, To* arrays, To rest) {
  const int64_t end = round_up(tokens, kRowUnit);
  for (int64_t i = 0; tokens < end && i < width; ++i) {
    std::fill(arrays + i * kSoaTokens + tokens, arrays + i * kSoaTokens + end, rest);
  }
  // Loops of a known length have no branch in them.
  if (width == 2) return to_soa_of<2>(rows, stride, tokens, width, arrays);
  if (width == 4) return to_soa_of<4>(rows, stride, tokens, width, arrays);
  to_soa_of<0>(rows, stride, tokens, width, arrays);
}

template <int64_t kWidth, class From, class To>
void from_soa_of(const From* arrays, int64_t tokens, int64_t width, To* rows) {
  const int64_t n = kWidth > 0 ? kWidth : width;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = 0; i < n; ++i) rows[t * n + i] = static_cast<To>(arrays[i * kSoaTokens + t]);
  }
}

template <class From, class To>
void from_soa(const From* arrays, int64_t tokens, int64_t width, To* rows) {
  if (width == 2) return from_soa_of<2>(arrays, tokens, width, rows);
  if (width == 4) return from_soa_of<4>(arrays, tokens, width, rows);
  from_soa_of<0>(arrays, tokens, width, rows);
}

// Returns the settings of a router's parameters, forward or backward, without arrays.
template <class T, class Params>
RouteSoa<T> soa_of(const Params& p) {
  RouteSoa<T> soa = {};
  soa.experts = p.num_experts;
  soa.top_k = p.top_k;
  soa.score_func = p.score_func;
  soa.topk_first = p.topk_first;
  soa.renormalize = p.renormalize;
  soa.scale = static_cast<T>(p.routed_scaling_factor);
  return soa;
}

// Loads the logits of `tokens` tokens from t on, of a router's parameters, forward or backward;
// `rows`: scratch, [tokens, experts].
template <class T, class Params>
void logits_to_soa(const RowKernels<T>& kernel, const Params& p, int64_t t, int64_t tokens, T* rows,
                   T* arrays) {
  const DType type = p.type;
  const int64_t stride = p.logits_stride, experts = p.num_experts;
  const char* const from =
      static_cast<const char*>(p.router_logits) + t * stride * dtype_size(type);
  if (type == kAccumulate<T>) {
    return to_soa(reinterpret_cast<const T*>(from), stride, tokens, experts, arrays, T(0));
  }
  if (stride == experts) {
    kernel.load_row(type, from, rows, tokens * experts, T(1));
  } else {
    kernel.load_rows({type, from, stride, tokens, experts}, rows, experts, T(1));
  }
  to_soa(rows, experts, tokens, experts, arrays, T(0));
}

}  // namespace moe_ops::cpu
