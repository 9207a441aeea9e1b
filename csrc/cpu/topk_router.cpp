// One pass a token, all in a few kilobytes of scratch that stay in L1:
//   1. logits to fp32; scores where selection or weights need them
//   2. selection keys as integers, groups that lose the competition struck out
//   3. K times: best block by its maximum, best lane in it, strike it out
//   4. weights of the chosen
// Step 3 has no branch that depends on the data except where the best block is found, so it costs
// the same on random logits as on sorted ones; an insertion list mispredicts about K ln(E/K) times.
#include "moe_ops/topk_router.h"

#include <algorithm>
#include <limits>

#include "cpu/kernels/router_rows.h"
#include "cpu/kernels/rows.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/workspace.h"

namespace moe_ops::cpu {

namespace {

// Strikes the experts of all but the best num_topk_groups groups out of `keys`.
template <class T>
class GroupLimit {
 public:
  using Key = RouterKey<T>;

  static int64_t scratch_bytes(const TopkRouterParams& p) {
    const int64_t padded = round_up(p.num_groups, kRowUnit);
    return padded * (sizeof(T) + 3 * sizeof(Key)) + 5 * 64;
  }

  GroupLimit(const TopkRouterParams& p, Arena& arena)
      : p_(p), padded_(round_up(p.num_groups, kRowUnit)) {
    score_ = arena.take<T>(padded_);
    keys_ = arena.take<Key>(padded_);
    block_max_ = arena.take<Key>(padded_ + kRowUnit);
    kept_ = arena.take<int32_t>(padded_);
  }

  void apply(const RouterKernels<T>& row, Key* keys) {
    const int64_t size = p_.num_experts / p_.num_groups;
    for (int64_t g = 0; g < p_.num_groups; ++g) {
      Key first = kNoKey<T>, second = kNoKey<T>;
      for (int64_t i = 0; i < size; ++i) {
        const Key k = keys[g * size + i];
        second = std::max(second, std::min(first, k));
        first = std::max(first, k);
      }
      score_[g] =
          p_.group_score == GroupScore::kMax ? value_of(first) : value_of(first) + value_of(second);
    }
    for (int64_t g = p_.num_groups; g < padded_; ++g) score_[g] = T(0);
    row.make_keys(score_, keys_, padded_);
    std::fill(keys_ + p_.num_groups, keys_ + padded_, kNoKey<T>);
    row.find_block_max(keys_, block_max_, padded_);
    // take_best marks what it takes: afterwards the keys that are left are the losers.
    row.take_best({keys_, block_max_, 1, 0, padded_, p_.num_topk_groups, kept_});
    for (int64_t g = 0; g < p_.num_groups; ++g) {
      if (keys_[g] != kNoKey<T>) std::fill_n(keys + g * size, size, kNoKey<T>);
    }
  }

 private:
  // Returns the inverse of make_keys; the key of NaN happens to give a NaN.
  static T value_of(Key k) {
    return __builtin_bit_cast(T, k < 0 ? k ^ std::numeric_limits<Key>::max() : k);
  }

