// Routers: the linear map to logits, scores of rows of logits, and the selection of experts.
#pragma once

#include <cstdint>

#include "moe_ops/score_func.h"

namespace moe_ops::cpu {

// A row of logits of the others has a whole number of kRowUnit elements and starts on a 64-byte
// boundary; past E it is padded with -inf (values) or kNoKey (keys).
constexpr int64_t kRowUnit = 16;
// Most rows of a call. Each step of a selection waits for the one before, 75 cycles, and
// exponentials for the largest value; those of several rows run side by side.
constexpr int64_t kRouterRows = 8;
// Up to this many vectors of keys are searched directly; maxima of blocks only pay beyond.
constexpr int64_t kFlatVectors = 4;

// Keys are integers in the order of the values they stand for: NaN is below -inf, and both zeros
// are equal. kNoKey is below everything: padding, experts that are taken or not allowed.
template <class T>
struct RouterKeyOf {
  using type = int32_t;
};
template <>
struct RouterKeyOf<double> {
  using type = int64_t;
};
template <class T>
using RouterKey = typename RouterKeyOf<T>::type;
template <class T>
constexpr RouterKey<T> kNoKey = sizeof(T) == 8 ? INT64_MIN : INT32_MIN;

// Takes the k best keys of each row out, best first, equal ones by position, and writes their
// positions, [rows, k]. Can be called again for the next ones. There must be k keys above kNoKey in
// a row. Rows of keys and of block_max are `ld` apart.
template <class T>
struct TakeBest {
  RouterKey<T>*keys, *block_max;
  int64_t rows, ld, n, k;
  int32_t* positions;
};

// Up to kSoaExperts experts and slots a token, kSoaTokens tokens go together as structures of
// arrays: x, ids and the others are arrays of kSoaTokens elements, one an expert or a slot, on
// 64-byte boundaries.
constexpr int64_t kSoaExperts = 16;
constexpr int64_t kSoaTokens = 64;
template <class T>
struct RouteSoa {
  int64_t tokens;  // up to the end of their last vector, arrays are read and written
  int64_t experts, top_k;
  ScoreFunc score_func;
  bool topk_first, renormalize;
  T scale;
  const T* x;         // [experts], logits
  RouterKey<T>* ids;  // [top_k]; backward reads them, -1 is no expert
  T* weights;         // [top_k]; backward reads their gradients
  T* grad_x;          // [experts], backward only
};

// The linear map takes experts in groups of so many.
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
  // e[i] = exp(x[i] - max x) and the sum of e, of rows `ld` apart.
  void (*exp_sum)(const T* x, T* e, int64_t rows, int64_t ld, int64_t n, T* sums);
  void (*exp)(const T* x, T* e, int64_t n);  // of x[i] <= 0 or NaN
  // Scores that are no softmax, and for `slope_row` their derivatives in the logit.
  void (*score_row)(ScoreFunc f, const T* x, T* s, int64_t n);
  void (*slope_row)(ScoreFunc f, const T* x, T* s, T* slope, int64_t n);
  void (*make_keys)(const T* x, RouterKey<T>* keys, int64_t n);
  // The best key of each block of a vector's width. block_max has room for n + kRowUnit keys.
  void (*find_block_max)(const RouterKey<T>* keys, RouterKey<T>* block_max, int64_t n);
  void (*take_best)(const TakeBest<T>& p);
  // Top-k selection with its ids and weights, and the gradients of logits, given ids and gradients
  // of weights.
  void (*route_soa)(const RouteSoa<T>& p);
  void (*route_soa_bwd)(const RouteSoa<T>& p);
};

template <class T>
const RouterKernels<T>& router_kernels();

}  // namespace moe_ops::cpu
