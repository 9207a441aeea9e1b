// The grouped product of e4m3 operands. Blocks of 128 steps of k are products of the codes, which
// float32 and bfloat16 hold exactly, in an accumulator of their own; scaled, they are added to the
// sums. Few rows read weights as they lie (dot); more rows go through the register tiles: weight
// rows, widened once a block of tokens, are the broadcast side, tokens the vectors.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/gemm/plan.h"
#include "cpu/runtime/batch_invariant.h"
#include "moe_ops/grouped_gemm_fp8.h"

namespace moe_ops::cpu {

// Most rows of an expert for which every weight is widened anew for each kFp8DotTokens of them.
constexpr int64_t kFp8DotRows = 4;
// Width of such an item, as that of products of integers.
constexpr int64_t kFp8DotFeatures = 2048;

struct Fp8Desc {
  const int64_t* expert_offsets;
  int64_t num_experts;
  int64_t features;          // per segment
  int segments = 1;          // segment s starts at row s * features of b
  int64_t feature_unit = 1;  // cuts between items fall on multiples of this
  int64_t in_features;
  Fp8Rows a;
  Fp8Matrices b;
  // As in GemmDesc.
  bool invariant = batch_invariant();

  int64_t blocks() const { return ceil_div(in_features, kFp8Block); }
  const uint8_t* row(int64_t r) const {
    return a.data + (a.index != nullptr ? a.index[r] : r) * a.stride;
  }
  const float* row_scale(int64_t r) const {
    return a.scale + (a.index != nullptr ? a.index[r] : r) * a.scale_stride;
  }
  const uint8_t* weight(int64_t e, int64_t o) const {
    return b.data + e * b.stride_e + o * b.stride_o;
  }
  const float* weight_scale(int64_t e, int64_t o) const {
    return b.scale + e * b.scale_stride_e + o / kFp8Block * b.scale_stride_o;
  }
};

struct Fp8Item {
  int64_t expert, row_begin, row_end, feature_begin, feature_end;
};

inline std::vector<Fp8Item> fp8_items(const Fp8Desc& d, const Kernels<float>& k, int num_threads) {
  const int64_t E = d.num_experts, total = d.features * d.segments;
  int64_t active = 0;
  for (int64_t e = 0; e < E; ++e) active += d.expert_offsets[e + 1] > d.expert_offsets[e];
  std::vector<Fp8Item> items;
  if (d.features == 0) return items;
  for (int64_t e = 0; e < E; ++e) {
    const int64_t begin = d.expert_offsets[e], end = d.expert_offsets[e + 1];
    if (begin == end) continue;
    const bool few = end - begin <= kFp8DotRows;
    const int64_t row_blocks = ceil_div(end - begin, kRowBlock);
    const int64_t rows = balanced(end - begin, kRowBlock, k.lanes);
    int64_t feature_blocks = ceil_div(total, few ? kFp8DotFeatures : kPanelFeatureBlock);
    if (num_threads > 1) {
      const int64_t wanted = ceil_div<int64_t>(8 * num_threads, active * row_blocks);
      feature_blocks = std::max(feature_blocks, std::min(wanted, std::max<int64_t>(1, total / 64)));
    }
    const int64_t features =
        balanced(d.features, std::max<int64_t>(1, ceil_div(d.features, feature_blocks)),
                 std::max<int64_t>(d.feature_unit, 4));
    for (int64_t f = 0; f < d.features; f += features) {
      for (int64_t r = begin; r < end; r += rows) {
        items.push_back({e, r, std::min(end, r + rows), f, std::min(d.features, f + features)});
      }
    }
  }
  return items;
}

// The codes of an item's rows as numbers, `ldx` apart with zeros at their ends, and their scales.
inline void decode_rows(const Fp8Desc& d, const Kernels<float>& k, const Fp8Item& it, float* x,
                        int64_t ldx, const float** x_scale) {
  const int64_t K = d.in_features;
  for (int64_t t = 0; t < it.row_end - it.row_begin; ++t) {
    k.fp8.decode(d.row(it.row_begin + t), x + t * ldx, K);
    std::fill(x + t * ldx + K, x + (t + 1) * ldx, 0.0f);
    x_scale[t] = d.row_scale(it.row_begin + t);
  }
}

template <class Epilogue>
void fp8_dot_item(const Fp8Desc& d, const Kernels<float>& k, const Fp8Item& it,
                  const Epilogue& fn) {
  const int64_t m = it.row_end - it.row_begin, n = it.feature_end - it.feature_begin;
  const int64_t K = d.in_features, ldx = round_up<int64_t>(K, k.lanes);
  ScratchScope scratch;
  float* x = scratch.take<float>(Scratch::kTokens, m * ldx);
  const float* x_scale[kFp8DotRows];
  decode_rows(d, k, it, x, ldx, x_scale);
  const int64_t ldo = n * d.segments;
  float* out = scratch.take<float>(Scratch::kTile, m * ldo);
  // Four long streams, as in dot_item.
  const int64_t quarter = n / kDotFeatures;
  for (int s = 0; s < d.segments; ++s) {
    for (int64_t f = 0; f < quarter + n % kDotFeatures; ++f) {
      const bool four = f < quarter;
      const int64_t first = four ? f : f - quarter + quarter * kDotFeatures;
      const int64_t step = four ? quarter : 1;
      const int64_t feature = s * d.features + it.feature_begin + first;
      const float* w_scale[kDotFeatures];
      for (int64_t i = 0; i < (four ? kDotFeatures : 1); ++i) {
        w_scale[i] = d.weight_scale(it.expert, feature + i * step);
      }
      for (int64_t t = 0; t < m; t += kFp8DotTokens) {
        k.fp8.dot(four ? kDotFeatures : 1,
                  static_cast<int>(std::min<int64_t>(kFp8DotTokens, m - t)), K,
                  d.weight(it.expert, feature), step * d.b.stride_o, w_scale, x + t * ldx, ldx,
                  x_scale + t, out + t * ldo + s * n + first, ldo, step);
      }
    }
  }
  for (int64_t t = 0; t < m; ++t) {
    fn(it.expert, it.row_begin + t, it.feature_begin, n, out + t * ldo, out + t * ldo + n);
  }
}

// The same sums, to the bit, for more rows: each four rows of weights are widened once.
template <class Epilogue>
void fp8_strip_item(const Fp8Desc& d, const Kernels<float>& k, const Fp8Item& it,
                    const Epilogue& fn) {
  const int64_t m = it.row_end - it.row_begin, n = it.feature_end - it.feature_begin;
  const int64_t K = d.in_features, ldx = round_up<int64_t>(K, k.lanes) + kPanelPad / 2;
  ScratchScope scratch;
  float* x = scratch.take<float>(Scratch::kTokens, m * ldx);
  float* w = scratch.take<float>(Scratch::kPackB, kDotFeatures * ldx);
  const float* x_scale[kRowBlock];
  decode_rows(d, k, it, x, ldx, x_scale);
  const int64_t ldo = n * d.segments;
  float* out = scratch.take<float>(Scratch::kTile, m * ldo);
  for (int s = 0; s < d.segments; ++s) {
    for (int64_t f = 0; f < n; f += kDotFeatures) {
      const int64_t features = std::min<int64_t>(kDotFeatures, n - f);
      const float* w_scale[kDotFeatures];
      for (int64_t i = 0; i < features; ++i) {
        const int64_t feature = s * d.features + it.feature_begin + f + i;
        k.fp8.decode(d.weight(it.expert, feature), w + i * ldx, K);
        w_scale[i] = d.weight_scale(it.expert, feature);
      }
      for (int64_t t = 0; t < m; t += kFp8DotTokens) {
        k.fp8.dot_wide(static_cast<int>(features),
                       static_cast<int>(std::min<int64_t>(kFp8DotTokens, m - t)), K, w, ldx,
                       w_scale, x + t * ldx, ldx, x_scale + t, out + t * ldo + s * n + f, ldo, 1);
      }
    }
  }
  for (int64_t t = 0; t < m; ++t) {
    fn(it.expert, it.row_begin + t, it.feature_begin, n, out + t * ldo, out + t * ldo + n);
  }
}

template <bool kPairs, class Epilogue>
void fp8_tile_item(const Fp8Desc& d, const Kernels<float>& k, const Fp8Item& it,
                   const Epilogue& fn) {
  constexpr int64_t kStep = kPairs ? 2 : 1;  // steps of k in an element
  constexpr int64_t kBlock = kFp8Block / kStep;
  const auto& tiles = kPairs ? k.pair_row_a : k.row_a;
  const int64_t W = k.lanes, K = d.in_features, k_blocks = d.blocks();
  const int64_t m = it.row_end - it.row_begin, n = it.feature_end - it.feature_begin;
  const int64_t total = n * d.segments;
  const int64_t padded_m = round_up(m, W), padded_n = round_up(total, W);
  // Blocks of k that stay packed while weights are read: runs of up to 1 KiB of each weight row.
  const int64_t block_bytes = padded_m * kBlock * static_cast<int64_t>(sizeof(float));
  const int64_t chunk = std::clamp<int64_t>(kWholeDepthBytes / block_bytes, 1, k_blocks);
  ScratchScope scratch;
  Carver carver(scratch, Scratch::kPackA,
                4 * (kMaxMr * kLda + kMaxMr * 2 * W + chunk * padded_m + kMaxMr) + 4 * 64);
  float* a = carver.take<float>(kMaxMr * kLda);
  float* partial = carver.take<float>(kMaxMr * 2 * W);
  float* token_scale = carver.take<float>(chunk * padded_m);
  float* weight_scale = carver.take<float>(kMaxMr);
  float* panels = scratch.take<float>(Scratch::kPackB, chunk * padded_m * kBlock);
  float* rows = scratch.take<float>(Scratch::kTokens, std::max(2 * W * kLda, padded_m * padded_n));
  float* sums = scratch.take<float>(Scratch::kTile, padded_n * padded_m);
  // Elements of block b of k, and codes as elements; what the last pair lacks is zero.
  const auto depth = [&](int64_t b) {
    return ceil_div(std::min(kFp8Block, K - b * kFp8Block), kStep);
  };
  const auto widen = [&](const uint8_t* codes, int64_t b, float* dst) {
    const int64_t count = std::min(kFp8Block, K - b * kFp8Block);
    if constexpr (kPairs) {
      auto* halves = reinterpret_cast<uint16_t*>(dst);
      k.fp8.decode_bf16(codes + b * kFp8Block, halves, count);
      if (count % 2 != 0) halves[count] = 0;
    } else {
      k.fp8.decode(codes + b * kFp8Block, dst, count);
    }
  };
  const int64_t mr = padded_m == W ? k.mr1 : k.mr2;
  const int64_t blocks = ceil_div(total, mr);
  const EvenParts tile_rows(total, blocks);
  const auto feature_of = [&](int64_t i) { return i / n * d.features + it.feature_begin + i % n; };
  for (int64_t b0 = 0; b0 < k_blocks; b0 += chunk) {
    const int64_t b1 = std::min(k_blocks, b0 + chunk);
    for (int64_t b = b0; b < b1; ++b) {
      for (int64_t t = 0; t < padded_m; ++t) {
        token_scale[(b - b0) * padded_m + t] = t < m ? d.row_scale(it.row_begin + t)[b] : 0.0f;
      }
      for (int64_t t0 = 0; t0 < padded_m; t0 += 2 * W) {
        const int64_t width = std::min(2 * W, padded_m - t0);
        for (int64_t t = 0; t < width; ++t) {
          const int64_t r = it.row_begin + t0 + t;
          if (r < it.row_end) {
            widen(d.row(r), b, rows + t * kLda);
          } else {
            std::fill(rows + t * kLda, rows + t * kLda + depth(b), 0.0f);
          }
        }
        k.transpose(rows, kLda, width, depth(b),
                    panels + (b - b0) * padded_m * kBlock + t0 * depth(b), width);
      }
    }
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t i0 = tile_rows.begin(i), i1 = tile_rows.begin(i + 1);
      for (int64_t b = b0; b < b1; ++b) {
        const int64_t kc = depth(b);
        for (int64_t f = i0; f < i1; ++f) {
          widen(d.weight(it.expert, feature_of(f)), b, a + (f - i0) * kLda);
          weight_scale[f - i0] = d.weight_scale(it.expert, feature_of(f))[b];
        }
        // The tiles fetch the weights of the next step: the next block of k, or the next rows.
        TileHints next;
        const bool last = b + 1 == b1;
        const int64_t next_i = last ? i1 : i0, next_b = last ? b0 : b + 1;
        if (next_i < total) {
          next.base = reinterpret_cast<const char*>(d.weight(it.expert, feature_of(next_i)) +
                                                    next_b * kFp8Block);
          next.stride = d.b.stride_o;
          next.rows = std::min(mr, n - next_i % n);
          next.bytes = std::min(kFp8Block, K - next_b * kFp8Block);
          next.spread(std::max<int64_t>(1, kc / kPrefetchStep) * ceil_div(padded_m, 2 * W),
                      k.fetch_halves);
        }
        for (int64_t t0 = 0; t0 < padded_m; t0 += 2 * W) {
          const int64_t width = std::min(2 * W, padded_m - t0);
          tiles[width / W - 1][i1 - i0 - 1](kc, a, panels + (b - b0) * padded_m * kBlock + t0 * kc,
                                            partial, width, false, next);
          k.fp8.promote(i1 - i0, width, partial, width, weight_scale,
                        token_scale + (b - b0) * padded_m + t0, sums + i0 * padded_m + t0, padded_m,
                        b > 0);
        }
      }
    }
  }
  k.transpose(sums, padded_m, padded_n, m, rows, padded_n);
  for (int64_t t = 0; t < m; ++t) {
    fn(it.expert, it.row_begin + t, it.feature_begin, n, rows + t * padded_n,
       rows + t * padded_n + n);
  }
}

