// GEMM with copies of blocks of weights: B^T transposed into panels, or row-major B.
#pragma once

#include "cpu/gemm/heuristics.h"

namespace moe_ops::cpu {

// Copies of tokens that stay for a run of blocks of k, of which the weights are then read in one
// go: longer streams, which the memory delivers twice as fast as pieces of 192.
constexpr int64_t kWholeDepthBytes = int64_t{512} << 10;
// Elements of the accumulate type between panels packed for one product: two lines, so that what a
// row of weights writes into all panels does not meet in one L1 set.
constexpr int64_t kPanelPad = 32;
constexpr int64_t kLineBytes = 64;    // of a cache
constexpr int64_t kPageBytes = 4096;  // and of a way of an L1

// Computes an item whose weights are dense along k and packed once for all rows of the item. While
// the first block of rows meets a panel, its tiles prefetch the weights of the next one.
template <class Op, class T, class Epilogue>
void pack_bt_item(const GemmDesc<T>& d, const GemmKernels<T>& k, const GemmItem& it,
                  const Epilogue& fn) {
  const int64_t W = k.lanes, K = d.in_features / Op::kSteps;
  const int64_t size = element_bytes<Op>(d);
  const auto& tiles = Op::row_a(k);
  // Sums of a part are handed on before the next.
  const int64_t part = round_up(kPanelFeatureBlock / d.segments, 2 * W);
  const int64_t item_columns = round_up(it.feature_end - it.feature_begin, W) * d.segments;
  const int64_t most_rows = balanced(it.row_end - it.row_begin, kRowBlock, 1);
  // Blocks of equal depth: a short one would pay for its sums in memory with little arithmetic. So
  // many are taken at a time that their tokens leave room in an L2 for panels and sums.
  const int64_t depth = balanced(K, kKc, 2 * kPrefetchStep);
  const int64_t chunk = kWholeDepthBytes / (kRowBlock * kLda * static_cast<int64_t>(sizeof(T)));
  ScratchScope scratch;
  T* a = scratch.take<T>(Scratch::kTokens, std::min(chunk, ceil_div(K, depth)) * most_rows * kLda);
  // Panels that no other rows will meet are written where the one before was.
  const bool kept = most_rows < it.row_end - it.row_begin;
  T* panels = scratch.take<T>(Scratch::kPackB, kept ? item_columns * K : 2 * W * depth);
  T* rows = scratch.take<T>(Scratch::kPackA, 2 * W * kLda);
  T* tile = scratch.take<T>(Scratch::kTile, most_rows * part * d.segments);
  const char* w = element(d.b.data, d.b.type, it.expert * d.b.stride_e);
  const int64_t row_bytes = d.b.stride_o * dtype_size(d.b.type);
  const auto weight_row = [&](int64_t s, int64_t feature, int64_t k0) {
    return w + (s * d.features + feature) * row_bytes + k0 * size;
  };
  // kc steps from k0 on of features [j, j + width) of segment s, as [kc][width]; from n on, zeros.
  const auto pack = [&](int64_t s, int64_t j, int64_t n, int64_t width, int64_t k0, int64_t kc,
                        T* dst) {
    if (!widens<Op>(d) && j + width <= n && kc % W == 0) {
      k.transpose(reinterpret_cast<const T*>(weight_row(s, j, k0)),
                  row_bytes / static_cast<int64_t>(sizeof(T)), width, kc, dst, width);
      return;
    }
    for (int64_t i = 0; i < width; ++i) {
      T* row = rows + i * kLda;
      if (j + i >= n) {
        std::fill(row, row + kc, T(0));
      } else if constexpr (Op::kBf16) {
        std::memcpy(row, weight_row(s, j + i, k0), static_cast<size_t>(kc) * sizeof(T));
      } else {
        row_kernels<T>().load_row(d.b.type, weight_row(s, j + i, k0), row, kc, T(1));
      }
    }
    k.transpose(rows, kLda, width, kc, dst, width);
  };
  for (int64_t r0 = it.row_begin; r0 < it.row_end; r0 += most_rows) {
    const int64_t m = std::min(most_rows, it.row_end - r0), blocks = ceil_div<int64_t>(m, k.mr2);
    const BalancedPartition tile_rows(m, blocks);
    const bool first = r0 == it.row_begin;
    for (int64_t f0 = it.feature_begin; f0 < it.feature_end; f0 += part) {
      const int64_t f1 = std::min(it.feature_end, f0 + part), n = f1 - f0;
      const int64_t padded_n = round_up(n, W), ldc = padded_n * d.segments;
      T* kept_panels = panels + (f0 - it.feature_begin) * d.segments * K;
      for (int64_t c0 = 0; c0 < K; c0 += chunk * depth) {
        const int64_t c1 = std::min(K, c0 + chunk * depth);
        // One chunk of tokens stays for all parts.
        for (int64_t t = 0; t < m && (f0 == it.feature_begin || chunk * depth < K); ++t) {
          T* dst = a + t * kLda;
          for (int64_t k0 = c0; k0 < c1; k0 += depth, dst += m * kLda) {
            Op::load(d, r0 + t, k0, std::min(depth, c1 - k0), dst);
          }
        }
        for (int64_t s = 0; s < d.segments; ++s) {
          for (int64_t j = 0; j < padded_n; j += 2 * W) {
            const int64_t width = std::min(2 * W, padded_n - j), column = s * padded_n + j;
            const bool same = j + width < padded_n;
            TileOptions next;
            if (first && (same || s + 1 < d.segments)) {
              const int64_t next_j = f0 + (same ? j + width : 0);
              next.base = weight_row(same ? s : s + 1, next_j, c0);
              next.stride = row_bytes;
              next.rows = std::min(2 * W, f1 - next_j);
              next.bytes = (c1 - c0) * size;
              next.spread((c1 - c0) / kPrefetchStep * blocks, k.prefetch_halves);
            }
            const T* x = a;
            for (int64_t k0 = c0; k0 < c1; k0 += depth, x += m * kLda) {
              const int64_t kc = std::min(depth, c1 - k0);
              T* panel = kept ? kept_panels + column * K + k0 * width : panels;
              if (first) pack(s, f0 + j, f1, width, k0, kc, panel);
              for (int64_t i = 0; i < blocks; ++i) {
                const int64_t i0 = tile_rows.begin(i), i1 = tile_rows.begin(i + 1);
                tiles[width / W - 1][i1 - i0 - 1](kc, x + i0 * kLda, panel,
                                                  {tile + i0 * ldc + column, ldc, k0 > 0}, next);
              }
            }
          }
        }
      }
      for (int64_t t = 0; t < m; ++t) {
        fn(it.expert, r0 + t, f0, n, tile + t * ldc, tile + t * ldc + padded_n);
      }
    }
  }
}

// Computes an item with row-major B; blocks of weight rows are copied into panels, unless there are
// few rows.
template <class Op, class T, class Epilogue>
void row_major_item(const GemmDesc<T>& d, const GemmKernels<T>& k, const GemmItem& it,
                    const GemmItem* next_item, const Epilogue& fn) {
  constexpr int64_t kRows = Op::kSteps;  // weight rows of an element
  const int64_t W = k.lanes, K = ceil_div(d.in_features, kRows);
  const int64_t m = it.row_end - it.row_begin, n = it.feature_end - it.feature_begin;
  const int64_t padded_n = round_up(n, kRows * W);
  const int64_t ldc = padded_n * d.segments;
  const int64_t depth = it.config.depth;
  ScratchScope scratch;
  T* a = scratch.take<T>(Scratch::kPackA, kRowBlock * kLda);
  T* panels = scratch.take<T>(Scratch::kPackB,
                              ceil_div(padded_n, 2 * W) * (2 * W * std::min(K, depth) + kPanelPad));
  T* tile = scratch.take<T>(Scratch::kTile, m * ldc);
  const auto& tiles = Op::row_a(k);
  const void* w_rows[kRows * kKc];
  // Tiles read the weights as they lie. Where more than one will follow, they copy the panel on the
  // way; or one, where the lines of a panel meet in one set of an L1 and are read in halves.
  const bool direct = !Op::kBf16 && d.b.type == kAccumulate<T> && n % W == 0;
  const bool one_set = d.b.stride_k * static_cast<int64_t>(sizeof(T)) % kPageBytes == 0;
  const int64_t crowded = one_set && W * static_cast<int64_t>(sizeof(T)) < kLineBytes ? 1 : 2;

  const int64_t blocks = ceil_div<int64_t>(m, k.mr2);
  const BalancedPartition tile_rows(m, blocks);
  for (int64_t k0 = 0; k0 < K; k0 += depth) {
    const int64_t kc = std::min(depth, K - k0), stride = 2 * W * kc + kPanelPad;
    for (int64_t t = 0; t < m; ++t) Op::load(d, it.row_begin + t, k0, kc, a + t * kLda);
    const auto weight_row = [&](int64_t row) {
      return element(d.b.data, d.b.type,
                     it.expert * d.b.stride_e + row * d.b.stride_k + it.feature_begin);
    };
    for (int64_t kk = 0; !direct && kk < kRows * kc; ++kk) {
      const int64_t row = kRows * k0 + kk;
      w_rows[kk] = row < d.in_features ? weight_row(row) : nullptr;
    }
    for (int s = 0; s < d.segments; ++s) {
      if (direct) {
        // Read as they lie.
      } else if constexpr (Op::kBf16) {
        k.bf16_pack_b(reinterpret_cast<const uint16_t* const*>(w_rows), s * d.features, 2 * kc, n,
                      reinterpret_cast<uint16_t*>(panels), 2 * stride);
      } else {
        k.pack_b({d.b.type, w_rows, kc, n}, s * d.features * dtype_size(d.b.type), nullptr, panels,
                 stride);
      }
      // These tiles fetch the weights of the next block: the other segment, the next k, or the
      // first block of the next item.
      const bool same_k = s + 1 < d.segments;
      const int64_t next_k = kRows * (same_k ? k0 : k0 + depth);
      const bool follows = next_k < d.in_features;
      TileOptions next;
      if (follows || (next_item != nullptr && next_item->config.algorithm == it.config.algorithm &&
                      next_item->config.operand == it.config.operand)) {
        const GemmItem& item = follows ? it : *next_item;
        const int64_t row = follows ? next_k : 0;
        next.base = element(d.b.data, d.b.type,
                            item.expert * d.b.stride_e + row * d.b.stride_k + item.feature_begin +
                                (same_k ? (s + 1) * d.features : 0));
        next.stride = d.b.stride_k * dtype_size(d.b.type);
        next.rows = std::min(kRows * depth, d.in_features - row);
        next.bytes = (item.feature_end - item.feature_begin) * dtype_size(d.b.type);
        next.spread(kc / kPrefetchStep * blocks * ceil_div(padded_n, 2 * W), k.prefetch_halves);
      }
      const bool again = blocks > crowded;
      for (int64_t j = 0; j < padded_n; j += 2 * W) {
        const int nv = padded_n - j > W ? 2 : 1;
        // Copies are made one after the other in the same place.
        T* panel = panels + (direct ? 0 : j / (2 * W) * stride);
        for (int64_t b = 0; b < blocks; ++b) {
          const int64_t i0 = tile_rows.begin(b), i1 = tile_rows.begin(b + 1), index = i1 - i0 - 1;
          T* c = tile + i0 * ldc + s * padded_n + j;
          const bool in_place = direct && (b == 0 || !again);
          const T* weights =
              in_place ? reinterpret_cast<const T*>(weight_row(k0)) + s * d.features + j : panel;
          next.ldb = in_place ? d.b.stride_k : TileOptions::kPacked;
          if constexpr (!Op::kBf16) {
            if (in_place && again) {
              k.copying_row_a[nv - 1][index](kc, a + i0 * kLda, weights, {c, ldc, k0 > 0}, next,
                                             panel);
              continue;
            }
          }
          tiles[nv - 1][index](kc, a + i0 * kLda, weights, {c, ldc, k0 > 0}, next);
        }
      }
    }
  }
  for (int64_t t = 0; t < m; ++t) {
    fn(it.expert, it.row_begin + t, it.feature_begin, n, tile + t * ldc, tile + t * ldc + padded_n);
  }
}

}  // namespace moe_ops::cpu
