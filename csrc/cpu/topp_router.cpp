// The experts of a token are taken out one at a time, best first, so a token pays for the experts
// that it uses and not for a sort of all.
#include "moe_ops/topp_router.h"

#include <algorithm>
#include <limits>

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/router_row.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/workspace.h"

namespace moe_ops::cpu {

namespace {

template <class T>
void route(const ToppRouterParams& p, const Parallel& par) {
  using Key = RouterKey<T>;
  const RouterRow<T>& row = router_row<T>();
  const Kernels<T>& kernel = kernels<T>();
  const int64_t E = p.num_experts, K = p.max_k;
  const int64_t padded = round_up(E, kRowUnit), pitch = padded + kRowUnit;
  const T top_p = static_cast<T>(p.top_p), scale = static_cast<T>(p.routed_scaling_factor);
  const double cost = 4.0 * static_cast<double>(E) + 40.0 * static_cast<double>(K) + 50.0;
  parallel_range(par, p.num_tokens, cost, [&](int64_t begin, int64_t end) {
    ScratchScope scratch;
    T* const x = scratch.take<T>(Scratch::kRows, 2 * pitch);
    T* const exps = x + pitch;
    Key* const keys = scratch.take<Key>(Scratch::kIndex, 2 * pitch);
    Key* const block_max = keys + pitch;
    std::fill(x + E, x + padded, -std::numeric_limits<T>::infinity());

    for (int64_t t = begin; t < end; ++t) {
      T* const weights = static_cast<T*>(p.topk_weights) + t * K;
      int32_t* const ids = p.topk_ids + t * K;
      kernel.load_row(
          p.type,
          static_cast<const char*>(p.router_logits) + t * p.logits_stride * dtype_size(p.type), x,
          E, T(1));
      const T sum = row.exp_sum_of(x, exps, padded);
      row.make_keys(x, keys, padded);
      std::fill(keys + E, keys + padded, kNoKey<T>);
      row.find_block_max(keys, block_max, padded);

      int64_t n = 0;
      // Summed in fp64, so that rounding does not ask for one more of many small probabilities.
      double gathered = 0;
      while (n < K && (n < p.min_k || !(static_cast<T>(gathered) >= top_p))) {
        row.take_best(keys, block_max, 1, pitch, padded, 1, ids + n);
        weights[n] = exps[ids[n]] / sum;
        gathered += static_cast<double>(weights[n]);
        ++n;
      }
      if (p.renormalize) {
        T total = T(0);
        for (int64_t k = 0; k < n; ++k) total += weights[k];
        total += T(1e-20);
        for (int64_t k = 0; k < n; ++k) weights[k] /= total;
      }
      for (int64_t k = 0; k < n; ++k) weights[k] *= scale;
      std::fill(weights + n, weights + K, T(0));
      std::fill(ids + n, ids + K, -1);
    }
  });
}

}  // namespace

void topp_router(const ToppRouterParams& p, const Parallel& par) {
  p.type == DType::kFloat64 ? route<double>(p, par) : route<float>(p, par);
}

}  // namespace moe_ops::cpu