// Epilogue as in stream.h.
template <class Epilogue>
void run_fp8_item(const Fp8Desc& d, const Kernels<float>& k, const Fp8Item& it,
                  const Epilogue& fn) {
  if (d.in_features == 0) {
    const int64_t n = it.feature_end - it.feature_begin;
    ScratchScope scratch;
    float* zeros = scratch.take<float>(Scratch::kTile, 2 * n);
    for (int64_t r = it.row_begin; r < it.row_end; ++r) {
      std::fill(zeros, zeros + 2 * n, 0.0f);
      fn(it.expert, r, it.feature_begin, n, zeros, zeros + n);
    }
    return;
  }
  const int64_t expert_rows = d.expert_offsets[it.expert + 1] - d.expert_offsets[it.expert];
  if (expert_rows <= kFp8DotRows) return fp8_dot_item(d, k, it, fn);
  if (d.invariant) return fp8_strip_item(d, k, it, fn);
  const bool pairs = k.pairs && expert_rows <= k.pairs_max_rows;
  pairs ? fp8_tile_item<true>(d, k, it, fn) : fp8_tile_item<false>(d, k, it, fn);
}

inline double fp8_cost(const Fp8Desc& d) {
  return static_cast<double>(d.expert_offsets[d.num_experts]) *
         static_cast<double>(d.features * d.segments) *
         (static_cast<double>(d.in_features) / 16 + 1);
}

}  // namespace moe_ops::cpu
