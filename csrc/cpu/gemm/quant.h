// Items of weights of 8 and 4 bits: as integers along k, or as panels made in cache.
#pragma once

#include "cpu/gemm/dequant.h"
#include "cpu/gemm/gemv.h"
#include "cpu/gemm/heuristics.h"

namespace moe_ops::cpu {

// Columns of a segment that panels sum up before they are handed on: of 128 rows a small tile.
constexpr int64_t kQuantPartFeatures = 128;
// Prefetch distance of a stream of 8-bit weights in bytes: for one token, and for more, which give
// memory the time.
constexpr int64_t kW8Prefetch = 1024, kW8TokensPrefetch = 2048;

// Groups of weights, of so many bytes each, that stay in cache while tokens pass: half of an L1,
// but no fewer than end their sums together.
inline int64_t kept_groups(int64_t bytes) {
  return std::max<int64_t>(4, kKeptWeightBytes / std::max<int64_t>(1, bytes) / 4 * 4);
}

// Computes an item by GEMV with 8 bits, for any number of rows: groups of w8_features rows of
// weights meet the tokens, max_tokens at a time. With no more tokens than that, weights are read
// once, in streams that share the item evenly. With more, a group is a run in memory; it stays in
// cache while all tokens pass, and they prefetch the next one.
template <class Epilogue>
void w8_gemv_item(const GemmDesc<float>& d, const GemmKernels<float>& k, const GemmItem& it,
                  const Epilogue& fn) {
  const QuantKernels& kernels = quant_kernels();
  const int64_t F = kernels.w8_features;
  const QuantFormat& q = d.b.quant;
  const int64_t m = it.row_end - it.row_begin, n = it.feature_end - it.feature_begin;
  const int64_t K = d.in_features, padded_k = round_up<int64_t>(K, 64);
  const int64_t row_bytes = round_up<int64_t>(kernels.w8_row_bytes(K), 64) + 64;
  ScratchScope scratch;
  float* x = scratch.take<float>(Scratch::kPackA, padded_k);
  char* rows = scratch.take<char>(Scratch::kTokens, m * row_bytes);
  std::fill(x + K, x + padded_k, 0.0f);
  for (int64_t t = 0; t < m; ++t) {
    Wide::load(d, it.row_begin + t, 0, K, x);
    kernels.w8_quantize(K, x, rows + t * row_bytes);
  }
  const int64_t ldo = n * d.segments;
  float* out = scratch.take<float>(Scratch::kTile, m * ldo);
  const int64_t ldw = d.b.stride_o, groups = n / F, rest = n % F;
  const int64_t passes = ceil_div<int64_t>(m, k.gemv.max_tokens);
  const BalancedPartition pass_rows(m, passes);
  for (int s = 0; s < d.segments; ++s) {
    const int64_t feature = s * d.features + it.feature_begin;
    // `count` times `features` features from `first` on, `step` apart.
    const auto run = [&](int64_t features, int64_t count, int64_t first, int64_t step,
                         const char* next) {
      if (count == 0) return;
      const char* w = weights_at(d.b, it.expert, feature + first, 0);
      const BalancedPartition ahead(features, passes);
      for (int64_t p = 0; p < passes; ++p) {
        const int64_t t = pass_rows.begin(p);
        // Passes share the rows that they prefetch.
        const int64_t ahead0 = ahead.begin(p), ahead1 = ahead.begin(p + 1);
        kernels.w8_dot({.features = static_cast<int>(features),
                        .count = count,
                        .tokens = static_cast<int>(pass_rows.begin(p + 1) - t),
                        .k = K,
                        .w = w,
                        .w_step = ldw,
                        .ldw = step * ldw,
                        .x = rows + t * row_bytes,
                        .x_bytes = row_bytes,
                        .out = out + t * ldo + s * n + first,
                        .ldo = ldo,
                        .out_step = step,
                        .prefetch = next + ahead0 * step * ldw,
                        .prefetch_ld = step * ldw,
                        .prefetch_rows = static_cast<int>(ahead1 - ahead0)});
      }
    };
    if (passes == 1) {
      const char* next = weights_at(d.b, it.expert, feature, 0);
      next += m == 1 ? kW8Prefetch : kW8TokensPrefetch;
      run(F, groups, 0, groups, next);
      run(1, rest, groups * F, 1, next + groups * F * ldw);
      continue;
    }
    // Many rows meet several groups at once.
    const int64_t at_once = d.invariant && m > kQuantMaxRows ? kept_groups(F * K) : 1;
    for (int64_t first = 0; first < n;) {
      const bool whole = first < groups * F;
      const int64_t count = whole ? std::min(at_once, groups - first / F) : 1;
      const int64_t features = whole ? F : 1, after = first + features * count;
      const int64_t next = after < n ? after : s + 1 < d.segments ? d.features : first;
      run(features, count, first, count, weights_at(d.b, it.expert, feature + next, 0));
      first = after;
    }
  }
  for (int64_t t = 0; t < m; ++t) {
    for (int s = 0; s < d.segments; ++s) {
      float* sums = out + t * ldo + s * n;
      const float* scale = scales_at(d.b, it.expert, s * d.features + it.feature_begin);
      if (q.scale_stride_o == 1) {
        row_kernels<float>().multiply_row(scale, sums, n);
      } else {
        for (int64_t f = 0; f < n; ++f) sums[f] *= scale[f * q.scale_stride_o];
      }
    }
    fn(it.expert, it.row_begin + t, it.feature_begin, n, out + t * ldo, out + t * ldo + n);
  }
}

// Computes an item by GEMV with integers and a scale per group of weights; every weight is read
// once by max_tokens tokens.
template <class Epilogue>
void grouped_gemv_item(const GemmDesc<float>& d, const GemmKernels<float>& k, const GemmItem& it,
                       const Epilogue& fn) {
  const QuantKernels& kernels = quant_kernels();
  const int64_t m = it.row_end - it.row_begin, n = it.feature_end - it.feature_begin;
  const bool eight = d.b.quant.bits == 8;
  const int64_t K = d.in_features, padded_k = round_up<int64_t>(K, 64);
  const int64_t row_bytes =
      round_up<int64_t>(eight ? kernels.w8_row_bytes(K) : kernels.w4_row_bytes(K), 64);
  const CodeRows codes = code_rows(d.b, it.expert, K);
  ScratchScope scratch;
  float* scales = scratch.take<float>(Scratch::kDequant, codes_scratch(K));
  float* x = scratch.take<float>(Scratch::kPackA, padded_k);
  char* rows = scratch.take<char>(Scratch::kTokens, m * row_bytes);
  std::fill(x + K, x + padded_k, 0.0f);
  for (int64_t t = 0; t < m; ++t) {
    Wide::load(d, it.row_begin + t, 0, K, x);
    if (eight) {
      kernels.w8_quantize(K, x, rows + t * row_bytes);
    } else {
      kernels.w4_quantize(codes.codes, K, x, rows + t * row_bytes);
    }
  }
  const int64_t ldo = n * d.segments;
  float* out = scratch.take<float>(Scratch::kTile, m * ldo);
  // Four long streams, as in gemv_item; with more tokens than a pass takes, four rows at a time.
  const int64_t quarter = n / kGemvFeatures, rest = n % kGemvFeatures;
  for (int s = 0; s < d.segments; ++s) {
    // `count` times `features` features from `first` on, `step` apart.
    const auto run = [&](int features, int64_t count, int64_t first, int64_t step) {
      if (count == 0) return;
      const int64_t feature = s * d.features + it.feature_begin + first;
      for (int64_t t = 0; t < m; t += k.gemv.max_tokens) {
        const int tokens = static_cast<int>(std::min<int64_t>(k.gemv.max_tokens, m - t));
        const CodesDotParams p = {.rows = codes,
                                  .first = feature,
                                  .step = step,
                                  .features = features,
                                  .count = count,
                                  .tokens = tokens,
                                  .x = rows + t * row_bytes,
                                  .x_bytes = row_bytes,
                                  .scratch = scales,
                                  .out = out + t * ldo + s * n + first,
                                  .ldo = ldo,
                                  .out_step = step};
        eight ? kernels.w8_grouped_dot(p) : kernels.w4_dot(p);
      }
    };
    int64_t at_once = m <= k.gemv.max_tokens ? quarter : 1;
    if (d.invariant && m > kQuantMaxRows) at_once = kept_groups(kGemvFeatures * K / 2);
    for (int64_t f = 0; f < quarter; f += at_once) {
      run(kGemvFeatures, std::min(at_once, quarter - f), f, quarter);
    }
    run(1, rest, kGemvFeatures * quarter, 1);
  }
  for (int64_t t = 0; t < m; ++t) {
    fn(it.expert, it.row_begin + t, it.feature_begin, n, out + t * ldo, out + t * ldo + n);
  }
}

// Like packed_b_item, with tokens in fp32 or as integers of 16 or 8 bits, or of twice 8 (kTwoInt8:
// a row of integers, and one of what they leave), and with panels made where they are used: a block
// of one is written, and read by the tiles of all rows, in cache. Rows of weights that make a panel
// are one run in memory, and the tiles prefetch that of the next panel. But for bytes, a panel's
// sums lie side by side until it is done: runs of k that share a scale may add to them every 32
// steps, and rows a power of two apart would all meet in the same few sets of an L1.
template <Activations kForm, class Epilogue>
void repack_b_item(const GemmDesc<float>& d, const GemmKernels<float>& k, const GemmItem& it,
                   const Epilogue& fn) {
  const QuantKernels& kernels = quant_kernels();
  constexpr bool kInt8 = kForm == Activations::kInt8, kInt16 = kForm == Activations::kInt16;
  constexpr int64_t kStep = kInt8 ? 4 : kInt16 ? 2 : 1;  // steps of k in an element of a
  constexpr int64_t kDepth = kInt8 ? kInt8Depth / 4 : kKc;
  const QuantFormat& q = d.b.quant;
  const int64_t P = 2 * k.lanes, word = 32 / q.bits;
  const int64_t K = d.in_features, block = kStep * kDepth, k_blocks = ceil_div(K, block);
  const int64_t tokens = it.row_end - it.row_begin, n = it.feature_end - it.feature_begin;
  const int64_t parts = it.config.operand == Operand::kTwoInt8 ? 2 : 1, m = tokens * parts;
  // Columns of a segment that are summed up before they are handed on.
  const int64_t part = std::min(round_up(n, P), std::max(kQuantPartFeatures, P));
  const int64_t ldc = part * d.segments;
  // Scales that are not stored as float32, those of other groups and zero points are widened.
  const bool widened = !q.has_kernels;
  const int64_t group = widened ? kQuantBlock : q.bits == 4 ? q.group : K;
  const int64_t groups = ceil_div(K, group);
  const CodeRows codes = code_rows(d.b, it.expert, K);
  ScratchScope scratch;
  float* a = scratch.take<float>(Scratch::kTokens, k_blocks * m * kLda);
  float* tile = scratch.take<float>(Scratch::kTile, m * ldc);
  const int64_t ld_scale = groups + 16, rows_of_scales = widened ? 2 * P * ld_scale : 0;
  const int64_t scale_panels = q.zero != nullptr ? 2 : 1;
  Arena arena(scratch, Scratch::kPackB,
              (block / word + 8 + scale_panels * (groups + 8) + m) * P * 4 + 192 +
                  (rows_of_scales + (widened ? decoded_scratch(K) : 0)) * 4 + 128);
  auto* words = arena.take<uint32_t>((block / word + 8) * P);
  auto* scales = arena.take<float>((groups + 8) * P);
  auto* offsets = q.zero != nullptr ? arena.take<float>((groups + 8) * P) : nullptr;
  auto* row_scales = arena.take<float>(rows_of_scales);
  auto* scale_scratch = arena.take<float>(widened ? decoded_scratch(K) : 0);
  auto* sums = kInt8 ? nullptr : arena.take<float>(m * P);
  const int64_t padded_k = round_up(K, kQuantBlock);
  float* x = scratch.take<float>(Scratch::kPackA, padded_k);
  std::fill(x + K, x + padded_k, 0.0f);
  for (int64_t t = 0; t < m; ++t) {
    if constexpr (kInt8 || kInt16) {
      if (t % parts == 0) Wide::load(d, it.row_begin + t / parts, 0, K, x);
    }
    for (int64_t b = 0; b < k_blocks; ++b) {
      float* dst = a + (b * m + t) * kLda;
      const int64_t kc = std::min(block, K - b * block);
      if constexpr (kInt8) {
        kernels.quantize_int8(q.codes, kc, x + b * block, dst, t % parts + 1 < parts);
      } else if constexpr (kInt16) {
        kernels.quantize_int16(kc, x + b * block, dst);
      } else {
        Wide::load(d, it.row_begin + t, b * kKc, kc, dst);
        // The last word of 8-bit weights may lack some.
        if (b == k_blocks - 1) std::fill(dst + kc, dst + round_up(kc, word), 0.0f);
      }
    }
  }
  const bool four = q.bits == 4;
  const auto* tiles = [&] {
    if constexpr (kInt8) return &kernels.int8_tile[q.codes == Codes::kMxfp4 ? 2 : four][0];
    if constexpr (!kInt8) return kInt16 ? &kernels.int16_tile[0] : &kernels.tile[four][0];
  }();
  const int64_t blocks = ceil_div<int64_t>(m, kInt8    ? kernels.int8_rows
                                              : kInt16 ? kernels.int16_rows
                                                       : k.mr2);
  const BalancedPartition tile_rows(m, blocks);
  const int64_t count = ceil_div(n, P) * d.segments;
  const int64_t ldw = d.b.stride_o * q.bits / 8, ahead_step = std::max<int64_t>(64 / blocks, 1);
  const auto feature = [&](int64_t i) {
    return i % d.segments * d.features + it.feature_begin + i / d.segments * P;
  };
  for (int64_t i = 0; i < count; ++i) {
    const int64_t column = i / d.segments * P, part_begin = column / part * part;
    float* c = tile + i % d.segments * part + column - part_begin;
    float* sum = kInt8 ? c : sums;
    const int64_t ld_sum = kInt8 ? ldc : P;
    const char* w = weights_at(d.b, it.expert, feature(i), 0);
    const char* next = weights_at(d.b, it.expert, feature(std::min(i + 1, count - 1)), 0);
    const int64_t features = std::min(P, n - i / d.segments * P);
    // [groups][P]. A scale is a word too, but less than 32 bytes of a row would be copied first.
    const auto panel_of = [&](const float* scale, int64_t ld, float* dst) {
      if (groups < 8) {
        for (int64_t f = 0; f < features; ++f) {
          for (int64_t g = 0; g < groups; ++g) dst[g * P + f] = scale[f * ld + g];
        }
      } else {
        kernels.repack({8, false, scale, 4 * ld, features, 0, 4 * groups},
                       reinterpret_cast<uint32_t*>(dst));
      }
    };
    if (widened) {
      float* row_offsets = row_scales + P * ld_scale;
      for (int64_t f = 0; f < features; ++f) {
        kernels.w4_scales(codes, feature(i) + f, scale_scratch, row_scales + f * ld_scale,
                          row_offsets + f * ld_scale);
      }
      panel_of(row_scales, ld_scale, scales);
      if (offsets != nullptr) panel_of(row_offsets, ld_scale, offsets);
    } else {
      panel_of(scales_at(d.b, it.expert, feature(i)), q.scale_stride_o, scales);
    }
    for (int64_t b = 0; b < k_blocks; ++b) {
      const int64_t k0 = b * block, k1 = std::min(K, k0 + block);
      // Bytes are multiplied with a bias, which 4-bit weights have in memory.
      kernels.repack({q.bits, four != kInt8, w, ldw, features, k0, k1 - k0}, words);
      // Scales of 32 weights are a fifth of what is read. Each block prefetches its share of the
      // next panel's.
      const char* next_scale = static_cast<const char*>(codes.scale) +
                               feature(std::min(i + 1, count - 1)) * codes.ld_scale;
      for (int64_t f = P * b / k_blocks; groups > 1 && f < P * (b + 1) / k_blocks; ++f) {
        for (int64_t byte = 0; byte < codes.ld_scale; byte += 64) {
          __builtin_prefetch(next_scale + f * codes.ld_scale + byte, 0, 2);
        }
      }
      // A call takes what is whole groups, or a part of one; of bytes all, since their depth is a
      // multiple of every size of a group.
      for (int64_t begin = k0, end; begin < k1; begin = end) {
        const int64_t whole = (k1 - begin) / group;
        const bool many = begin % group == 0 && whole > 0;
        end = many ? begin + whole * group : std::min(k1, (begin / group + 1) * group);
        const int64_t runs = many ? whole : 1, steps = ceil_div((end - begin) / runs, word);
        for (int64_t r = 0; r < blocks; ++r) {
          const int64_t r0 = tile_rows.begin(r), r1 = tile_rows.begin(r + 1);
          const float* rows = a + (b * m + r0) * kLda;
          const float* codes = rows + (begin - k0) / kStep;
          const uint32_t* panel = words + (begin - k0) / word * P;
          const float* run_scales = scales + begin / group * P;
          const char* ahead = next + begin / word * P * 4;
          int64_t prefetch_step = ahead_step;
          if constexpr (kInt8) {
            prefetch_step = ceil_div(P * q.bits / 16, blocks);
            ahead += r * ceil_div<int64_t>(runs * steps, q.bits) * prefetch_step * 64;
          } else {
            ahead += r * runs * steps * P / 16 * ahead_step;
          }
          tiles[r1 - r0 - 1]({runs,
                              steps,
                              codes,
                              rows + kDepth,
                              panel,
                              run_scales,
                              offsets != nullptr ? offsets + begin / group * P : nullptr,
                              {sum + r0 * ld_sum, ld_sum, begin > 0},
                              ahead,
                              prefetch_step});
        }
      }
    }
    if constexpr (!kInt8) {
      for (int64_t t = 0; t < m; ++t) std::memcpy(c + t * ldc, sums + t * P, sizeof(float) * P);
    }
    // The last panel of the last segment of a part.
    const bool last = (i + 1) % d.segments == 0;
    if (last && (column + P - part_begin == part || i + 1 == count)) {
      const int64_t columns = std::min(part, n - part_begin);
      for (int64_t t = 0; t < m; t += parts) {
        float* row = tile + t * ldc;
        if (parts == 2) row_kernels<float>().axpy(DType::kFloat32, row + ldc, 1.0f, row, ldc);
        fn(it.expert, it.row_begin + t / parts, it.feature_begin + part_begin, columns, row,
           row + part);
      }
    }
  }
}

}  // namespace moe_ops::cpu
