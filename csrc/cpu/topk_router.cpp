// One pass a token, all in a few kilobytes of scratch that stay in L1:
//   1. logits to fp32; scores (softmax or sigmoid) where selection or weights need them
//   2. selection keys as integers, groups that lose the competition struck out
//   3. K times: best block by its maximum, best lane in it, strike it out
//   4. weights of the chosen
// Step 3 has no branch that depends on the data except where the best block is found, so it costs
// the same on random logits as on sorted ones; an insertion list mispredicts about K ln(E/K) times.
#include "moe_ops/topk_router.h"

#include <algorithm>
#include <limits>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/router_row.h"
#include "cpu/workspace.h"

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

  GroupLimit(const TopkRouterParams& p, Carver& carver)
      : p_(p), padded_(round_up(p.num_groups, kRowUnit)) {
    score_ = carver.take<T>(padded_);
    keys_ = carver.take<Key>(padded_);
    block_max_ = carver.take<Key>(padded_ + kRowUnit);
    kept_ = carver.take<int32_t>(padded_);
  }

  void apply(const RouterRow<T>& row, Key* keys) {
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
    row.take_best(keys_, block_max_, padded_, p_.num_topk_groups, kept_);
    for (int64_t g = 0; g < p_.num_groups; ++g) {
      if (keys_[g] != kNoKey<T>) std::fill_n(keys + g * size, size, kNoKey<T>);
    }
  }

 private:
  // The inverse of make_keys; the key of NaN happens to give a NaN.
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

// Renormalised and scaled.
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

// Up to so many experts a token is less than the vectors and the calls of the way by rows are made
// for (4 experts: 80 us for 512 tokens). Without a bias and groups, 64 tokens then go through each
// step together, and the choice is a loop over E for each of the K.
constexpr int64_t kFewExperts = 16;
constexpr int64_t kTokens = 64;

template <class T>
void route_few(const TopkRouterParams& p, const Parallel& par) {
  using Key = RouterKey<T>;
  const RouterRow<T>& row = router_row<T>();
  const Kernels<T>& kernel = kernels<T>();
  const int64_t E = p.num_experts, K = p.top_k;
  const bool softmax = p.score_func == ScoreFunc::kSoftmax;
  const int64_t n = softmax && !p.topk_first ? E : K;  // scores of a token
  const T scale = static_cast<T>(p.routed_scaling_factor);
  const int64_t bytes = kTokens * 3 * E * static_cast<int64_t>(sizeof(T)) + 5 * 64;
  const double cost = 2.0 * static_cast<double>(E * K) + 10.0 * static_cast<double>(n);
  parallel_range(par, p.num_tokens, cost, [&](int64_t begin, int64_t end) {
    Carver carver(Scratch::kRows, bytes);
    T* const x = carver.take<T>(kTokens * E);
    T* const score = carver.take<T>(kTokens * E);
    Key* const keys = carver.take<Key>(kTokens * E);
    for (int64_t t0 = begin; t0 < end; t0 += kTokens) {
      const int64_t m = std::min(kTokens, end - t0);
      T* const weights = static_cast<T*>(p.topk_weights) + t0 * K;
      int32_t* const ids = p.topk_ids + t0 * K;
      kernel.load_rows(
          p.type,
          static_cast<const char*>(p.router_logits) + t0 * p.logits_stride * dtype_size(p.type),
          p.logits_stride, m, E, x, E, T(1));
      std::fill(x + m * E, x + round_up(m * E, kRowUnit), T(0));
      row.make_keys(x, keys, round_up(m * E, kRowUnit));
      for (int64_t t = 0; t < m; ++t) {
        Key* const key = keys + t * E;
        for (int64_t k = 0; k < K; ++k) {
          int64_t best = 0;
          Key most = key[0];
          for (int64_t e = 1; e < E; ++e) {
            const bool more = key[e] > most;
            best = more ? e : best;
            most = more ? key[e] : most;
          }
          ids[t * K + k] = static_cast<int32_t>(best);
          key[best] = kNoKey<T>;
        }
      }
      // The keys are done with: their memory holds what scores are made of.
      T* const from = reinterpret_cast<T*>(keys);
      for (int64_t t = 0; t < m; ++t) {
        const T* const own = x + t * E;
        const int32_t* const id = ids + t * K;
        // The first one chosen is the largest, NaN if all are.
        const T most = softmax ? own[id[0]] : T(0);
        for (int64_t i = 0; i < n; ++i) from[t * n + i] = own[n == K ? id[i] : i] - most;
      }
      std::fill(from + m * n, from + round_up(m * n, kRowUnit), T(0));
      (softmax ? row.exp : row.sigmoid)(from, score, round_up(m * n, kRowUnit));
      for (int64_t t = 0; t < m; ++t) {
        const T* const own = score + t * n;
        T sum = softmax ? T(0) : T(1);
        for (int64_t i = 0; softmax && i < n; ++i) sum += own[i];
        for (int64_t k = 0; k < K; ++k) {
          weights[t * K + k] = own[n == K ? k : ids[t * K + k]] / sum;
        }
        finish_weights(p, scale, weights + t * K);
      }
    }
  });
}

