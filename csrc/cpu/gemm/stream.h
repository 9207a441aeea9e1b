// Items that stream weights as they lie: every weight is read once, for few rows.
#pragma once

#include "cpu/gemm/plan.h"

namespace moe_ops::cpu {

// Epilogue: fn(expert, row, feature_begin, n, T* values0, T* values1); values1 is the second
// segment. It may overwrite the values.
template <class T, class Epilogue>
void dot_item(const GemmDesc<T>& d, const Kernels<T>& k, const GemmItem& it, const Epilogue& fn) {
  const int64_t m = it.row_end - it.row_begin;
  const int64_t n = it.feature_end - it.feature_begin;
  const int64_t K = d.in_features;
  const int64_t ldx = round_up<int64_t>(K, k.lanes);
  T* x = scratch<T>(Scratch::kTokens, m * ldx);
  for (int64_t t = 0; t < m; ++t) {
    const int64_t r = it.row_begin + t;
    k.load_row(d.a.type, row_of(d.a, r), x + t * ldx, K, d.a_scale ? d.a_scale[r] : T(1));
    std::fill(x + t * ldx + K, x + (t + 1) * ldx, T(0));
  }
  const int64_t ldo = n * d.segments;
  T* out = scratch<T>(Scratch::kTile, m * ldo);
  // The four rows of a step lie a quarter of the item apart: four long streams. Four rows next to
  // each other would be four short ones, and the prefetcher loses the start of each.
  const int64_t quarter = n / kDotFeatures;
  const int64_t row_bytes = d.b.stride_o * dtype_size(d.b.type);
  for (int s = 0; s < d.segments; ++s) {
    const char* w =
        element(d.b.data, d.b.type,
                it.expert * d.b.stride_e + (s * d.features + it.feature_begin) * d.b.stride_o);
    for (int64_t f = 0; f < quarter + n % kDotFeatures; ++f) {
      const bool four = f < quarter;
      const int64_t first = four ? f : f - quarter + quarter * kDotFeatures;
      for (int64_t t = 0; t < m; t += k.dot_tokens) {
        const int tokens = static_cast<int>(std::min<int64_t>(k.dot_tokens, m - t));
        k.dot(d.b.type, four ? kDotFeatures : 1, tokens, K, w + first * row_bytes,
              (four ? quarter : 1) * d.b.stride_o, x + t * ldx, ldx, out + t * ldo + s * n + first,
              ldo, four ? quarter : 1);
      }
    }
  }
  for (int64_t t = 0; t < m; ++t) {
    fn(it.expert, it.row_begin + t, it.feature_begin, n, out + t * ldo, out + t * ldo + n);
  }
}

template <class T, class Epilogue>
void rank_item(const GemmDesc<T>& d, const Kernels<T>& k, const GemmItem& it, const Epilogue& fn) {
  const int64_t m = it.row_end - it.row_begin;
  const int64_t n = it.feature_end - it.feature_begin;
  const int64_t K = d.in_features, lda = K + 16;
  T* a = scratch<T>(Scratch::kTokens, m * lda);
  T* tile = scratch<T>(Scratch::kTile, m * n * d.segments);
  for (int64_t t = 0; t < m; ++t) {
    load_tokens<false>(d, k, it.row_begin + t, 0, K, a + t * lda);
  }
  for (int s = 0; s < d.segments; ++s) {
    const int64_t first = it.expert * d.b.stride_e + s * d.features + it.feature_begin;
    for (int64_t k0 = 0; k0 < K; k0 += kRankRows) {
      k.rank_update(d.b.type, static_cast<int>(std::min<int64_t>(kRankRows, K - k0)), m,
                    element(d.b.data, d.b.type, first + k0 * d.b.stride_k), d.b.stride_k, a + k0,
                    lda, tile + s * n, n * d.segments, n, k0 > 0);
    }
  }
  for (int64_t t = 0; t < m; ++t) {
    T* row = tile + t * n * d.segments;
    fn(it.expert, it.row_begin + t, it.feature_begin, n, row, row + n);
  }
}

}  // namespace moe_ops::cpu
