// Items that stream weights as they lie: every weight is read once, for few rows.
#pragma once

#include "cpu/gemm/plan.h"

namespace moe_ops::cpu {

// Epilogue: fn(expert, row, feature_begin, n, T* values0, T* values1); values1 is the second
// segment. It may overwrite the values.
template <bool kPairs, class T, class Epilogue>
void dot_item(const GemmDesc<T>& d, const GemmKernels<T>& k, const GemmItem& it,
              const Epilogue& fn) {
  constexpr int64_t kHalves = kPairs ? 2 : 1;  // weights of an element
  const int64_t m = it.row_end - it.row_begin;
  const int64_t n = it.feature_end - it.feature_begin;
  const int64_t K = d.in_features / kHalves;
  const int64_t ldx = round_up<int64_t>(K, k.lanes);
  ScratchScope scratch;
  T* x = scratch.take<T>(Scratch::kTokens, m * ldx);
  for (int64_t t = 0; t < m; ++t) {
    load_tokens<kPairs>(d, it.row_begin + t, 0, K, x + t * ldx);
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
  const int64_t ahead =
      passes > 1 && d.b.type == kAccumulate<T> ? k.gemv.prefetch_distance : kDotAhead;
  const EvenParts pass_rows(m, passes);
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
        const int64_t ldw = d.b.stride_o / kHalves;
        (kPairs ? k.gemv.run_bf16 : k.gemv.run)({.w_type = d.b.type,
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
                                                 .prefetch_distance = ahead});
      }
    };
    // What half of an L1 holds, or four rows, stays in cache for a second pass.
    const int64_t strip_bytes = kGemvFeatures * d.in_features * dtype_size(d.b.type);
    const int64_t kept = std::max<int64_t>(1, kDotKeptBytes / strip_bytes);
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

// Strips of four weight rows, dense along k, meet all tokens, strip_tokens at a time: no token is
// padded and no weight copied. Blocks of k keep a strip's part in L1 while the tokens pass; their
// tiles ask for the next strip, which is one run in memory. Half types are widened once a block, by
// the tiles of the first tokens.
template <bool kPairs, class T, class Epilogue>
void strip_item(const GemmDesc<T>& d, const GemmKernels<T>& k, const GemmItem& it,
                const Epilogue& fn) {
  constexpr int64_t F = kGemvFeatures;
  const int64_t W = k.lanes, K = kPairs ? d.in_features / 2 : d.in_features;
  const int64_t m = it.row_end - it.row_begin, n = it.feature_end - it.feature_begin;
  const int64_t block = balanced(K, k.blocked_gemv.block_k, W), k_blocks = ceil_div(K, block);
  const int64_t ldx = round_up(block, W) + kPanelPad / 2;
  ScratchScope scratch;
  T* x = scratch.take<T>(Scratch::kTokens, k_blocks * m * ldx);
  for (int64_t t = 0; t < m; ++t) {
    for (int64_t b = 0; b < k_blocks; ++b) {
      T* dst = x + (b * m + t) * ldx;
      const int64_t kc = std::min(block, K - b * block);
      load_tokens<kPairs>(d, it.row_begin + t, b * block, kc, dst);
      std::fill(dst + kc, dst + round_up(kc, W), T(0));
    }
  }
  const int64_t ldo = n * d.segments + kPanelPad / 2;
  T* out = scratch.take<T>(Scratch::kTile, m * ldo);
  T* sums = scratch.take<T>(Scratch::kPackA, m * F * W);
  const bool widen = !kPairs && d.b.type != kAccumulate<T>;
  T* wide = widen ? scratch.take<T>(Scratch::kPackB, F * ldx) : nullptr;
  const int64_t size = kPairs ? sizeof(T) : dtype_size(d.b.type);
  const int64_t ldw = kPairs ? d.b.stride_o / 2 : d.b.stride_o;
  const int64_t strips = n / F, rest = n % F,
                passes = ceil_div<int64_t>(m, k.blocked_gemv.max_tokens);
  const EvenParts pass_rows(m, passes);
  const auto run = kPairs ? k.blocked_gemv.run_bf16 : k.blocked_gemv.run;
  const auto rows_at = [&](int s, int64_t f) {
    return element(
        d.b.data, d.b.type,
        it.expert * d.b.stride_e + (s * d.features + it.feature_begin + f) * d.b.stride_o);
  };
  for (int s = 0; s < d.segments; ++s) {
    for (int64_t i = 0; i < strips + rest; ++i) {
      const int64_t first = std::min(i, strips) * F + std::max<int64_t>(i - strips, 0);
      const int features = i < strips ? F : 1;
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
          if (widen && p == 0) {
            k.blocked_gemv.run_widening({.w_type = d.b.type,
                                         .features = features,
                                         .tokens = tokens,
                                         .k = kc,
                                         .w = weights,
                                         .ldw = ldw,
                                         .x = rows,
                                         .ldx = ldx,
                                         .sums = part,
                                         .accumulate = b > 0,
                                         .wide = wide,
                                         .ld_wide = ldx},
                                        next);
          } else {
            run({.w_type = d.b.type,
                 .features = features,
                 .tokens = tokens,
                 .k = kc,
                 .w = widen ? static_cast<const void*>(wide) : weights,
                 .ldw = widen ? ldx : ldw,
                 .x = rows,
                 .ldx = ldx,
                 .sums = part,
                 .accumulate = b > 0},
                next);
          }
        }
      }
      k.blocked_gemv.reduce(features, m, sums, out + s * n + first, ldo);
    }
  }
  for (int64_t t = 0; t < m; ++t) {
    fn(it.expert, it.row_begin + t, it.feature_begin, n, out + t * ldo, out + t * ldo + n);
  }
}

