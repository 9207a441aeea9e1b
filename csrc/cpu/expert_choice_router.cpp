// Three stages, each parallel over what it writes:
//   1. tokens: scores into topk_weights [T,E], which is read as a plain matrix until stage 3
//   2. experts: the capacity-th best key of a column, and which token is the last to win a tie
//   3. tokens: a comparison with those two says who chose the token; the row is compacted in place
#include "moe_ops/expert_choice_router.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <vector>

#include "cpu/gemm/blocking.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/router_row.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/workspace.h"

namespace moe_ops::cpu {

namespace {

// An expert takes the tokens with a key above `key`, and those with an equal key up to `token`.
template <class T>
struct Threshold {
  RouterKey<T> key;
  int64_t token;
};

template <class T>
void write_scores(const ExpertChoiceRouterParams& p, const Parallel& par) {
  const RouterRow<T>& row = router_row<T>();
  const Kernels<T>& kernel = kernels<T>();
  const int64_t E = p.num_experts, padded = round_up<int64_t>(E, 16);
  parallel_range(
      par, p.num_tokens, 4.0 * static_cast<double>(E) + 50.0, [&](int64_t begin, int64_t end) {
        ScratchScope scratch;
        T* const x = scratch.take<T>(Scratch::kRows, 2 * padded);
        T* const score = x + padded;
        std::fill(x + E, x + padded, -std::numeric_limits<T>::infinity());
        for (int64_t t = begin; t < end; ++t) {
          T* const out = static_cast<T*>(p.topk_weights) + t * E;
          kernel.load_row(
              p.type,
              static_cast<const char*>(p.router_logits) + t * p.logits_stride * dtype_size(p.type),
              x, E, T(1));
          row.scores(p.score_func, x, score, padded, E, out);
        }
      });
}

template <class T>
void find_thresholds(const ExpertChoiceRouterParams& p, const Parallel& par,
                     Threshold<T>* thresholds) {
  using Key = RouterKey<T>;
  const RouterRow<T>& row = router_row<T>();
  const int64_t tokens = p.num_tokens, E = p.num_experts, C = p.capacity;
  const int64_t padded = round_up<int64_t>(tokens, 16);
  const T* const scores = static_cast<const T*>(p.topk_weights);
  const double cost = 10.0 * static_cast<double>(tokens) * static_cast<double>(E);
  parallel_items(par, ceil_div(E, kChoiceColumns), cost, [&](int64_t item) {
    const int64_t first = item * kChoiceColumns, columns = std::min(kChoiceColumns, E - first);
    ScratchScope scratch;
    T* const column = scratch.take<T>(Scratch::kRows, kChoiceColumns * padded);
    Key* const keys = scratch.take<Key>(Scratch::kIndex, 2 * padded);
    Key* const partial = keys + padded;
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t c = 0; c < columns; ++c) column[c * padded + t] = scores[t * E + first + c];
    }
    for (int64_t c = 0; c < columns; ++c) {
      std::fill(column + c * padded + tokens, column + (c + 1) * padded, T(0));
      row.make_keys(column + c * padded, keys, padded);
      std::copy_n(keys, tokens, partial);
      std::nth_element(partial, partial + C - 1, partial + tokens, std::greater<Key>());
      const Key key = partial[C - 1];
      int64_t ties = C - std::count_if(keys, keys + tokens, [key](Key k) { return k > key; });
      int64_t t = 0;
      for (; ties > 0; ++t) ties -= keys[t] == key;
      thresholds[first + c] = {key, t - 1};
    }
  });
}

template <class T>
void write_slots(const ExpertChoiceRouterParams& p, const Parallel& par,
                 const Threshold<T>* thresholds) {
  using Key = RouterKey<T>;
  const RouterRow<T>& row = router_row<T>();
  const int64_t E = p.num_experts, padded = round_up<int64_t>(E, 16);
  const T scale = static_cast<T>(p.routed_scaling_factor);
  parallel_range(par, p.num_tokens, 3.0 * static_cast<double>(E) + 50.0,
                 [&](int64_t begin, int64_t end) {
                   ScratchScope scratch;
                   T* const score = scratch.take<T>(Scratch::kRows, padded);
                   Key* const keys = scratch.take<Key>(Scratch::kIndex, padded);
                   std::fill(score + E, score + padded, T(0));
                   for (int64_t t = begin; t < end; ++t) {
                     T* const weights = static_cast<T*>(p.topk_weights) + t * E;
                     int32_t* const ids = p.topk_ids + t * E;
                     std::copy_n(weights, E, score);
                     row.make_keys(score, keys, padded);
                     int64_t n = 0;
                     for (int64_t e = 0; e < E; ++e) {
                       const Threshold<T>& h = thresholds[e];
                       ids[n] = static_cast<int32_t>(e);
                       weights[n] = score[e] * scale;
                       n += (keys[e] > h.key) | ((keys[e] == h.key) & (t <= h.token));
                     }
                     std::fill(weights + n, weights + E, T(0));
                     std::fill(ids + n, ids + E, -1);
                   }
                 });
}

template <class T>
void route(const ExpertChoiceRouterParams& p, const Parallel& par) {
  if (p.num_tokens == 0) return;
  // kNoKey is below every key: without a limit each expert takes all tokens.
  std::vector<Threshold<T>> thresholds(static_cast<size_t>(p.num_experts), {kNoKey<T>, -1});
  write_scores<T>(p, par);
  if (p.capacity < p.num_tokens) find_thresholds<T>(p, par, thresholds.data());
  write_slots<T>(p, par, thresholds.data());
}

}  // namespace

void expert_choice_router(const ExpertChoiceRouterParams& p, const Parallel& par) {
  p.type == DType::kFloat64 ? route<double>(p, par) : route<float>(p, par);
}

}  // namespace moe_ops::cpu
