// The blocked loops over the kernels of kernels.h: which rows, features and panels one work item
// covers. NOTES.md beside this file gives the arithmetic of the block sizes.
//
// The ways through, all with the sum over k in increasing order inside one accumulator:
//   dot    few rows, weights dense along k: stream each weight row once, vectors along k.
//   nt     weights dense along k: weight rows are the broadcast side and tokens the vector side, so
//          only the (small) block of x is transposed and weights are copied as they lie.
//   nn     weights dense along features: token rows are the broadcast side, weight rows the
//          vectors.
//   rank         few rows, weights dense along features: stream weight rows, four steps of k at a
//   time. panels       weights packed ahead of time (pack.h): like nn, without any copying of
//   weights. pair_*       the last three for bfloat16 weights where the level multiplies pairs of
//   bfloat16: tokens
//                are rounded to it, an element is two adjacent k, and K counts pairs.
//   amx_panels   the same for bfloat16 on AMX.
//   amx_rows     bfloat16 weights dense along k on AMX: 16 weight rows are an operand as they lie.
//   amx_nn       bfloat16 weights dense along features on AMX: packed in pairs of rows block by
//   block.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/pack.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"
#include "moe_ops/grouped_gemm.h"

namespace moe_ops::cpu {

// Most token rows of one item that copies weights: a 192-deep block of them is 96 KiB of L2.
constexpr int64_t kRowBlock = 128;
// Tokens of an item whose rows take no more than this stay packed for their whole depth, and the
// weights of a block of features are read from end to end: long streams, which the memory
// delivers twice as fast as pieces of 192.
constexpr int64_t kWholeDepthBytes = int64_t{512} << 10;
// The same where weights are not copied. Their rows are 1 MiB of fp32 at 2048 features.
constexpr int64_t kPanelRowBlock = 128;
// Features (of all segments together) of one item: a multiple of every tile height.
constexpr int64_t kFeatureBlock = 252;
// The same for panels, in whole panels of every level, and for AMX, whose items first rearrange
// their tokens: the more features share that work the better.
constexpr int64_t kPanelFeatureBlock = 256;
constexpr int64_t kAmxFeatureBlock = 2048;
// Elements of the accumulate type between panels packed for one product: two lines, so that what a
// row of weights writes into all panels does not meet in one L1 set.
constexpr int64_t kPanelPad = 32;
// Width of an item of nn, and the size of the blocks that it copies: rows of 4 KiB are streams for
// the memory, rows of 1 KiB are not, and 256 KiB leave room for the sums in an L2.
constexpr int64_t kNnFeatures = 1024;
constexpr int64_t kNnBlockBytes = int64_t{256} << 10;
// Depth and width of the blocks of weights that amx_nn packs: 256 x 512 in bfloat16 are 256 KiB of
// L2, 256 steps of k amortise loading and storing the sums, and 512 columns are runs of 1 KiB.
constexpr int64_t kAmxKc = 256;
constexpr int64_t kAmxNnFeatures = 512;
// How far ahead of itself a tile asks for panels, from memory into L2. 8 KiB are 200 ns at 40 GB/s,
// twice the latency of a DRAM; the value for AMX was measured on another machine.
constexpr int64_t kBytesAhead = 8192;
constexpr int64_t kAmxBytesAhead = 2048;
// Fewest rows of an expert that AMX takes. Below, reading the weights is all that counts, and the
// other kernels keep the tokens in fp32.
constexpr int64_t kAmxMinRows = 3;
// Most rows of an expert for which weights dense along features are not copied. Each row passes its
// sums through registers once in four steps of k.
constexpr int64_t kRankMaxRows = 8;

// Weight gradients from this size on will not be found in a cache again by whoever reads them.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

inline const void* row_of(const Rows& rows, int64_t r) {
  const int64_t i = rows.index != nullptr ? rows.index[r] : r;
  return static_cast<const char*>(rows.data) + i * rows.stride * dtype_size(rows.type);
}

inline const char* element(const void* base, DType type, int64_t offset) {
  return static_cast<const char*>(base) + offset * dtype_size(type);
}

// Length of the parts when n is cut into equal ones of at most `most`, each a multiple of `unit`.
inline int64_t balanced(int64_t n, int64_t most, int64_t unit) {
  const int64_t parts = ceil_div(n, most);
  return std::min(n, round_up(ceil_div(n, parts), unit));
}

// What one product computes. Features come in one or two segments of `features` each: two when the
// gate and up halves of a fused projection are wanted side by side.
template <class T>
struct GemmDesc {
  const int64_t* expert_offsets;
  int64_t num_experts;
  int64_t features;          // per segment
  int segments = 1;          // segment s starts at row s * features of b
  int64_t feature_unit = 1;  // cuts between items fall on multiples of this
  int64_t in_features;
  Rows a;
  const T* a_scale = nullptr;  // [rows] or nullptr
  ExpertMatrices b;
};

enum class Path : int {
  kZero,
  kDot,
  kRank,
  kNt,
  kNn,
  kPanels,
  kPairNt,
  kPairNn,
  kPairPanels,
  kAmxPanels,
  kAmxRows,
  kAmxNn
};

template <class T>
Path path_of(const GemmDesc<T>& d, const Kernels<T>& k, int64_t expert_rows) {
  if (d.in_features == 0) return Path::kZero;
  // Products of bfloat16 round tokens to it, which loses nothing unless they were scaled before.
  const bool pairs = k.pairs && d.b.type == DType::kBFloat16 && d.a_scale == nullptr;
  const bool amx = pairs && k.amx_panel != nullptr && expert_rows >= kAmxMinRows;
  if (d.b.panels != nullptr) {
    return amx ? Path::kAmxPanels : pairs ? Path::kPairPanels : Path::kPanels;
  }
  if (d.b.stride_k != 1 && expert_rows <= kRankMaxRows) return Path::kRank;
  if (d.b.stride_k != 1) return amx ? Path::kAmxNn : pairs ? Path::kPairNn : Path::kNn;
  if (amx && d.in_features % 32 == 0) return Path::kAmxRows;
  // Every dot_tokens rows widen half types again.
  const bool half = sizeof(T) == 4 && d.b.type != DType::kFloat32;
  if (expert_rows <= (half ? 2 * k.dot_tokens : k.dot_max_rows)) return Path::kDot;
  return pairs && d.in_features % 2 == 0 ? Path::kPairNt : Path::kNt;
}

struct GemmItem {
  Path path;
  int64_t expert, row_begin, row_end, feature_begin, feature_end;
};

template <class T>
std::vector<GemmItem> gemm_items(const GemmDesc<T>& d, const Kernels<T>& k, int num_threads) {
  const int64_t E = d.num_experts, total = d.features * d.segments;
  int64_t active = 0;
  for (int64_t e = 0; e < E; ++e) active += d.expert_offsets[e + 1] > d.expert_offsets[e];
  std::vector<GemmItem> items;
  if (d.features == 0) return items;
  for (int64_t e = 0; e < E; ++e) {
    const int64_t begin = d.expert_offsets[e], end = d.expert_offsets[e + 1];
    if (begin == end) continue;
    const Path path = path_of(d, k, end - begin);
    int64_t most_rows = kRowBlock, most_features = kFeatureBlock, row_unit = 1;
    int64_t unit = 2 * k.lanes;
    switch (path) {
      case Path::kAmxRows:
      case Path::kAmxPanels:
        most_features = kAmxFeatureBlock;
        most_rows = path == Path::kAmxRows ? 16 * kAmxTokenTiles : kPanelRowBlock;
        row_unit = 16;
        break;
      case Path::kAmxNn:
        most_features = kAmxNnFeatures;
        most_rows = kPanelRowBlock;
        row_unit = 16;
        break;
      case Path::kPanels:
      case Path::kPairPanels:
        most_features = kPanelFeatureBlock;
        most_rows = kPanelRowBlock;
        break;
      case Path::kNt:
      case Path::kPairNt:
        row_unit = k.lanes;
        unit = 4;
        break;
      case Path::kDot:
        unit = 4;
        break;
      case Path::kRank:
      case Path::kNn:
      case Path::kPairNn:
        most_features = kNnFeatures;
        break;
      default:
        break;
    }
    const int64_t row_blocks = ceil_div(end - begin, most_rows);
    const int64_t rows = balanced(end - begin, most_rows, row_unit);
    // Enough items that the last ones to finish do not leave the other threads idle for long.
    int64_t feature_blocks = ceil_div(total, most_features);
    if (num_threads > 1) {
      const int64_t wanted = ceil_div<int64_t>(8 * num_threads, active * row_blocks);
      feature_blocks = std::max(feature_blocks, std::min(wanted, std::max<int64_t>(1, total / 64)));
    }
    const int64_t features =
        balanced(d.features, std::max<int64_t>(1, ceil_div(d.features, feature_blocks)),
                 std::max(d.feature_unit, unit));
    for (int64_t f = 0; f < d.features; f += features) {
      for (int64_t r = begin; r < end; r += rows) {
        items.push_back(
            {path, e, r, std::min(end, r + rows), f, std::min(d.features, f + features)});
      }
    }
  }
  return items;
}

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

// src * scale as bfloat16; `buffer` has room for n floats.
inline void load_bf16_row(const Kernels<float>& k, DType type, const void* src, int64_t n,
                          float scale, float* buffer, uint16_t* dst) {
  if (type == DType::kBFloat16 && scale == 1.0f) {
    std::memcpy(dst, src, static_cast<size_t>(n) * 2);
  } else if (type == DType::kFloat32 && scale == 1.0f) {
    k.store_row(DType::kBFloat16, static_cast<const float*>(src), dst, n);
  } else {
    k.load_row(type, src, buffer, n, scale);
    k.store_row(DType::kBFloat16, buffer, dst, n);
  }
}

// Row r of the tokens, kc elements from k0 on; of pairs, when an element is one. What the last pair
// lacks is zero.
template <bool kPairs, class T>
void load_tokens(const GemmDesc<T>& d, const Kernels<T>& k, int64_t r, int64_t k0, int64_t kc,
                 T* dst) {
  if constexpr (kPairs) {
    auto* halves = reinterpret_cast<uint16_t*>(dst);
    const int64_t n = std::min(2 * kc, d.in_features - 2 * k0);
    load_bf16_row(k, d.a.type, element(row_of(d.a, r), d.a.type, 2 * k0), n, 1.0f, nullptr, halves);
    if (n < 2 * kc) halves[n] = 0;
  } else {
    k.load_row(d.a.type, element(row_of(d.a, r), d.a.type, k0), dst, kc,
               d.a_scale ? d.a_scale[r] : T(1));
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

template <bool kPairs, class T, class Epilogue>
void nt_item(const GemmDesc<T>& d, const Kernels<T>& k, const GemmItem& it, const Epilogue& fn) {
  const int64_t W = k.lanes, K = kPairs ? d.in_features / 2 : d.in_features;
  const int64_t size = kPairs ? sizeof(T) : dtype_size(d.b.type);
  const auto& tiles = kPairs ? k.pair_row_a : k.row_a;
  const int64_t m = it.row_end - it.row_begin;
  const int64_t n = it.feature_end - it.feature_begin;
  const int64_t total = n * d.segments;
  const int64_t padded_m = round_up(m, W);
  const int64_t padded_n = round_up(total, W);
  const bool whole = padded_m * K * static_cast<int64_t>(sizeof(T)) <= kWholeDepthBytes;
  T* a = scratch<T>(Scratch::kPackA, kMaxMr * kLda);
  T* panels = scratch<T>(Scratch::kPackB, padded_m * (whole ? K : kKc));
  T* rows = scratch<T>(Scratch::kTokens, std::max(2 * W * kLda, padded_m * padded_n));
  T* tile = scratch<T>(Scratch::kTile, padded_n * padded_m);
  const char* w = element(d.b.data, d.b.type, it.expert * d.b.stride_e);
  const int64_t row_bytes = d.b.stride_o * dtype_size(d.b.type);
  const int64_t mr = padded_m == W ? k.mr1 : k.mr2;
  const int64_t blocks = ceil_div(total, mr);
  // Row i of the item's features, from k0 on.
  const auto weight_row = [&](int64_t i, int64_t k0) {
    const int64_t feature = i / n * d.features + it.feature_begin + i % n;
    return w + feature * row_bytes + k0 * size;
  };
  // x from k0 on, one panel of [kc][W or 2W] after the other.
  const auto pack_tokens = [&](int64_t k0, T* dst) {
    const int64_t kc = std::min(kKc, K - k0);
    for (int64_t t0 = 0; t0 < padded_m; t0 += 2 * W) {
      const int64_t width = std::min(2 * W, padded_m - t0);
      for (int64_t t = 0; t < width; ++t) {
        const int64_t r = it.row_begin + t0 + t;
        if (r < it.row_end) {
          load_tokens<kPairs>(d, k, r, k0, kc, rows + t * kLda);
        } else {
          std::fill(rows + t * kLda, rows + t * kLda + kc, T(0));
        }
      }
      k.transpose(rows, kLda, width, kc, dst + t0 * kc, width);
    }
  };
  // Block b of the features at k0; its tiles fetch the weights of block next_b at next_k.
  const auto run_block = [&](int64_t b, int64_t k0, const T* x, int64_t next_b, int64_t next_k) {
    const int64_t kc = std::min(kKc, K - k0);
    const int64_t i0 = total * b / blocks, i1 = total * (b + 1) / blocks;
    for (int64_t i = i0; i < i1; ++i) {
      T* dst = a + (i - i0) * kLda;
      if constexpr (kPairs) {
        std::memcpy(dst, weight_row(i, k0), static_cast<size_t>(kc) * sizeof(T));
      } else {
        k.load_row(d.b.type, weight_row(i, k0), dst, kc, T(1));
      }
    }
    TileHints next;
    if (next_b < blocks && next_k < K) {
      const int64_t next_i = total * next_b / blocks;
      next.base = weight_row(next_i, next_k);
      next.stride = row_bytes;
      next.rows = std::min(mr, n - next_i % n);
      next.bytes = std::min(kKc, K - next_k) * size;
      next.spread(kc / kPrefetchStep * ceil_div(padded_m, 2 * W));
    }
    for (int64_t t0 = 0; t0 < padded_m; t0 += 2 * W) {
      const int nv = padded_m - t0 > W ? 2 : 1;
      tiles[nv - 1][i1 - i0 - 1](kc, a, x + t0 * kc, tile + i0 * padded_m + t0, padded_m, k0 > 0,
                                 next);
    }
  };
  if (whole) {
    for (int64_t k0 = 0; k0 < K; k0 += kKc) pack_tokens(k0, panels + k0 * padded_m);
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t k0 = 0; k0 < K; k0 += kKc) {
        const bool last = k0 + kKc >= K;
        run_block(b, k0, panels + k0 * padded_m, last ? b + 1 : b, last ? 0 : k0 + kKc);
      }
    }
  } else {
    for (int64_t k0 = 0; k0 < K; k0 += kKc) {
      pack_tokens(k0, panels);
      for (int64_t b = 0; b < blocks; ++b) {
        const bool last = b + 1 == blocks;
        run_block(b, k0, panels, last ? 0 : b + 1, last ? k0 + kKc : k0);
      }
    }
  }
  k.transpose(tile, padded_m, padded_n, m, rows, padded_n);
  for (int64_t t = 0; t < m; ++t) {
    fn(it.expert, it.row_begin + t, it.feature_begin, n, rows + t * padded_n,
       rows + t * padded_n + n);
  }
}

template <bool kPairs, class T, class Epilogue>
void nn_item(const GemmDesc<T>& d, const Kernels<T>& k, const GemmItem& it, const Epilogue& fn) {
  constexpr int64_t kRows = kPairs ? 2 : 1;  // weight rows of an element
  const int64_t W = k.lanes, K = ceil_div(d.in_features, kRows);
  const int64_t m = it.row_end - it.row_begin;
  const int64_t n = it.feature_end - it.feature_begin;
  const int64_t padded_n = round_up(n, kPairs ? 2 * W : W);
  const int64_t ldc = padded_n * d.segments;
  T* a = scratch<T>(Scratch::kPackA, kRowBlock * kLda);
  const int64_t depth =
      std::clamp<int64_t>(kNnBlockBytes / (padded_n * static_cast<int64_t>(sizeof(T))), 16, kKc);
  T* panels = scratch<T>(Scratch::kPackB, ceil_div(padded_n, 2 * W) * (2 * W * depth + kPanelPad));
  T* tile = scratch<T>(Scratch::kTile, m * ldc);
  const auto& tiles = kPairs ? k.pair_row_a : k.row_a;
  const int64_t blocks = ceil_div<int64_t>(m, k.mr2);
  const void* w_rows[kRows * kKc];

  for (int64_t k0 = 0; k0 < K; k0 += depth) {
    const int64_t kc = std::min(depth, K - k0), stride = 2 * W * kc + kPanelPad;
    for (int64_t t = 0; t < m; ++t)
      load_tokens<kPairs>(d, k, it.row_begin + t, k0, kc, a + t * kLda);
    for (int64_t kk = 0; kk < kRows * kc; ++kk) {
      const int64_t row = kRows * k0 + kk;
      w_rows[kk] = row < d.in_features
                       ? element(d.b.data, d.b.type,
                                 it.expert * d.b.stride_e + row * d.b.stride_k + it.feature_begin)
                       : nullptr;
    }
    for (int s = 0; s < d.segments; ++s) {
      if constexpr (kPairs) {
        k.pack_pairs(reinterpret_cast<const uint16_t* const*>(w_rows), s * d.features, 2 * kc, n,
                     reinterpret_cast<uint16_t*>(panels), 2 * stride);
      } else {
        k.pack_panels(d.b.type, w_rows, s * d.features * dtype_size(d.b.type), kc, n, nullptr,
                      panels, stride);
      }
      // These tiles fetch the weights of the next block: the other segment, or the next k.
      const bool same_k = s + 1 < d.segments;
      const int64_t next_k = kRows * (same_k ? k0 : k0 + depth);
      TileHints next;
      if (next_k < d.in_features) {
        next.base = element(w_rows[0], d.b.type,
                            same_k ? (s + 1) * d.features : kRows * depth * d.b.stride_k);
        next.stride = d.b.stride_k * dtype_size(d.b.type);
        next.rows = std::min(kRows * depth, d.in_features - next_k);
        next.bytes = n * dtype_size(d.b.type);
        next.spread(kc / kPrefetchStep * blocks * ceil_div(padded_n, 2 * W));
      }
      for (int64_t j = 0; j < padded_n; j += 2 * W) {
        const int nv = padded_n - j > W ? 2 : 1;
        for (int64_t b = 0; b < blocks; ++b) {
          const int64_t i0 = m * b / blocks, i1 = m * (b + 1) / blocks;
          tiles[nv - 1][i1 - i0 - 1](kc, a + i0 * kLda, panels + j / (2 * W) * stride,
                                     tile + i0 * ldc + s * padded_n + j, ldc, k0 > 0, next);
        }
      }
    }
  }
  for (int64_t t = 0; t < m; ++t) {
    fn(it.expert, it.row_begin + t, it.feature_begin, n, tile + t * ldc, tile + t * ldc + padded_n);
  }
}

template <bool kPairs, class T, class Epilogue>
void panel_item(const GemmDesc<T>& d, const Kernels<T>& k, const GemmItem& it, const Epilogue& fn) {
  const PanelLayout layout =
      panel_layout(d.b.type, d.features * d.segments, d.in_features, d.segments);
  const int64_t P = layout.width;
  // Bytes of a panel for one element of a, and elements that a tile takes in one step.
  const int64_t size = P * (kPairs ? static_cast<int64_t>(sizeof(T)) : dtype_size(d.b.type));
  const int64_t step = size < P * static_cast<int64_t>(sizeof(T)) ? 2 : 1;
  const int64_t m = it.row_end - it.row_begin;
  const int64_t n = it.feature_end - it.feature_begin;
  const int64_t padded_n = round_up(n, P), ldc = padded_n * d.segments;
  const int64_t K = kPairs ? ceil_div<int64_t>(d.in_features, 2) : d.in_features;
  const int64_t depth = round_up(K, step), k_blocks = ceil_div(depth, kKc);
  T* a = scratch<T>(Scratch::kTokens, k_blocks * m * kLda);
  T* tile = scratch<T>(Scratch::kTile, m * ldc);
  for (int64_t t = 0; t < m; ++t) {
    for (int64_t b = 0; b < k_blocks; ++b) {
      T* dst = a + (b * m + t) * kLda;
      const int64_t kc = std::min(kKc, K - b * kKc);
      load_tokens<kPairs>(d, k, it.row_begin + t, b * kKc, kc, dst);
      if (b == k_blocks - 1 && depth > K) dst[kc] = T(0);
    }
  }
  const auto* tiles = kPairs ? k.pair_panel_tile : k.panel_tile[static_cast<int>(d.b.type)];
  const int64_t blocks = ceil_div<int64_t>(m, k.mr2);
  // Every tile asks for panels ahead of its own: the core's window is too short to compute and to
  // wait for memory at once. Several tiles on one block share the next block between them.
  const int64_t ahead_step = std::max<int64_t>(size * step / blocks, 2);
  const char* panel = static_cast<const char*>(d.b.panels) + it.expert * layout.expert_bytes() +
                      it.feature_begin / P * d.segments * layout.panel_bytes;
  for (int64_t j = 0; j < padded_n; j += P) {
    for (int s = 0; s < d.segments; ++s, panel += layout.panel_bytes) {
      for (int64_t b = 0; b < k_blocks; ++b) {
        const int64_t kc = std::min(kKc, depth - b * kKc);
        const char* block = panel + b * kKc * size;
        for (int64_t i = 0; i < blocks; ++i) {
          const int64_t i0 = m * i / blocks, i1 = m * (i + 1) / blocks;
          tiles[i1 - i0 - 1](
              kc, a + (b * m + i0) * kLda, block, tile + i0 * ldc + s * padded_n + j, ldc, b > 0,
              block + (blocks == 1 ? kBytesAhead : kc * size) + i * ahead_step * (kc / step),
              ahead_step);
        }
      }
    }
  }
  for (int64_t t = 0; t < m; ++t) {
    fn(it.expert, it.row_begin + t, it.feature_begin, n, tile + t * ldc, tile + t * ldc + padded_n);
  }
}

// The rows of an item as bfloat16, `ld` apart, with zeros in columns K to `depth` and in rows m to
// padded_m.
inline void load_bf16_rows(const GemmDesc<float>& d, const Kernels<float>& k, const GemmItem& it,
                           int64_t depth, int64_t padded_m, uint16_t* dst, int64_t ld) {
  const int64_t K = d.in_features, m = it.row_end - it.row_begin;
  for (int64_t t = 0; t < padded_m; ++t) {
    uint16_t* row = dst + t * ld;
    const int64_t valid = t < m ? K : 0;
    if (t < m) load_bf16_row(k, d.a.type, row_of(d.a, it.row_begin + t), K, 1.0f, nullptr, row);
    std::fill(row + valid, row + depth, uint16_t{0});
  }
}

template <class Epilogue>
void amx_panel_item(const GemmDesc<float>& d, const Kernels<float>& k, const GemmItem& it,
                    const Epilogue& fn) {
  const PanelLayout layout =
      panel_layout(d.b.type, d.features * d.segments, d.in_features, d.segments);
  const int64_t P = layout.width, depth = layout.depth;
  const int64_t m = it.row_end - it.row_begin, padded_m = round_up<int64_t>(m, 16);
  // A line more than the row keeps the 16 rows of a tile out of one L1 set.
  const int64_t lda = depth + 32;
  auto* a = scratch<uint16_t>(Scratch::kTokens, padded_m * lda);
  load_bf16_rows(d, k, it, depth, padded_m, a, lda);
  const char* panel = static_cast<const char*>(d.b.panels) + it.expert * layout.expert_bytes() +
                      it.feature_begin / P * d.segments * layout.panel_bytes;
  for (int64_t f = it.feature_begin; f < it.feature_end; f += kPanelFeatureBlock) {
    const int64_t n = std::min(kPanelFeatureBlock, it.feature_end - f);
    const int64_t padded_n = round_up(n, P), ldc = padded_n * d.segments;
    float* tile = scratch<float>(Scratch::kTile, padded_m * ldc);
    k.amx_begin();
    for (int64_t j = 0; j < padded_n; j += P) {
      for (int s = 0; s < d.segments; ++s, panel += layout.panel_bytes) {
        TileHints next;
        next.base = panel + kAmxBytesAhead;
        next.rows = 1;
        next.bytes = layout.panel_bytes;
        next.spread(depth / 32);
        for (int64_t t = 0; t < padded_m; t += 32) {
          k.amx_panel(depth / 32, a + t * lda, lda, padded_m - t > 16 ? 2 : 1,
                      reinterpret_cast<const uint16_t*>(panel), tile + t * ldc + s * padded_n + j,
                      ldc, false, next);
        }
      }
    }
    k.amx_end();
    for (int64_t t = 0; t < m; ++t) {
      fn(it.expert, it.row_begin + t, f, n, tile + t * ldc, tile + t * ldc + padded_n);
    }
  }
}

template <class Epilogue>
void amx_rows_item(const GemmDesc<float>& d, const Kernels<float>& k, const GemmItem& it,
                   const Epilogue& fn) {
  const int64_t K = d.in_features, m = it.row_end - it.row_begin;
  const int64_t padded_m = round_up<int64_t>(m, 16), token_tiles = padded_m / 16;
  // Pairs of k are 32-bit elements, so the transposition of floats puts 16 tokens side by side.
  auto* rows = scratch<uint16_t>(Scratch::kPackB, 16 * (K + 32));
  auto* x = scratch<uint16_t>(Scratch::kTokens, padded_m * K);
  for (int64_t t = 0; t < padded_m; t += 16) {
    GemmItem part = it;
    part.row_begin = it.row_begin + t;
    part.row_end = std::min(it.row_end, part.row_begin + 16);
    load_bf16_rows(d, k, part, K, 16, rows, K + 32);
    k.transpose(reinterpret_cast<const float*>(rows), (K + 32) / 2, 16, K / 2,
                reinterpret_cast<float*>(x + t * K), 16);
  }
  const auto* w =
      reinterpret_cast<const uint16_t*>(element(d.b.data, d.b.type, it.expert * d.b.stride_e));
  const int64_t chunk = kPanelFeatureBlock / d.segments;
  for (int64_t f = it.feature_begin; f < it.feature_end; f += chunk) {
    const int64_t n = std::min(chunk, it.feature_end - f);
    const int64_t padded_n = round_up<int64_t>(n, 16), ldo = padded_n * d.segments;
    float* tile = scratch<float>(Scratch::kTile, ldo * padded_m);
    float* out = scratch<float>(Scratch::kPackB, ldo * padded_m);
    k.amx_begin();
    for (int s = 0; s < d.segments; ++s) {
      for (int64_t i = 0; i < n; i += 16) {
        const uint16_t* src = w + (s * d.features + f + i) * d.b.stride_o;
        int64_t ldw = d.b.stride_o;
        if (n - i < 16) {  // A tile reads 16 rows; there may be no memory behind the last ones.
          auto* copy = scratch<uint16_t>(Scratch::kPackA, 16 * K);
          std::memset(copy, 0, static_cast<size_t>(16 * K) * 2);
          for (int64_t j = 0; j < n - i; ++j) {
            std::memcpy(copy + j * K, src + j * ldw, static_cast<size_t>(K) * 2);
          }
          src = copy;
          ldw = K;
        }
        k.amx_rows(K / 32, src, ldw, x, 16 * K, static_cast<int>(token_tiles),
                   tile + (s * padded_n + i) * padded_m, padded_m);
      }
    }
    k.amx_end();
    k.transpose(tile, padded_m, ldo, m, out, ldo);
    for (int64_t t = 0; t < m; ++t) {
      fn(it.expert, it.row_begin + t, f, n, out + t * ldo, out + t * ldo + padded_n);
    }
  }
}

template <class Epilogue>
void amx_nn_item(const GemmDesc<float>& d, const Kernels<float>& k, const GemmItem& it,
                 const Epilogue& fn) {
  const int64_t K = d.in_features, depth = round_up<int64_t>(K, 32);
  const int64_t m = it.row_end - it.row_begin, padded_m = round_up<int64_t>(m, 16);
  const int64_t n = it.feature_end - it.feature_begin, padded_n = round_up<int64_t>(n, 32);
  const int64_t ldc = padded_n * d.segments, lda = depth + 32;
  auto* a = scratch<uint16_t>(Scratch::kTokens, padded_m * lda);
  auto* panels =
      scratch<uint16_t>(Scratch::kPackB, (kAmxKc * 32 + 2 * kPanelPad) * (padded_n / 32));
  float* tile = scratch<float>(Scratch::kTile, padded_m * ldc);
  load_bf16_rows(d, k, it, depth, padded_m, a, lda);
  const auto* w =
      reinterpret_cast<const uint16_t*>(element(d.b.data, d.b.type, it.expert * d.b.stride_e));
  const uint16_t* rows[kAmxKc];
  for (int64_t k0 = 0; k0 < K; k0 += kAmxKc) {
    const int64_t kc = std::min(kAmxKc, depth - k0);
    for (int64_t r = 0; r < kc; ++r) {
      rows[r] = k0 + r < K ? w + (k0 + r) * d.b.stride_k + it.feature_begin : nullptr;
    }
    for (int s = 0; s < d.segments; ++s) {
      const int64_t panel_stride = kc * 32 + 2 * kPanelPad;
      k.pack_pairs(rows, s * d.features, kc, n, panels, panel_stride);
      // The tiles fetch the next block of weights, as in nn_item.
      const bool same_k = s + 1 < d.segments;
      const int64_t next_k = same_k ? k0 : k0 + kAmxKc;
      TileHints next;
      if (next_k < K) {
        next.base = reinterpret_cast<const char*>(w + next_k * d.b.stride_k + it.feature_begin +
                                                  (same_k ? (s + 1) * d.features : 0));
        next.stride = d.b.stride_k * 2;
        next.rows = std::min(kAmxKc, K - next_k);
        next.bytes = n * 2;
        next.spread(kc / 32 * (padded_n / 32) * ceil_div<int64_t>(padded_m, 32));
      }
      k.amx_begin();
      for (int64_t j = 0; j < padded_n; j += 32) {
        for (int64_t t = 0; t < padded_m; t += 32) {
          k.amx_panel(kc / 32, a + t * lda + k0, lda, padded_m - t > 16 ? 2 : 1,
                      panels + j / 32 * panel_stride, tile + t * ldc + s * padded_n + j, ldc,
                      k0 > 0, next);
        }
      }
      k.amx_end();
    }
  }
  for (int64_t t = 0; t < m; ++t) {
    fn(it.expert, it.row_begin + t, it.feature_begin, n, tile + t * ldc, tile + t * ldc + padded_n);
  }
}

template <class T, class Epilogue>
void run_item(const GemmDesc<T>& d, const Kernels<T>& k, const GemmItem& it, const Epilogue& fn) {
  switch (it.path) {
    case Path::kZero: {
      const int64_t n = it.feature_end - it.feature_begin;
      T* zeros = scratch<T>(Scratch::kTile, 2 * n);
      for (int64_t r = it.row_begin; r < it.row_end; ++r) {
        std::fill(zeros, zeros + 2 * n, T(0));
        fn(it.expert, r, it.feature_begin, n, zeros, zeros + n);
      }
      return;
    }
    case Path::kDot:
      return dot_item(d, k, it, fn);
    case Path::kRank:
      return rank_item(d, k, it, fn);
    case Path::kNt:
      return nt_item<false>(d, k, it, fn);
    case Path::kNn:
      return nn_item<false>(d, k, it, fn);
    case Path::kPanels:
      return panel_item<false>(d, k, it, fn);
    case Path::kPairNt:
      if constexpr (sizeof(T) == 4) nt_item<true>(d, k, it, fn);
      return;
    case Path::kPairNn:
      if constexpr (sizeof(T) == 4) nn_item<true>(d, k, it, fn);
      return;
    case Path::kPairPanels:
      if constexpr (sizeof(T) == 4) panel_item<true>(d, k, it, fn);
      return;
    case Path::kAmxPanels:
      if constexpr (sizeof(T) == 4) amx_panel_item(d, k, it, fn);
      return;
    case Path::kAmxRows:
      if constexpr (sizeof(T) == 4) amx_rows_item(d, k, it, fn);
      return;
    case Path::kAmxNn:
      if constexpr (sizeof(T) == 4) amx_nn_item(d, k, it, fn);
      return;
  }
}

// Elementary operations, in units of about a nanosecond.
template <class T>
double gemm_cost(const GemmDesc<T>& d) {
  return static_cast<double>(d.expert_offsets[d.num_experts]) *
         static_cast<double>(d.features * d.segments) *
         (static_cast<double>(d.in_features) / 16 + 1);
}

template <class T, class Epilogue>
void gemm(const GemmDesc<T>& d, const Parallel& par, const Epilogue& fn) {
  const Kernels<T>& k = kernels<T>();
  const std::vector<GemmItem> items = gemm_items(d, k, par.num_threads);
  parallel_items(par, static_cast<int64_t>(items.size()), gemm_cost(d),
                 [&](int64_t i) { run_item(d, k, items[i], fn); });
}

// out[e, o, j] = sum over rows r of e: grad[r, o] * a[r, j]. Row blocks are the depth of the tiles;
// both operands are copied as they lie. One item covers the features [o_begin, o_end) of one
// expert.
template <bool kPairs, class T>
void wgrad_item(const GroupedWgradParams& p, const Kernels<T>& k, int64_t e, int64_t o_begin,
                int64_t o_end) {
  constexpr int64_t kRows = kPairs ? 2 : 1;  // rows of an element
  const int64_t W = k.lanes, O = p.out_features, J = p.in_features;
  const int64_t size = dtype_size(p.out_type);
  const int64_t begin = p.expert_offsets[e], end = p.expert_offsets[e + 1];
  char* out = static_cast<char*>(p.out) + e * O * J * size;
  if (begin == end) {
    if (p.accumulate) return;
    std::memset(out + o_begin * J * size, 0, static_cast<size_t>((o_end - o_begin) * J * size));
    return;
  }
  const auto* grad_scale = static_cast<const T*>(p.grad_scale);
  const auto* a_scale = static_cast<const T*>(p.a_scale);
  const auto& tiles = kPairs ? k.pair_col_a : k.col_a;
  // Whole panels of the accumulate type go straight to their place.
  const bool large = !p.accumulate && p.num_experts * O * J * size >= kStreamBytes;
  const bool same_type = p.out_type == kAccumulate<T> && (k.streams || !large);
  const int64_t unit = kPairs ? 2 * W : W;  // width of the narrowest panel
  const int64_t o_block = balanced(o_end - o_begin, kFeatureBlock / 2, 1);
  const int64_t j_block = balanced(J, 256, 2 * W), padded_j = round_up(j_block, unit);
  T* g = scratch<T>(Scratch::kPackA, kKc * kLdm);
  T* panels = scratch<T>(Scratch::kPackB, ceil_div(padded_j, 2 * W) * (2 * W * kKc + kPanelPad));
  T* tile = scratch<T>(Scratch::kTile, o_block * padded_j);
  const int64_t half_rows = std::max(j_block, kLdm);
  auto* halves =
      kPairs ? scratch<uint16_t>(Scratch::kTokens, (kRows * kKc + 2) * half_rows) : nullptr;
  const void* a_rows[kRows * kKc];
  // A large result, written once and in whole vectors, goes past the cache.
  TileHints hints;
  const int64_t vector = W * static_cast<int64_t>(sizeof(T));
  const bool streamed = large && k.streams && same_type && end - begin <= kRows * kKc &&
                        J % unit == 0 && reinterpret_cast<uintptr_t>(out) % vector == 0;
  const auto pack_a = [&](int64_t r0, int64_t rows, int64_t j0, int64_t cols) {
    const int64_t offset = j0 * dtype_size(p.a.type);
    for (int64_t r = 0; r < rows; ++r) a_rows[r] = row_of(p.a, r0 + r);
    if constexpr (kPairs) {
      for (int64_t r = 0; r < rows; ++r) {
        const char* src = static_cast<const char*>(a_rows[r]) + offset;
        const float scale = a_scale ? a_scale[r0 + r] : 1.0f;
        a_rows[r] = src;
        if (p.a.type != DType::kBFloat16 || scale != 1.0f) {
          uint16_t* copy = halves + r * half_rows;
          load_bf16_row(k, p.a.type, src, cols, scale, tile, copy);
          a_rows[r] = copy;
        }
      }
      if (rows % 2 != 0) a_rows[rows] = nullptr;
      const int64_t padded = round_up<int64_t>(rows, 2);
      k.pack_pairs(reinterpret_cast<const uint16_t* const*>(a_rows), 0, padded, cols,
                   reinterpret_cast<uint16_t*>(panels), padded * 2 * W + 2 * kPanelPad);
    } else {
      k.pack_panels(p.a.type, a_rows, offset, rows, cols, a_scale ? a_scale + r0 : nullptr, panels,
                    rows * 2 * W + kPanelPad);
    }
  };
  const auto pack_grad = [&](int64_t r0, int64_t rows, int64_t o0, int64_t n) {
    const auto row = [&](int64_t r) { return element(row_of(p.grad, r), p.grad.type, o0); };
    const auto scale = [&](int64_t r) { return grad_scale ? grad_scale[r] : T(1); };
    if constexpr (kPairs) {
      uint16_t* two = halves + kRows * kKc * half_rows;
      for (int64_t r = 0; r < rows; r += 2) {
        for (int64_t i = 0; i < 2; ++i) {
          uint16_t* dst = two + i * half_rows;
          if (r + i < rows) {
            load_bf16_row(k, p.grad.type, row(r0 + r + i), n, scale(r0 + r + i), tile, dst);
          } else {
            std::fill(dst, dst + n, uint16_t{0});
          }
        }
        k.pair_rows(two, two + half_rows, g + r / 2 * kLdm, n);
      }
    } else {
      for (int64_t r = 0; r < rows; ++r) {
        k.load_row(p.grad.type, row(r0 + r), g + r * kLdm, n, scale(r0 + r));
      }
    }
  };

  for (int64_t j0 = 0; j0 < J; j0 += j_block) {
    const int64_t j1 = std::min(J, j0 + j_block);
    const int64_t ldc = round_up(j1 - j0, unit);
    const int64_t j_direct = same_type ? j0 + (j1 - j0) / unit * unit : j0;
    for (int64_t o0 = o_begin; o0 < o_end; o0 += o_block) {
      const int64_t n = std::min(o_block, o_end - o0);
      const int64_t blocks = ceil_div<int64_t>(n, k.mr2);
      for (int64_t r0 = begin; r0 < end; r0 += kRows * kKc) {
        const int64_t rows = std::min(kRows * kKc, end - r0), kc = ceil_div(rows, kRows);
        // A short expert's rows are packed once for all feature blocks.
        if (o0 == o_begin || end - begin > kRows * kKc) pack_a(r0, rows, j0, j1 - j0);
        pack_grad(r0, rows, o0, n);
        for (int64_t j = j0; j < j1; j += 2 * W) {
          const int64_t width = std::min(2 * W, ldc - (j - j0));
          const bool direct = j + width <= j_direct;
          T* c = direct ? reinterpret_cast<T*>(out) + o0 * J + j : tile + (j - j0);
          const int64_t ld = direct ? J : ldc;
          const int nv = width > W ? 2 : 1;
          hints.stream = streamed && direct;
          for (int64_t b = 0; b < blocks; ++b) {
            const int64_t i0 = n * b / blocks, i1 = n * (b + 1) / blocks;
            tiles[nv - 1][i1 - i0 - 1](
                kc, g + i0, panels + (j - j0) / (2 * W) * (2 * W * kc + kPanelPad), c + i0 * ld, ld,
                r0 > begin || (direct && p.accumulate), hints);
          }
        }
      }
      // What went through the tile: all columns of another type, or those of a partial last panel,
      // which shares its panel of two vectors with a whole one.
      const int64_t first = same_type ? j0 + (j_direct - j0) / (2 * W) * (2 * W) : j0;
      const int64_t from = j_direct == j1 ? j1 : first;
      for (int64_t o = 0; from < j1 && o < n; ++o) {
        T* row = tile + o * ldc + (from - j0);
        char* dst = out + ((o0 + o) * J + from) * size;
        if (p.accumulate) k.axpy(p.out_type, dst, T(1), row, j1 - from);
        if (large) {
          k.stream_row(p.out_type, row, dst, j1 - from);
        } else {
          k.store_row(p.out_type, row, dst, j1 - from);
        }
      }
    }
  }
  if (large) k.stream_fence();
}

// The same for bfloat16 on AMX: grad^T is the row operand and pairs of rows of a are the
// panels, so the depth of the tiles is the expert's rows, rounded up to 32.
inline void amx_wgrad_item(const GroupedWgradParams& p, const Kernels<float>& k, int64_t e,
                           int64_t o_begin, int64_t o_end) {
  const int64_t O = p.out_features, J = p.in_features;
  const int64_t begin = p.expert_offsets[e], m = p.expert_offsets[e + 1] - begin;
  const int64_t depth = round_up<int64_t>(m, 32), lda = depth + 32;
  const int64_t n = o_end - o_begin, padded_n = round_up<int64_t>(n, 32);
  const auto* grad_scale = static_cast<const float*>(p.grad_scale);
  const auto* a_scale = static_cast<const float*>(p.a_scale);
  const int64_t size = dtype_size(p.out_type);
  char* out = static_cast<char*>(p.out) + (e * O + o_begin) * J * size;

  // grad^T, 16 rows of the expert at a time.
  auto* g = scratch<uint16_t>(Scratch::kTokens, padded_n * lda);
  float* rows = scratch<float>(Scratch::kPackA, 16 * (padded_n + 16));
  float* turned = scratch<float>(Scratch::kTile, padded_n * 16);
  const int64_t ld_rows = padded_n + 16;
  std::fill(g + n * lda, g + padded_n * lda, uint16_t{0});
  for (int64_t r0 = 0; r0 < depth; r0 += 16) {
    for (int64_t r = 0; r < 16; ++r) {
      float* row = rows + r * ld_rows;
      if (r0 + r < m) {
        k.load_row(p.grad.type, element(row_of(p.grad, begin + r0 + r), p.grad.type, o_begin), row,
                   n, grad_scale ? grad_scale[begin + r0 + r] : 1.0f);
      } else {
        std::fill(row, row + n, 0.0f);
      }
    }
    k.transpose(rows, ld_rows, 16, n, turned, 16);
    for (int64_t o = 0; o < n; ++o) {
      k.store_row(DType::kBFloat16, turned + o * 16, g + o * lda + r0, 16);
    }
  }

  const bool large = !p.accumulate && p.out_type == DType::kBFloat16 &&
                     p.num_experts * O * J * size >= kStreamBytes;
  TileHints none;
  const int64_t j_block = balanced(J, kAmxNnFeatures, 32);
  auto* copies = scratch<uint16_t>(Scratch::kPackA, depth * j_block);
  float* buffer = scratch<float>(Scratch::kTile, j_block);
  std::vector<const uint16_t*> a_rows(static_cast<size_t>(depth), nullptr);
  for (int64_t j0 = 0; j0 < J; j0 += j_block) {
    const int64_t cols = std::min(j_block, J - j0), ldc = round_up<int64_t>(cols, 32);
    const int64_t panel_stride = depth * 32 + 2 * kPanelPad;
    auto* panels = scratch<uint16_t>(Scratch::kPackB, panel_stride * (ldc / 32));
    for (int64_t r = 0; r < m; ++r) {
      const void* src = element(row_of(p.a, begin + r), p.a.type, j0);
      const float scale = a_scale ? a_scale[begin + r] : 1.0f;
      a_rows[r] = static_cast<const uint16_t*>(src);
      if (p.a.type != DType::kBFloat16 || scale != 1.0f) {
        load_bf16_row(k, p.a.type, src, cols, scale, buffer, copies + r * j_block);
        a_rows[r] = copies + r * j_block;
      }
    }
    k.pack_pairs(a_rows.data(), 0, depth, cols, panels, panel_stride);
    float* tile = scratch<float>(Scratch::kTile, std::max(j_block, 32 * ldc));
    for (int64_t o = 0; o < n; o += 32) {
      k.amx_begin();
      for (int64_t j = 0; j < ldc; j += 32) {
        k.amx_panel(depth / 32, g + o * lda, lda, n - o > 16 ? 2 : 1,
                    panels + j / 32 * panel_stride, tile + j, ldc, false, none);
      }
      k.amx_end();
      for (int64_t i = 0; i < std::min<int64_t>(32, n - o); ++i) {
        float* row = tile + i * ldc;
        char* dst = out + ((o + i) * J + j0) * size;
        if (large) {
          k.stream_row(p.out_type, row, dst, cols);
        } else {
          if (p.accumulate) k.axpy(p.out_type, dst, 1.0f, row, cols);
          k.store_row(p.out_type, row, dst, cols);
        }
      }
    }
  }
  if (large) k.stream_fence();
}

template <class T>
void wgrad(const GroupedWgradParams& p, const Parallel& par) {
  const Kernels<T>& k = kernels<T>();
  const int64_t E = p.num_experts, O = p.out_features, J = p.in_features;
  if (O == 0 || J == 0) return;
  // The output is usually fresh memory, and the first write into a huge page clears all of it. Two
  // threads that meet in one page both clear it, so an item covers a page at least, unless that
  // leaves threads idle.
  constexpr int64_t kHugePage = int64_t{2} << 20;
  int64_t features = std::max(kFeatureBlock / 2, ceil_div(kHugePage, J * dtype_size(p.out_type)));
  if (E * ceil_div(O, features) < 4 * par.num_threads) features = kFeatureBlock / 2;
  features = balanced(O, features, 1);
  const int64_t parts = ceil_div(O, features);
  const double rows = static_cast<double>(p.expert_offsets[E]);
  const double cost = static_cast<double>(O * J) * (rows / 16 + static_cast<double>(E));
  parallel_items(par, E * parts, cost, [&](int64_t item) {
    const int64_t e = item / parts, o = item % parts * features;
    if constexpr (sizeof(T) == 4) {
      // In a bfloat16 block one operand is bfloat16 (tokens, or the gradient of the output); the
      // other may be an intermediate result in fp32.
      const bool pairs =
          k.pairs && (p.grad.type == DType::kBFloat16 || p.a.type == DType::kBFloat16);
      const bool amx = pairs && k.amx_panel != nullptr;
      if (amx && p.expert_offsets[e + 1] - p.expert_offsets[e] >= kAmxMinRows) {
        return amx_wgrad_item(p, k, e, o, std::min(O, o + features));
      }
      if (pairs) return wgrad_item<true>(p, k, e, o, std::min(O, o + features));
    }
    wgrad_item<false>(p, k, e, o, std::min(O, o + features));
  });
}

}  // namespace moe_ops::cpu