template <class T>
void route(const TopkRouterParams& p, const Parallel& par) {
  if (p.num_experts <= kFewExperts && p.expert_bias == nullptr && p.num_groups == 1) {
    return route_few<T>(p, par);
  }
  using Key = RouterKey<T>;
  const RouterRow<T>& row = router_row<T>();
  const Kernels<T>& kernel = kernels<T>();
  const int64_t E = p.num_experts, K = p.top_k;
  const int64_t padded = round_up(E, kRowUnit), padded_k = round_up(K, kRowUnit);
  const bool softmax = p.score_func == ScoreFunc::kSoftmax;
  const bool grouped = p.num_groups > 1;
  const T* bias = static_cast<const T*>(p.expert_bias);
  // Both score functions are monotone, so without a bias or a sum of scores the logits themselves
  // rank the experts, and do so without the ties that rounding makes of nearby scores.
  const bool score_keys =
      !p.topk_first && (bias != nullptr || (grouped && p.group_score == GroupScore::kTop2Sum));
  // Softmax over all experts needs every exponential; the other weights only those of the chosen.
  const bool all_scores = score_keys || (softmax && !p.topk_first);
  const T scale = static_cast<T>(p.routed_scaling_factor);
  const T inf = std::numeric_limits<T>::infinity();

  const int64_t bytes = (3 * padded + 2 * padded_k) * static_cast<int64_t>(sizeof(T)) +
                        (2 * padded + kRowUnit) * static_cast<int64_t>(sizeof(Key)) + 7 * 64 +
                        GroupLimit<T>::scratch_bytes(p);
  const double cost = 4.0 * static_cast<double>(E) + 40.0 * static_cast<double>(K) + 50.0;
  parallel_range(par, p.num_tokens, cost, [&](int64_t begin, int64_t end) {
    Carver carver(Scratch::kRows, bytes);
    T* const x = carver.take<T>(padded);
    T* const score = carver.take<T>(padded);
    T* const biased = carver.take<T>(padded);
    Key* const keys = carver.take<Key>(padded);
    Key* const block_max = carver.take<Key>(padded + kRowUnit);
    T* const chosen = carver.take<T>(padded_k);
    T* const chosen_score = carver.take<T>(padded_k);
    GroupLimit<T> group_limit(p, carver);
    std::fill(x + E, x + padded, -inf);
    std::fill(biased + E, biased + padded, -inf);
    std::fill(chosen + K, chosen + padded_k, -inf);

    for (int64_t t = begin; t < end; ++t) {
      T* const weights = static_cast<T*>(p.topk_weights) + t * K;
      int32_t* const ids = p.topk_ids + t * K;
      kernel.load_row(
          p.type,
          static_cast<const char*>(p.router_logits) + t * p.logits_stride * dtype_size(p.type), x,
          E, T(1));
      T sum = T(1);
      if (all_scores && softmax) sum = row.exp_sum(x, score, padded);
      if (all_scores && !softmax) row.sigmoid(x, score, padded);

      const T* ranked = x;
      if (score_keys || bias != nullptr) {
        for (int64_t e = 0; e < E; ++e) {
          biased[e] = (score_keys ? score[e] / sum : x[e]) + (bias != nullptr ? bias[e] : T(0));
        }
        ranked = biased;
      }
      row.make_keys(ranked, keys, padded);
      std::fill(keys + E, keys + padded, kNoKey<T>);
      if (grouped) group_limit.apply(row, keys);
      row.find_block_max(keys, block_max, padded);
      row.take_best(keys, block_max, padded, K, ids);

      if (all_scores) {
        for (int64_t k = 0; k < K; ++k) weights[k] = score[ids[k]] / sum;
      } else {
        for (int64_t k = 0; k < K; ++k) chosen[k] = x[ids[k]];
        if (softmax) {
          sum = row.exp_sum(chosen, chosen_score, padded_k);
          for (int64_t k = 0; k < K; ++k) weights[k] = chosen_score[k] / sum;
        } else {
          row.sigmoid(chosen, chosen_score, padded_k);
          std::copy_n(chosen_score, K, weights);
        }
      }
      finish_weights(p, scale, weights);
    }
  });
}

}  // namespace

void topk_router(const TopkRouterParams& p, const Parallel& par) {
  p.type == DType::kFloat64 ? route<double>(p, par) : route<float>(p, par);
}

}  // namespace moe_ops::cpu