  const TopkRouterParams& p_;
  int64_t padded_;
  T* score_;        // [G]
  Key* keys_;       // [G]
  Key* block_max_;  // [G]
  int32_t* kept_;   // [num_topk_groups]
};

// Renormalizes and scales the weights.
template <class T>
void finish_weights(const TopkRouterParams& p, T scale, T* weights) {
  if (p.renormalize) {
    T total = T(0);
    for (int64_t k = 0; k < p.top_k; ++k) total += weights[k];
    total += T(1e-20);
    for (int64_t k = 0; k < p.top_k; ++k) weights[k] /= total;
  }
  for (int64_t k = 0; k < p.top_k; ++k) weights[k] *= scale;
}

// Routes few experts with a token in each lane, without a bias and groups: rows of so few experts
// would waste most of a vector.
template <class T>
void route_few(const TopkRouterParams& p, const Parallel& par) {
  using Key = RouterKey<T>;
  const RouterKernels<T>& row = router_kernels<T>();
  const RowKernels<T>& kernel = row_kernels<T>();
  const int64_t E = p.num_experts, K = p.top_k;
  const int64_t bytes = kSoaTokens * (2 * E + 2 * K) * static_cast<int64_t>(sizeof(T)) + 5 * 64;
  const double cost = static_cast<double>(E * K) + 10.0 * static_cast<double>(E);
  parallel_range(par, p.num_tokens, cost, [&](int64_t begin, int64_t end) {
    ScratchScope scratch;
    Arena arena(scratch, Scratch::kRows, bytes);
    T* const rows = arena.take<T>(kSoaTokens * E);
    T* const x = arena.take<T>(kSoaTokens * E);
    T* const weights = arena.take<T>(kSoaTokens * K);
    Key* const ids = arena.take<Key>(kSoaTokens * K);
    RouteSoa<T> soa = soa_of<T>(p);
    soa.x = x;
    soa.ids = ids;
    soa.weights = weights;
    for (int64_t t = begin; t < end; t += kSoaTokens) {
      soa.tokens = std::min(kSoaTokens, end - t);
      logits_to_soa(kernel, p, t, soa.tokens, rows, x);
      row.route_soa(soa);
      from_soa(weights, soa.tokens, K, static_cast<T*>(p.topk_weights) + t * K);
      from_soa(ids, soa.tokens, K, p.topk_ids + t * K);
    }
  });
}

template <class T>
void route(const TopkRouterParams& p, const Parallel& par) {
  if (p.num_experts <= kSoaExperts && p.expert_bias == nullptr && p.num_groups == 1) {
    return route_few<T>(p, par);
  }
  using Key = RouterKey<T>;
  const RouterKernels<T>& row = router_kernels<T>();
  const RowKernels<T>& kernel = row_kernels<T>();
  const int64_t E = p.num_experts, K = p.top_k;
  const int64_t padded = round_up(E, kRowUnit), padded_k = round_up(K, kRowUnit);
  const bool softmax = is_softmax(p.score_func);
  const bool grouped = p.num_groups > 1;
  const T* bias = static_cast<const T*>(p.expert_bias);
  // All score functions are monotone, so without a bias or a sum of scores the logits themselves
  // rank the experts, and do so without the ties that rounding makes of nearby scores.
  const bool score_keys =
      !p.topk_first && (bias != nullptr || (grouped && p.group_score == GroupScore::kTop2Sum));
  // Softmax over all experts needs every exponential; the other weights only those of the chosen.
  const bool all_scores = score_keys || (softmax && !p.topk_first);
  const T scale = static_cast<T>(p.routed_scaling_factor);
  const T inf = std::numeric_limits<T>::infinity();

  const int64_t ld = padded + kRowUnit;
  // An L2 holds this many tokens with their scores and keys.
  const int64_t at_once = std::clamp<int64_t>((int64_t{64} << 10) / ld / 4, 1, kRouterRows);
  const int64_t bytes = (at_once * 2 * ld + padded + 2 * padded_k) * sizeof(T) +
                        at_once * 2 * ld * sizeof(Key) + 7 * 64 + GroupLimit<T>::scratch_bytes(p);
  const double cost = 4.0 * static_cast<double>(E) + 40.0 * static_cast<double>(K) + 50.0;
  parallel_range(par, p.num_tokens, cost, [&](int64_t begin, int64_t end) {
    ScratchScope scratch;
    Arena arena(scratch, Scratch::kRows, bytes);
    T* const xs = arena.take<T>(at_once * ld);
    T* const scores = arena.take<T>(at_once * ld);
    T* const biased = arena.take<T>(padded);
    Key* const all_keys = arena.take<Key>(at_once * ld);
    Key* const block_max = arena.take<Key>(at_once * ld);
    T* const chosen = arena.take<T>(padded_k);
    T* const chosen_score = arena.take<T>(padded_k);
    GroupLimit<T> group_limit(p, arena);
    for (int64_t r = 0; r < at_once; ++r) {
      std::fill(xs + r * ld + E, xs + r * ld + padded, -inf);
    }
    std::fill(biased + E, biased + padded, -inf);
    std::fill(chosen + K, chosen + padded_k, -inf);
    T sums[kRouterRows];

    for (int64_t t0 = begin; t0 < end; t0 += at_once) {
      const int64_t rows = std::min(at_once, end - t0);
      kernel.load_rows(
          {p.type,
           static_cast<const char*>(p.router_logits) + t0 * p.logits_stride * dtype_size(p.type),
           p.logits_stride, rows, E},
          xs, ld, T(1));
      std::fill_n(sums, rows, T(1));
      if (all_scores && softmax) row.exp_sum(xs, scores, rows, ld, padded, sums);
      for (int64_t r = 0; r < rows; ++r) {
        T *const x = xs + r * ld, *const score = scores + r * ld;
        Key* const keys = all_keys + r * ld;
        if (all_scores && !softmax) row.score_row(p.score_func, x, score, padded);

        const T* ranked = x;
        if (score_keys || bias != nullptr) {
          for (int64_t e = 0; e < E; ++e) {
            biased[e] =
                (score_keys ? score[e] / sums[r] : x[e]) + (bias != nullptr ? bias[e] : T(0));
          }
          ranked = biased;
        }
        row.make_keys(ranked, keys, padded);
        std::fill(keys + E, keys + padded, kNoKey<T>);
        if (grouped) group_limit.apply(row, keys);
        row.find_block_max(keys, block_max + r * ld, padded);
      }
      row.take_best({all_keys, block_max, rows, ld, padded, K, p.topk_ids + t0 * K});

      for (int64_t r = 0; r < rows; ++r) {
        const T *const x = xs + r * ld, *const score = scores + r * ld;
        T* const weights = static_cast<T*>(p.topk_weights) + (t0 + r) * K;
        const int32_t* const ids = p.topk_ids + (t0 + r) * K;
        if (all_scores) {
          for (int64_t k = 0; k < K; ++k) weights[k] = score[ids[k]] / sums[r];
        } else {
          for (int64_t k = 0; k < K; ++k) chosen[k] = x[ids[k]];
          scores_of(row, p.score_func, chosen, chosen_score, padded_k, K, weights);
        }
        finish_weights(p, scale, weights);
      }
    }
  });
}

}  // namespace

void topk_router(const TopkRouterParams& p, const Parallel& par) {
  p.type == DType::kFloat64 ? route<double>(p, par) : route<float>(p, par);
}

}  // namespace moe_ops::cpu
