// Items of weights of 8 and 4 bits: as integers for few rows, else as panels made in cache.
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

// panel_item with panels that are made where they are used: a block of one is written, and read by
// the tiles of all rows, in cache. Rows of weights that make a panel are one run in memory, and the
// tiles ask for that of the next panel.
template <bool kPairs, class Epilogue>
void quant_panel_item(const GemmDesc<float>& d, const Kernels<float>& k, const GemmItem& it,
                      const Epilogue& fn) {
  constexpr int64_t kStep = kPairs ? 2 : 1;  // steps of k in an element of a
  const QuantFormat& q = d.b.quant;
  const int64_t P = 2 * k.lanes, word = 32 / q.bits;
  const int64_t K = d.in_features, block = kStep * kKc, k_blocks = ceil_div(K, block);
  const int64_t m = it.row_end - it.row_begin, n = it.feature_end - it.feature_begin;
  const int64_t padded_n = round_up(n, P), ldc = padded_n * d.segments;
  const int64_t group = q.bits == 4 ? q.group : K, groups = ceil_div(K, group);
  float* a = scratch<float>(Scratch::kTokens, k_blocks * m * kLda);
  float* tile = scratch<float>(Scratch::kTile, m * ldc);
  Carver carver(Scratch::kPackB, (block / word + 4) * P * 4 + groups * P * 4 + 128);
  auto* words = carver.take<uint32_t>((block / word + 4) * P);
  auto* scales = carver.take<float>(groups * P);
  for (int64_t t = 0; t < m; ++t) {
    for (int64_t b = 0; b < k_blocks; ++b) {
      float* dst = a + (b * m + t) * kLda;
      const int64_t kc = ceil_div(std::min(block, K - b * block), kStep);
      load_tokens<kPairs>(d, k, it.row_begin + t, b * kKc, kc, dst);
      // The last word of 8-bit weights may lack some.
      if (b == k_blocks - 1) std::fill(dst + kc, dst + round_up(kc, word), 0.0f);
    }
  }
  const auto* tiles = (kPairs ? k.quant.pair_tile : k.quant.tile)[q.bits == 4];
  const int64_t blocks = ceil_div<int64_t>(m, k.mr2), count = padded_n / P * d.segments;
  const int64_t ldw = d.b.stride_o * q.bits / 8, ahead_step = std::max<int64_t>(64 / blocks, 1);
  const auto feature = [&](int64_t i) {
    return i % d.segments * d.features + it.feature_begin + i / d.segments * P;
  };
  for (int64_t i = 0; i < count; ++i) {
    const char* w = weights_at(d.b, it.expert, feature(i), 0);
    const char* next = weights_at(d.b, it.expert, feature(std::min(i + 1, count - 1)), 0);
    const int64_t features = std::min(P, n - i / d.segments * P);
    const float* scale = scales_at(d.b, it.expert, feature(i));
    for (int64_t f = 0; f < P; ++f) {
      const float* row = scale + std::min(f, features - 1) * q.scale_stride_o;
      for (int64_t g = 0; g < groups; ++g) scales[g * P + f] = row[g];
    }
    float* sums = tile + i % d.segments * padded_n + i / d.segments * P;
    for (int64_t b = 0; b < k_blocks; ++b) {
      const int64_t k0 = b * block, k1 = std::min(K, k0 + block);
      k.quant.words(q.bits, w, ldw, features, k0, k1 - k0, words);
      // Runs of k that share a scale.
      for (int64_t begin = k0, end; begin < k1; begin = end) {
        end = std::min(k1, (begin / group + 1) * group);
        const int64_t steps = ceil_div(end - begin, word);
        for (int64_t r = 0; r < blocks; ++r) {
          const int64_t r0 = m * r / blocks, r1 = m * (r + 1) / blocks;
          tiles[r1 - r0 - 1](steps, a + (b * m + r0) * kLda + (begin - k0) / kStep,
                             words + (begin - k0) / word * P, scales + begin / group * P,
                             sums + r0 * ldc, ldc, begin > 0,
                             next + (begin / word * P / 16 * 64) + r * steps * P / 16 * ahead_step,
                             ahead_step);
        }
      }
    }
  }
  for (int64_t t = 0; t < m; ++t) {
    fn(it.expert, it.row_begin + t, it.feature_begin, n, tile + t * ldc, tile + t * ldc + padded_n);
  }
}

}  // namespace moe_ops::cpu
