// Items of weights of 8 and 4 bits: as integers along k, or as panels made in cache.
#pragma once

#include "cpu/gemm/plan.h"

namespace moe_ops::cpu {

// dot_item with 8 bits, for any number of rows: strips of kDot8Features rows of weights meet the
// tokens, kDot8Tokens at a time. With no more tokens than that, weights are read once, in streams a
// sixth of the item apart. With more, a strip is a run in memory; it stays in cache while all
// tokens pass, and they ask for the next one.
template <class Epilogue>
void quant8_item(const GemmDesc<float>& d, const Kernels<float>& k, const GemmItem& it,
                 const Epilogue& fn) {
  constexpr int64_t F = kDot8Features;
  const QuantFormat& q = d.b.quant;
  const int64_t m = it.row_end - it.row_begin, n = it.feature_end - it.feature_begin;
  const int64_t K = d.in_features, padded_k = round_up<int64_t>(K, 64);
  const int64_t row_bytes = round_up<int64_t>(k.quant.row8_bytes(K), 64) + 64;
  float* x = scratch<float>(Scratch::kPackA, padded_k);
  char* rows = scratch<char>(Scratch::kTokens, m * row_bytes);
  std::fill(x + K, x + padded_k, 0.0f);
  for (int64_t t = 0; t < m; ++t) {
    load_tokens<false>(d, k, it.row_begin + t, 0, K, x);
    k.quant.row8(K, x, rows + t * row_bytes);
  }
  const int64_t ldo = n * d.segments;
  float* out = scratch<float>(Scratch::kTile, m * ldo);
  const int64_t ldw = d.b.stride_o, strips = n / F, passes = ceil_div(m, kDot8Tokens);
  const bool streams = passes == 1;
  const int64_t feature_step = streams ? strips : 1, strip_step = streams ? 1 : F;
  for (int s = 0; s < d.segments; ++s) {
    for (int64_t i = 0; i < strips + n % F; ++i) {
      const bool whole = i < strips;
      const int64_t features = whole ? F : 1;
      const int64_t first = whole ? i * strip_step : i - strips + strips * F;
      const int64_t step = whole ? feature_step : 1;
      const int64_t feature = s * d.features + it.feature_begin + first;
      const char* w = weights_at(d.b, it.expert, feature, 0);
      const bool last = whole ? first + F >= n : first + 1 == n;
      const char* next =
          streams ? w + kDot8Ahead
          : !last ? w + features * ldw
          : s + 1 < d.segments
              ? weights_at(d.b, it.expert, (s + 1) * d.features + it.feature_begin, 0)
              : w;
      for (int64_t p = 0; p < passes; ++p) {
        const int64_t t = p * kDot8Tokens;
        const int tokens = static_cast<int>(std::min(kDot8Tokens, m - t));
        k.quant.dot8(static_cast<int>(features), tokens, K, w, step * ldw,
                     scales_at(d.b, it.expert, feature), step * q.scale_stride_o,
                     rows + t * row_bytes, row_bytes, out + t * ldo + s * n + first, ldo, step,
                     next + p * K / passes, step * ldw, std::max<int64_t>(64 / passes, 1));
      }
    }
  }
  for (int64_t t = 0; t < m; ++t) {
    fn(it.expert, it.row_begin + t, it.feature_begin, n, out + t * ldo, out + t * ldo + n);
  }
}

// dot_item with 4 bits: every weight is read once.
template <class Epilogue>
void quant4_item(const GemmDesc<float>& d, const Kernels<float>& k, const GemmItem& it,
                 const Epilogue& fn) {
  const QuantFormat& q = d.b.quant;
  const int64_t m = it.row_end - it.row_begin, n = it.feature_end - it.feature_begin;
  const int64_t K = d.in_features, padded_k = round_up(K, kQuantBlock);
  const int64_t row_bytes = round_up<int64_t>(k.quant.row4_bytes(K), 64);
  float* x = scratch<float>(Scratch::kPackA, padded_k);
  char* rows = scratch<char>(Scratch::kTokens, m * row_bytes);
  std::fill(x + K, x + padded_k, 0.0f);
  for (int64_t t = 0; t < m; ++t) {
    load_tokens<false>(d, k, it.row_begin + t, 0, K, x);
    k.quant.row4(K, x, rows + t * row_bytes);
  }
  const int64_t ldo = n * d.segments;
  float* out = scratch<float>(Scratch::kTile, m * ldo);
  // Four long streams, as in dot_item.
  const int64_t quarter = n / kDotFeatures;
  const int64_t ldw = d.b.stride_o / 2;
  for (int s = 0; s < d.segments; ++s) {
    for (int64_t f = 0; f < quarter + n % kDotFeatures; ++f) {
      const bool four = f < quarter;
      const int64_t first = four ? f : f - quarter + quarter * kDotFeatures;
      const int64_t feature = s * d.features + it.feature_begin + first;
      const int64_t step = four ? quarter : 1;
      for (int64_t t = 0; t < m; t += k.dot_tokens) {
        const int tokens = static_cast<int>(std::min<int64_t>(k.dot_tokens, m - t));
        k.quant.dot4(q.group, four ? kDotFeatures : 1, tokens, K,
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

// panel_item, of tokens in fp32 or as integers of 16 bits, with panels that are made where they are
// used: a block of one is written, and read by the tiles of all rows, in cache. Rows of weights
// that make a panel are one run in memory, and the tiles ask for that of the next panel.
template <bool kCodes, class Epilogue>
void quant_panel_item(const GemmDesc<float>& d, const Kernels<float>& k, const GemmItem& it,
                      const Epilogue& fn) {
  constexpr int64_t kStep = kCodes ? 2 : 1;  // steps of k in an element of a
  const QuantFormat& q = d.b.quant;
  const int64_t P = 2 * k.lanes, word = 32 / q.bits;
  const int64_t K = d.in_features, block = kStep * kKc, k_blocks = ceil_div(K, block);
  const int64_t m = it.row_end - it.row_begin, n = it.feature_end - it.feature_begin;
  const int64_t padded_n = round_up(n, P), ldc = padded_n * d.segments;
  const int64_t group = q.bits == 4 ? q.group : K, groups = ceil_div(K, group);
  float* a = scratch<float>(Scratch::kTokens, k_blocks * m * kLda);
  float* tile = scratch<float>(Scratch::kTile, m * ldc);
  Carver carver(Scratch::kPackB, (block / word + 4) * P * 4 + (groups + 4) * P * 4 + 128);
  auto* words = carver.take<uint32_t>((block / word + 4) * P);
  auto* scales = carver.take<uint32_t>((groups + 4) * P);
  const int64_t padded_k = round_up<int64_t>(K, 16);
  float* x = scratch<float>(Scratch::kPackA, padded_k);
  std::fill(x + K, x + padded_k, 0.0f);
  for (int64_t t = 0; t < m; ++t) {
    if constexpr (kCodes) load_tokens<false>(d, k, it.row_begin + t, 0, K, x);
    for (int64_t b = 0; b < k_blocks; ++b) {
      float* dst = a + (b * m + t) * kLda;
      const int64_t kc = std::min(block, K - b * block);
      if constexpr (kCodes) {
        k.quant.pairs(q.bits, kc, x + b * block, dst);
      } else {
        load_tokens<false>(d, k, it.row_begin + t, b * kKc, kc, dst);
        // The last word of 8-bit weights may lack some.
        if (b == k_blocks - 1) std::fill(dst + kc, dst + round_up(kc, word), 0.0f);
      }
    }
  }
  const auto* tiles = (kCodes ? k.quant.code_tile : k.quant.tile)[q.bits == 4];
  const int64_t blocks = ceil_div<int64_t>(m, kCodes ? k.quant.code_rows : k.mr2);
  const int64_t count = padded_n / P * d.segments;
  const int64_t ldw = d.b.stride_o * q.bits / 8, ahead_step = std::max<int64_t>(64 / blocks, 1);
  const auto feature = [&](int64_t i) {
    return i % d.segments * d.features + it.feature_begin + i / d.segments * P;
  };
  for (int64_t i = 0; i < count; ++i) {
    const char* w = weights_at(d.b, it.expert, feature(i), 0);
    const char* next = weights_at(d.b, it.expert, feature(std::min(i + 1, count - 1)), 0);
    const int64_t features = std::min(P, n - i / d.segments * P);
    const float* scale = scales_at(d.b, it.expert, feature(i));
    // A scale is a word too: [groups][P].
    k.quant.words(8, scale, 4 * q.scale_stride_o, features, 0, 4 * groups, scales);
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
          const float* rows = a + (b * m + r0) * kLda;
          tiles[r1 - r0 - 1](
              steps, rows + (begin - k0) / kStep, rows + kKc, words + (begin - k0) / word * P,
              reinterpret_cast<const float*>(scales + begin / group * P), sums + r0 * ldc, ldc,
              begin > 0, next + (begin / word * P / 16 * 64) + r * steps * P / 16 * ahead_step,
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