template <bool kPairs, class T, class Epilogue>
void rank_item(const GemmDesc<T>& d, const GemmKernels<T>& k, const GemmItem& it,
               const Epilogue& fn) {
  constexpr int64_t kHalves = kPairs ? 2 : 1;  // weight rows of an element
  const int64_t m = it.row_end - it.row_begin;
  const int64_t n = it.feature_end - it.feature_begin;
  const int64_t K = ceil_div(d.in_features, kHalves), lda = K + 16;
  // One block, or those of nn_item, whose sums are then added up.
  const int64_t depth = d.invariant ? nn_depth(d, k, kHalves, m) : K, ldc = n * d.segments;
  ScratchScope scratch;
  T* a = scratch.take<T>(Scratch::kTokens, m * lda);
  T* tile = scratch.take<T>(Scratch::kTile, m * ldc);
  T* block = depth < K ? scratch.take<T>(Scratch::kPackA, m * ldc) : nullptr;
  for (int64_t t = 0; t < m; ++t) {
    load_tokens<kPairs>(d, it.row_begin + t, 0, K, a + t * lda);
  }
  for (int64_t b = 0; b < K; b += depth) {
    const int64_t first_row = b * kHalves, end = std::min(d.in_features, (b + depth) * kHalves);
    T* sums = b == 0 ? tile : block;
    for (int s = 0; s < d.segments; ++s) {
      const int64_t first = it.expert * d.b.stride_e + s * d.features + it.feature_begin;
      for (int64_t row = first_row; row < end; row += kOuterRows) {
        const auto rows = static_cast<int>(std::min<int64_t>(kOuterRows, end - row));
        const char* w = element(d.b.data, d.b.type, first + row * d.b.stride_k);
        const T* x = a + row / kHalves;
        const bool add = row > first_row;
        (kPairs ? k.outer.run_bf16 : k.outer.run)({.w_type = d.b.type,
                                                   .rows = rows,
                                                   .tokens = m,
                                                   .w = w,
                                                   .ldw = d.b.stride_k,
                                                   .a = x,
                                                   .lda = lda,
                                                   .c = sums + s * n,
                                                   .ldc = ldc,
                                                   .n = n,
                                                   .accumulate = add});
      }
    }
    if (b > 0) row_kernels<T>().axpy(kAccumulate<T>, block, T(1), tile, m * ldc);
  }
  for (int64_t t = 0; t < m; ++t) {
    T* row = tile + t * n * d.segments;
    fn(it.expert, it.row_begin + t, it.feature_begin, n, row, row + n);
  }
}

}  // namespace moe_ops::cpu
