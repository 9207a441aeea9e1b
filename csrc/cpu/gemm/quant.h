// Items of weights of 8 and 4 bits: as integers for few rows, widened for the tiles of nt.
#pragma once

#include "cpu/gemm/plan.h"

namespace moe_ops::cpu {

// dot_item with integers: every weight is read once.
template <class Epilogue>
void quant_item(const GemmDesc<float>& d, const Kernels<float>& k, const GemmItem& it,
                const Epilogue& fn) {
  const QuantFormat& q = d.b.quant;
  const int64_t m = it.row_end - it.row_begin, n = it.feature_end - it.feature_begin;
  const int64_t K = d.in_features, padded_k = round_up(K, kQuantBlock);
  const int64_t row_bytes = round_up<int64_t>(k.quant.token_bytes(q.bits, K), 64);
  float* x = scratch<float>(Scratch::kPackA, padded_k);
  char* rows = scratch<char>(Scratch::kTokens, m * row_bytes);
  std::fill(x + K, x + padded_k, 0.0f);
  for (int64_t t = 0; t < m; ++t) {
    load_tokens<false>(d, k, it.row_begin + t, 0, K, x);
    k.quant.tokens(q.bits, K, x, rows + t * row_bytes);
  }
  const int64_t ldo = n * d.segments;
  float* out = scratch<float>(Scratch::kTile, m * ldo);
  // Four long streams, as in dot_item.
  const int64_t quarter = n / kDotFeatures;
  const int64_t ldw = d.b.stride_o * q.bits / 8;
  for (int s = 0; s < d.segments; ++s) {
    for (int64_t f = 0; f < quarter + n % kDotFeatures; ++f) {
      const bool four = f < quarter;
      const int64_t first = four ? f : f - quarter + quarter * kDotFeatures;
      const int64_t feature = s * d.features + it.feature_begin + first;
      const int64_t step = four ? quarter : 1;
      for (int64_t t = 0; t < m; t += k.dot_tokens) {
        const int tokens = static_cast<int>(std::min<int64_t>(k.dot_tokens, m - t));
        k.quant.dot(q.bits, q.group, four ? kDotFeatures : 1, tokens, K,
                    weights_at(d.b, it.expert, feature, 0), step * ldw,
                    scales_at(d.b, it.expert, feature), step * q.scale_stride_o,
                    rows + t * row_bytes, row_bytes, out + t * ldo + s * n + first, ldo, step);
      }
    }
  }
  for (int64_t t = 0; t < m; ++t) {
    fn(it.expert, it.row_begin + t, it.feature_begin, n, out + t * ldo, out + t * ldo + n);
  }
}

// kc elements (pairs, for kPairs) of a weight row from k0 on, as a tile of nt takes them.
template <bool kPairs>
void widen_row(const GemmDesc<float>& d, const Kernels<float>& k, int64_t expert, int64_t feature,
               int64_t k0, int64_t kc, float* dst) {
  constexpr int64_t kStep = kPairs ? 2 : 1;
  const QuantFormat& q = d.b.quant;
  k.quant.widen(q.bits, q.group, weights_at(d.b, expert, feature, 0),
                scales_at(d.b, expert, feature), kStep * k0, kStep * kc,
                kPairs ? DType::kBFloat16 : DType::kFloat32, dst);
}

// Rows of sums of an item, one feature after the other, times the scales of 8-bit weights.
inline void scale_sums(const GemmDesc<float>& d, const Kernels<float>& k, const GemmItem& it,
                       int64_t m, float* sums, int64_t ld) {
  const QuantFormat& q = d.b.quant;
  const int64_t n = it.feature_end - it.feature_begin;
  float* scale = scratch<float>(Scratch::kPackA, n);
  for (int s = 0; s < d.segments; ++s) {
    const float* src = scales_at(d.b, it.expert, s * d.features + it.feature_begin);
    for (int64_t f = 0; f < n; ++f) scale[f] = src[f * q.scale_stride_o];
    for (int64_t t = 0; t < m; ++t) k.quant.multiply_row(scale, sums + t * ld + s * n, n);
  }
}

}  // namespace moe_ops::cpu
