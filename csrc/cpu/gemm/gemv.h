// Few rows of an expert, weights dense along k as they lie, with vectors along k; four weight rows
// at once. GEMV reads every weight once; more rows take the blocked form.
#pragma once

#include "cpu/gemm/heuristics.h"
#include "cpu/gemm/pack_b.h"

namespace moe_ops::cpu {

// Prefetch distance in bytes where tokens meet weights once, and the bytes of weights that all
// passes of tokens meet before the next ones: half of an L1.
constexpr int64_t kGemvPrefetch = 2048;
constexpr int64_t kKeptWeightBytes = int64_t{16} << 10;

template <class Op, class T, class Epilogue>
void gemv_item(const GemmDesc<T>& d, const GemmKernels<T>& k, const GemmItem& it,
               const Epilogue& fn) {
  const int64_t m = it.row_end - it.row_begin;
  const int64_t n = it.feature_end - it.feature_begin;
  const int64_t K = d.in_features / Op::kSteps;
  const int64_t ldx = round_up<int64_t>(K, k.lanes);
  ScratchScope scratch;
  T* x = scratch.take<T>(Scratch::kTokens, m * ldx);
  for (int64_t t = 0; t < m; ++t) {
    Op::load(d, it.row_begin + t, 0, K, x + t * ldx);
    std::fill(x + t * ldx + K, x + (t + 1) * ldx, T(0));
  }
  const int64_t ldo = n * d.segments;
  T* out = scratch.take<T>(Scratch::kTile, m * ldo);
  // The four rows of a step lie a quarter of the item apart: four long streams. Four rows next to
  // each other would be four short ones, and the prefetcher loses the start of each.
  const int64_t quarter = n / kGemvFeatures;
  const int64_t row_bytes = d.b.stride_o * dtype_size(d.b.type);
  const int64_t passes = ceil_div<int64_t>(m, k.gemv.max_tokens);
  // While a second pass meets rows in L2, memory waits for the first pass of the next ones.
  const int64_t distance =
      passes > 1 && d.b.type == kAccumulate<T> ? k.gemv.prefetch_distance : kGemvPrefetch;
  const BalancedPartition pass_rows(m, passes);
  for (int s = 0; s < d.segments; ++s) {
    const char* w =
        element(d.b.data, d.b.type,
                it.expert * d.b.stride_e + (s * d.features + it.feature_begin) * d.b.stride_o);
    // `count` times `features` features from `first` on, `step` apart.
    const auto run = [&](int features, int64_t count, int64_t first, int64_t step) {
      if (count == 0) return;
      for (int64_t p = 0; p < passes; ++p) {
        const int64_t t = pass_rows.begin(p);
        const auto tokens = static_cast<int>(pass_rows.begin(p + 1) - t);
        const char* rows = w + first * row_bytes;
        T* sums = out + t * ldo + s * n + first;
        const int64_t ldw = d.b.stride_o / Op::kSteps;
        (Op::kBf16 ? k.gemv.run_bf16 : k.gemv.run)({.w_type = d.b.type,
                                                    .features = features,
                                                    .count = count,
                                                    .tokens = tokens,
                                                    .k = K,
                                                    .w = rows,
                                                    .w_step = ldw,
                                                    .ldw = step * ldw,
                                                    .x = x + t * ldx,
                                                    .ldx = ldx,
                                                    .out = sums,
                                                    .ldo = ldo,
                                                    .out_step = step,
                                                    .prefetch_distance = distance});
      }
    };
    // Four rows, or as much as half of an L1 holds, stay in cache for a second pass.
    const int64_t group_bytes = kGemvFeatures * d.in_features * dtype_size(d.b.type);
    const int64_t kept = std::max<int64_t>(1, kKeptWeightBytes / group_bytes);
    const int64_t at_once = passes == 1 ? quarter : kept;
    for (int64_t f = 0; f < quarter; f += at_once) {
      run(kGemvFeatures, std::min(at_once, quarter - f), f, quarter);
    }
    run(1, n % kGemvFeatures, kGemvFeatures * quarter, 1);
  }
  for (int64_t t = 0; t < m; ++t) {
    fn(it.expert, it.row_begin + t, it.feature_begin, n, out + t * ldo, out + t * ldo + n);
  }
}

// Computes an item by blocked GEMV. Groups of four weight rows meet all tokens, max_tokens at a
// time: no token is padded and no weight copied. Blocks of k keep a group's part in L1 while the
// tokens pass; meanwhile the next group, one run in memory, is prefetched. Half types are widened
// once a block, by the call with the first tokens.
template <class Op, class T, class Epilogue>
void gemv_blocked_item(const GemmDesc<T>& d, const GemmKernels<T>& k, const GemmItem& it,
                       const Epilogue& fn) {
  constexpr int64_t F = kGemvFeatures;
  const int64_t W = k.lanes, K = d.in_features / Op::kSteps;
  const int64_t m = it.row_end - it.row_begin, n = it.feature_end - it.feature_begin;
  const int64_t block = balanced(K, k.blocked_gemv.block_k, W), k_blocks = ceil_div(K, block);
  const int64_t ldx = round_up(block, W) + kPanelPad / 2;
  ScratchScope scratch;
  T* x = scratch.take<T>(Scratch::kTokens, k_blocks * m * ldx);
  for (int64_t t = 0; t < m; ++t) {
    for (int64_t b = 0; b < k_blocks; ++b) {
      T* dst = x + (b * m + t) * ldx;
      const int64_t kc = std::min(block, K - b * block);
      Op::load(d, it.row_begin + t, b * block, kc, dst);
      std::fill(dst + kc, dst + round_up(kc, W), T(0));
    }
  }
  const int64_t ldo = n * d.segments + kPanelPad / 2;
  T* out = scratch.take<T>(Scratch::kTile, m * ldo);
  T* sums = scratch.take<T>(Scratch::kPackA, m * F * W);
  const bool widen = widens<Op>(d);
  T* wide = widen ? scratch.take<T>(Scratch::kPackB, F * ldx) : nullptr;
  const int64_t size = element_bytes<Op>(d);
  const int64_t ldw = d.b.stride_o / Op::kSteps;
  const int64_t groups = n / F, rest = n % F,
                passes = ceil_div<int64_t>(m, k.blocked_gemv.max_tokens);
  const BalancedPartition pass_rows(m, passes);
  const auto run = Op::kBf16 ? k.blocked_gemv.run_bf16 : k.blocked_gemv.run;
  const auto rows_at = [&](int s, int64_t f) {
    return element(
        d.b.data, d.b.type,
        it.expert * d.b.stride_e + (s * d.features + it.feature_begin + f) * d.b.stride_o);
  };
  for (int s = 0; s < d.segments; ++s) {
    for (int64_t i = 0; i < groups + rest; ++i) {
      const int64_t first = std::min(i, groups) * F + std::max<int64_t>(i - groups, 0);
      const int features = i < groups ? F : 1;
      const int64_t next_first = first + features;
      const char* w = rows_at(s, first);
      TileOptions next;
      if (next_first < n || s + 1 < d.segments) {
        next.base = next_first < n ? rows_at(s, next_first) : rows_at(s + 1, 0);
        next.stride = ldw * size;
        next.rows = std::min(F, n - (next_first < n ? next_first : 0));
        next.bytes = K * size;
        next.spread(std::max<int64_t>(1, passes * k_blocks * (block / W / kPrefetchStep)),
                    k.prefetch_halves);
      }
      for (int64_t b = 0; b < k_blocks; ++b) {
        const int64_t kc = std::min(block, K - b * block);
        const char* weights = w + b * block * size;
        for (int64_t p = 0; p < passes; ++p) {
          const int64_t t0 = pass_rows.begin(p), t1 = pass_rows.begin(p + 1);
          const int tokens = static_cast<int>(t1 - t0);
          const T* rows = x + (b * m + t0) * ldx;
          T* part = sums + t0 * features * W;
          // The call with the first tokens reads weights of a half type and leaves them widened.
          const bool widening = widen && p == 0, widened = widen && p > 0;
          (widening ? k.blocked_gemv.run_widening : run)(
              {.w_type = d.b.type,
               .features = features,
               .tokens = tokens,
               .k = kc,
               .w = widened ? static_cast<const void*>(wide) : weights,
               .ldw = widened ? ldx : ldw,
               .x = rows,
               .ldx = ldx,
               .sums = part,
               .accumulate = b > 0,
               .wide = wide,
               .ld_wide = ldx},
              next);
        }
      }
      k.blocked_gemv.reduce(features, m, sums, out + s * n + first, ldo);
    }
  }
  for (int64_t t = 0; t < m; ++t) {
    fn(it.expert, it.row_begin + t, it.feature_begin, n, out + t * ldo, out + t * ldo + n);
  }
}

}  // namespace moe_ops::cpu
