// topk_router: each token's K experts and their weights from router logits. T tokens, E experts,
// K top-k, G groups of E/G consecutive experts.
#pragma once

#include <cstdint>
#include <type_traits>

#include "moe_ops/common.h"

namespace moe_ops {

enum class ScoreFunc : int { kSoftmax, kSigmoid };
enum class GroupScore : int { kMax, kTop2Sum };

struct TopkRouterParams {
  const void* router_logits;  // [T,E], rows logits_stride elements apart
  DType type;
  int64_t logits_stride;
  int64_t num_tokens;   // T
  int64_t num_experts;  // E
  int64_t top_k;        // K
  ScoreFunc score_func;
  bool topk_first;
  bool renormalize;
  double routed_scaling_factor;
  const void* expert_bias;  // [E] fp32 (fp64 for fp64 logits); nullptr: no bias
  int64_t num_groups;       // G
  int64_t num_topk_groups;
  GroupScore group_score;
  void* topk_weights;  // [T,K] out, fp32 (fp64 for fp64 logits)
  int32_t* topk_ids;   // [T,K] out
};

// The gradient of every router: given the ids, none of them looks at the selection again.
struct RouterBwdParams {
  const void* grad_weights;   // [T,K] fp32 (fp64 for fp64 logits)
  const void* router_logits;  // [T,E], rows logits_stride elements apart
  DType type;
  int64_t logits_stride;
  const int32_t* topk_ids;  // [T,K]; -1 where there is no expert, never out of range otherwise
  int64_t num_tokens;       // T
  int64_t num_experts;      // E
  int64_t top_k;            // K
  ScoreFunc score_func;
  bool topk_first;
  bool renormalize;
  double routed_scaling_factor;
  void* grad_logits;  // [T,E] out, of `type`
};

namespace cpu {

void topk_router(const TopkRouterParams& p, const Parallel& par);
void router_bwd(const RouterBwdParams& p, const Parallel& par);

// What one row of logits goes through, shared by the routers. T is float, or double for fp64
// logits. A row has a whole number of kRowUnit elements and starts on a 64-byte boundary; past E it
// is padded with -inf (values) or kNoKey (keys).
constexpr int64_t kRowUnit = 8;

// Keys are integers in the order of the values they stand for: NaN is below -inf, and both zeros
// are equal. kNoKey is below everything: padding, experts that are taken or not allowed.
template <class T>
using RouterKey = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
template <class T>
constexpr RouterKey<T> kNoKey = sizeof(T) == 8 ? INT64_MIN : INT32_MIN;

template <class T>
struct RouterRow {
  using Key = RouterKey<T>;
  // e[i] = exp(x[i] - max x); returns the sum of e.
  T (*exp_sum)(const T* x, T* e, int64_t n);
  // s[i] = sigmoid(x[i])
  void (*sigmoid)(const T* x, T* s, int64_t n);
  // keys[i] = key of x[i]
  void (*make_keys)(const T* x, Key* keys, int64_t n);
  // Best key of each block of a vector's width. block_max has room for n + kRowUnit keys.
  void (*find_block_max)(const Key* keys, Key* block_max, int64_t n);
  // Takes the k best keys out, best first, equal ones by position, and writes their positions. Can
  // be called again for the next ones. There must be k keys above kNoKey.
  void (*take_best)(Key* keys, Key* block_max, int64_t n, int64_t k, int32_t* positions);
};

template <class T>
const RouterRow<T>& router_row();  // for active_isa()

}  // namespace cpu

}  // namespace moe_ops
