// One row of router logits: what the routers do to it before anything is chosen, and the choice.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "moe_ops/router_bwd.h"

namespace moe_ops::cpu {

// T is float, or double for fp64
// logits. A row has a whole number of kRowUnit elements and starts on a 64-byte boundary; past E it
// is padded with -inf (values) or kNoKey (keys).
constexpr int64_t kRowUnit = 16;

// Keys are integers in the order of the values they stand for: NaN is below -inf, and both zeros
// are equal. kNoKey is below everything: padding, experts that are taken or not allowed.
template <class T>
using RouterKey = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
template <class T>
constexpr RouterKey<T> kNoKey = sizeof(T) == 8 ? INT64_MIN : INT32_MIN;

// Up to so many experts and slots a token, kLaneTokens tokens go together, one in a lane: x, ids
// and the others are planes of kLaneTokens elements, one an expert or a slot, on 64-byte
// boundaries.
constexpr int64_t kLaneExperts = 16;
constexpr int64_t kLaneTokens = 64;
template <class T>
struct RouterLanes {
  int64_t tokens;  // up to the end of their last vector, planes are read and written
  int64_t experts, top_k;
  bool softmax, topk_first, renormalize;
  T scale;
  const T* x;         // [experts], logits
  RouterKey<T>* ids;  // [top_k]; backward reads them, -1 is no expert
  T* weights;         // [top_k]; backward reads their gradients
  T* grad_x;          // [experts], backward only
};

// Most rows of a call. Each step of a choice waits for the one before, 75 cycles, and exponentials
// for the largest value; those of several rows run side by side.
constexpr int64_t kRouterRows = 8;

// Up to this many vectors of keys are looked through directly; blocks only pay beyond.
constexpr int64_t kFlatVectors = 4;

template <class T>
struct RouterRow {
  using Key = RouterKey<T>;
  // e[i] = exp(x[i] - max x) and the sum of e, of rows that lie `pitch` apart.
  void (*exp_sum)(const T* x, T* e, int64_t rows, int64_t pitch, int64_t n, T* sums);
  // e[i] = exp(x[i]) of x[i] <= 0 or NaN
  void (*exp)(const T* x, T* e, int64_t n);
  // s[i] = sigmoid(x[i])
  void (*sigmoid)(const T* x, T* s, int64_t n);
  // keys[i] = key of x[i]
  void (*make_keys)(const T* x, Key* keys, int64_t n);
  // Best key of each block of a vector's width. block_max has room for n + kRowUnit keys.
  void (*find_block_max)(const Key* keys, Key* block_max, int64_t n);
  // Takes the k best keys of each row out, best first, equal ones by position, and writes their
  // positions, [rows, k]. Can be called again for the next ones. There must be k keys above kNoKey
  // in a row. Rows of keys and of block_max lie `pitch` apart.
  void (*take_best)(Key* keys, Key* block_max, int64_t rows, int64_t pitch, int64_t n, int64_t k,
                    int32_t* positions);
  // The choice, its ids and weights; and the gradients of logits, given ids and gradients of
  // weights.
  void (*route_lanes)(const RouterLanes<T>& p);
  void (*route_lanes_bwd)(const RouterLanes<T>& p);

  // exp_sum of one row.
  T exp_sum_of(const T* x, T* e, int64_t n) const {
    T sum;
    exp_sum(x, e, 1, 0, n, &sum);
    return sum;
  }
  // out[i] = softmax or sigmoid of x[i] for i < n; x and e have `padded` elements.
  void scores(ScoreFunc f, const T* x, T* e, int64_t padded, int64_t n, T* out) const {
    if (f == ScoreFunc::kSoftmax) {
      const T sum = exp_sum_of(x, e, padded);
      for (int64_t i = 0; i < n; ++i) out[i] = e[i] / sum;
    } else {
      sigmoid(x, e, padded);
      std::copy_n(e, n, out);
    }
  }
};

template <class T>
const RouterRow<T>& router_row();  // for active_isa()

}  // namespace moe_ops::cpu
