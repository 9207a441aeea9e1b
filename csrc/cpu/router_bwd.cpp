#include "moe_ops/router_bwd.h"

#include <algorithm>
#include <limits>

#include "cpu/gemm/blocking.h"
#include "cpu/kernels/router_rows.h"
#include "cpu/kernels/rows.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/workspace.h"

namespace moe_ops::cpu {

namespace {

// Computes the gradient of logits. With s the scores that the weights are made of (over all
// experts, or over the chosen when topk_first), g the gradient of the weights and c the scaling
// factor:
//   plain:        w_k = c s_k                       ds_k = c g_k
//   renormalized: w_k = c s_k / R, R = sum s + eps  ds_k = c (g_k - A) / R, A = sum g_j s_j / R
// and then the gradient of the score function:
//   softmax: dx_i = s_i (ds_i - D), D = sum s_j ds_j;   of one logit: dx_i = s'(x_i) ds_i
// Renormalized, D = c A (1 - sum s / R) = c A eps / R: zero in exact arithmetic without eps, so it
// is taken from R - sum s, which is zero unless eps is felt.
template <class T>
void route_few_bwd(const RouterBwdParams& p, const Parallel& par) {
  using Key = RouterKey<T>;
  const RouterKernels<T>& row = router_kernels<T>();
  const RowKernels<T>& kernel = row_kernels<T>();
  const int64_t E = p.num_experts, K = p.top_k, size = dtype_size(p.type);
  const int64_t bytes = kSoaTokens * (3 * E + 2 * K) * static_cast<int64_t>(sizeof(T)) + 6 * 64;
  const double cost = 2.0 * static_cast<double>(E * K) + 10.0 * static_cast<double>(E);
  parallel_range(par, p.num_tokens, cost, [&](int64_t begin, int64_t end) {
    ScratchScope scratch;
    Arena arena(scratch, Scratch::kRows, bytes);
    T* const rows = arena.take<T>(kSoaTokens * E);
    T* const x = arena.take<T>(kSoaTokens * E);
    T* const grad_x = arena.take<T>(kSoaTokens * E);
    T* const grads = arena.take<T>(kSoaTokens * K);
    Key* const ids = arena.take<Key>(kSoaTokens * K);
    RouteSoa<T> soa = soa_of<T>(p);
    soa.x = x;
    soa.ids = ids;
    soa.weights = grads;
    soa.grad_x = grad_x;
    for (int64_t t = begin; t < end; t += kSoaTokens) {
      const int64_t m = std::min(kSoaTokens, end - t);
      soa.tokens = m;
      logits_to_soa(kernel, p, t, m, rows, x);
      to_soa(static_cast<const T*>(p.grad_weights) + t * K, K, m, K, grads, T(0));
      to_soa(p.topk_ids + t * K, K, m, K, ids, Key(-1));
      row.route_soa_bwd(soa);
      char* const to = static_cast<char*>(p.grad_logits) + t * E * size;
      const bool direct = p.type == kAccumulate<T>;
      from_soa(grad_x, m, E, direct ? reinterpret_cast<T*>(to) : rows);
      if (!direct) kernel.store_row(p.type, rows, to, m * E);
    }
  });
}

template <class T>
void route_bwd(const RouterBwdParams& p, const Parallel& par) {
  if (p.num_experts <= kSoaExperts && p.num_experts * p.top_k <= kFewRouterPairs) {
    return route_few_bwd<T>(p, par);
  }
  const RouterKernels<T>& row = router_kernels<T>();
  const RowKernels<T>& kernel = row_kernels<T>();
  const int64_t E = p.num_experts, K = p.top_k;
  const int64_t padded = round_up(E, kRowUnit), padded_k = round_up<int64_t>(K, 8);
  const bool softmax = is_softmax(p.score_func);
  const bool over_all = softmax && !p.topk_first;
  const T scale = static_cast<T>(p.routed_scaling_factor);
  const T inf = std::numeric_limits<T>::infinity();
  const int64_t size = dtype_size(p.type);

  // Tokens go together through the steps that call something, as many as fit an L1.
  const int64_t batch = std::clamp<int64_t>(2048 / std::max(E, K), 1, 64);

  const int64_t bytes =
      ((batch + 2) * padded + (batch + 1) * 4 * padded_k) * static_cast<int64_t>(sizeof(T)) +
      batch * padded_k * static_cast<int64_t>(sizeof(int32_t)) + 9 * 64;
  const double cost = 3.0 * static_cast<double>(E) + 15.0 * static_cast<double>(K) + 20.0;
  parallel_range(par, p.num_tokens, cost, [&](int64_t begin, int64_t end) {
    ScratchScope scratch;
    Arena arena(scratch, Scratch::kRows, bytes);
    T* const x = arena.take<T>((batch + 1) * padded);
    T* const exps = arena.take<T>(padded);
    T* const chosen = arena.take<T>((batch + 1) * padded_k);
    T* const scores = arena.take<T>((batch + 1) * padded_k);
    T* const slopes = arena.take<T>((batch + 1) * padded_k);
    T* const grads = arena.take<T>((batch + 1) * padded_k);
    int32_t* const all_ids = arena.take<int32_t>(batch * padded_k);
    int64_t count[64];

    for (int64_t t0 = begin; t0 < end; t0 += batch) {
      const int64_t m = std::min(batch, end - t0);
      kernel.load_rows(
          {p.type, static_cast<const char*>(p.router_logits) + t0 * p.logits_stride * size,
           p.logits_stride, m, E},
          x, padded, T(1));
      for (int64_t t = 0; t < m; ++t) {
        // The slots that hold an expert move together.
        const T* const grad_weights = static_cast<const T*>(p.grad_weights) + (t0 + t) * K;
        const T* const own = x + t * padded;
        T* const grad = grads + t * padded_k;
        T* const from = chosen + t * padded_k;
        int32_t* const ids = all_ids + t * padded_k;
        int64_t n = 0;
        T most = -inf;
        for (int64_t k = 0; k < K; ++k) {
          ids[n] = p.topk_ids[(t0 + t) * K + k];
          grad[n] = grad_weights[k];
          if (ids[n] < 0) continue;
          from[n] = own[ids[n]];
          most = from[n] > most ? from[n] : most;  // NaN is passed over
          ++n;
        }
        count[t] = n;
        if (softmax) {
          for (int64_t k = 0; k < n; ++k) from[k] -= most;
        }
        std::fill(from + n, from + padded_k, T(0));
      }
      const int64_t slots = round_up(m * padded_k, kRowUnit);
      std::fill(chosen + m * padded_k, chosen + slots, T(0));
      if (!softmax) {
        row.slope_row(p.score_func, chosen, scores, slopes, slots);
      } else if (!over_all) {
        row.exp(chosen, scores, slots);
      }
      for (int64_t t = 0; t < m; ++t) {
        T* const own = x + t * padded;
        T* const score = scores + t * padded_k;
        const T* const slope = slopes + t * padded_k;
        T* const grad = grads + t * padded_k;
        const int32_t* const ids = all_ids + t * padded_k;
        const int64_t n = count[t];
        T sum = T(1);
        if (n > 0 && over_all) {
          std::fill(own + E, own + padded, -inf);
          sum = exp_sum_of(row, own, exps, padded);
          for (int64_t k = 0; k < n; ++k) score[k] = exps[ids[k]] / sum;
        } else if (softmax) {
          sum = T(0);
          for (int64_t k = 0; k < n; ++k) sum += score[k];
          for (int64_t k = 0; k < n; ++k) score[k] /= sum;
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

        // An id may stand in several slots, hence the sums. The logits are not needed any more.
        T* const grad_x = own;
        std::fill_n(grad_x, E, T(0));
        if (n > 0 && over_all && mean != T(0)) {
          const T inverse = T(1) / sum;
          for (int64_t k = 0; k < n; ++k) grad_x[ids[k]] += grad[k];
          for (int64_t e = 0; e < E; ++e) grad_x[e] = exps[e] * inverse * (grad_x[e] - mean);
        } else if (softmax) {
          for (int64_t k = 0; k < n; ++k) grad_x[ids[k]] += score[k] * (grad[k] - mean);
        } else {
          for (int64_t k = 0; k < n; ++k) grad_x[ids[k]] += slope[k] * grad[k];
        }
      }
      kernel.store_rows(x, padded,
                        {p.type, static_cast<char*>(p.grad_logits) + t0 * E * size, E, m, E});
    }
  });
}

}  // namespace

void router_bwd(const RouterBwdParams& p, const Parallel& par) {
  p.type == DType::kFloat64 ? route_bwd<double>(p, par) : route_bwd<float>(p, par);
}

}  // namespace moe_ops::cpu
