#include "moe_ops/router_bwd.h"

#include <algorithm>
#include <limits>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/router_row.h"
#include "cpu/workspace.h"

namespace moe_ops::cpu {

namespace {

// With s the scores that the weights are made of (over all experts, or over the chosen when
// topk_first), g the gradient of the weights and c the scaling factor:
//   plain:        w_k = c s_k                       ds_k = c g_k
//   renormalised: w_k = c s_k / R, R = sum s + eps  ds_k = c (g_k - A) / R, A = sum g_j s_j / R
// and then the gradient of the score function:
//   softmax: dx_i = s_i (ds_i - D), D = sum s_j ds_j;   sigmoid: dx_i = s_i (1 - s_i) ds_i
// Renormalised, D = c A (1 - sum s / R) = c A eps / R: zero in exact arithmetic without eps, so it
// is taken from R - sum s, which is zero unless eps is felt.
template <class T>
void route_bwd(const RouterBwdParams& p, const Parallel& par) {
  const RouterRow<T>& row = router_row<T>();
  const Kernels<T>& kernel = kernels<T>();
  const int64_t E = p.num_experts, K = p.top_k;
  const int64_t padded = round_up(E, kRowUnit), padded_k = round_up(K, kRowUnit);
  const bool softmax = p.score_func == ScoreFunc::kSoftmax;
  const bool over_all = softmax && !p.topk_first;
  const T scale = static_cast<T>(p.routed_scaling_factor);
  const T inf = std::numeric_limits<T>::infinity();
  const int64_t size = dtype_size(p.type);

  const int64_t bytes = (3 * padded + 4 * padded_k) * static_cast<int64_t>(sizeof(T)) +
                        padded_k * static_cast<int64_t>(sizeof(int32_t)) + 8 * 64;
  const double cost = 5.0 * static_cast<double>(E) + 15.0 * static_cast<double>(K) + 50.0;
  parallel_range(par, p.num_tokens, cost, [&](int64_t begin, int64_t end) {
    Carver carver(Scratch::kRows, bytes);
    T* const x = carver.take<T>(padded);
    T* const exps = carver.take<T>(padded);
    T* const grad_x = carver.take<T>(padded);
    T* const chosen = carver.take<T>(padded_k);
    T* const score = carver.take<T>(padded_k);
    T* const slope = carver.take<T>(padded_k);
    T* const grad = carver.take<T>(padded_k);
    int32_t* const ids = carver.take<int32_t>(padded_k);
    std::fill(x + E, x + padded, -inf);

    for (int64_t t = begin; t < end; ++t) {
      // The slots that hold an expert move together.
      const T* const grad_weights = static_cast<const T*>(p.grad_weights) + t * K;
      int64_t n = 0;
      for (int64_t k = 0; k < K; ++k) {
        ids[n] = p.topk_ids[t * K + k];
        grad[n] = grad_weights[k];
        n += ids[n] >= 0;
      }
      std::fill_n(grad_x, E, T(0));
      char* const out = static_cast<char*>(p.grad_logits) + t * E * size;
      if (n == 0) {
        kernel.store_row(p.type, grad_x, out, E);
        continue;
      }
      kernel.load_row(p.type,
                      static_cast<const char*>(p.router_logits) + t * p.logits_stride * size, x, E,
                      T(1));
      const int64_t padded_n = round_up(n, kRowUnit);
      T sum = T(1);
      if (over_all) {
        sum = row.exp_sum(x, exps, padded);
        for (int64_t k = 0; k < n; ++k) score[k] = exps[ids[k]] / sum;
      } else {
        for (int64_t k = 0; k < n; ++k) chosen[k] = x[ids[k]];
        std::fill(chosen + n, chosen + padded_n, -inf);
        if (softmax) {
          sum = row.exp_sum(chosen, score, padded_n);
          for (int64_t k = 0; k < n; ++k) score[k] /= sum;
        } else {
          row.sigmoid(chosen, score, padded_n);
          // s(-x) is 1 - s(x) without the cancellation.
          for (int64_t k = 0; k < n; ++k) chosen[k] = -chosen[k];
          row.sigmoid(chosen, slope, padded_n);
          for (int64_t k = 0; k < n; ++k) slope[k] *= score[k];
        }
      }

      T mean = T(0);  // D
      if (p.renormalize) {
        T total = T(0), weighted = T(0);
        for (int64_t k = 0; k < n; ++k) total += score[k];
        const T r = total + T(1e-20);
        for (int64_t k = 0; k < n; ++k) weighted += grad[k] * (score[k] / r);
        for (int64_t k = 0; k < n; ++k) grad[k] = scale * (grad[k] - weighted) / r;
        mean = scale * weighted * ((r - total) / r);
      } else {
        for (int64_t k = 0; k < n; ++k) {
          grad[k] *= scale;
          mean += score[k] * grad[k];
        }
      }

      // An id may stand in several slots, hence the sums.
      if (over_all && mean != T(0)) {
        const T inverse = T(1) / sum;
        for (int64_t k = 0; k < n; ++k) grad_x[ids[k]] += grad[k];
        for (int64_t e = 0; e < E; ++e) grad_x[e] = exps[e] * inverse * (grad_x[e] - mean);
      } else if (softmax) {
        for (int64_t k = 0; k < n; ++k) grad_x[ids[k]] += score[k] * (grad[k] - mean);
      } else {
        for (int64_t k = 0; k < n; ++k) grad_x[ids[k]] += slope[k] * grad[k];
      }
      kernel.store_row(p.type, grad_x, out, E);
    }
  });
}

}  // namespace

void router_bwd(const RouterBwdParams& p, const Parallel& par) {
  p.type == DType::kFloat64 ? route_bwd<double>(p, par) : route_bwd<float>(p, par);
}

}  // namespace moe_ops::cpu
