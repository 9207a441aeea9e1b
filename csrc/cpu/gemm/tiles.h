// Items that copy blocks of weights, or of weights that lie packed, through the register tiles.
#pragma once

#include "cpu/gemm/plan.h"

namespace moe_ops::cpu {

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
  // By the width that an item has with one thread: sums pass through memory between blocks of k, so
  // their bits depend on the depth.
  const int64_t expert_rows = d.expert_offsets[it.expert + 1] - d.expert_offsets[it.expert];
  const int64_t cuts = ceil_div(d.features * d.segments, nn_features(expert_rows));
  const int64_t widest =
      balanced(d.features, ceil_div(d.features, cuts), std::max<int64_t>(d.feature_unit, 2 * W));
  const int64_t depth = std::clamp<int64_t>(
      kNnBlockBytes / (round_up(widest, kPairs ? 2 * W : W) * static_cast<int64_t>(sizeof(T))), 16,
      kKc);
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
  // Blocks of equal depth: a short one would pay for its sums in memory with little arithmetic.
  // One row has no pitch, and no next row that would want the sums' registers.
  const int64_t depth = round_up(K, step), block_k = m == 1 ? depth : balanced(depth, kKc, 8);
  const int64_t k_blocks = ceil_div(depth, block_k);
  T* a = scratch<T>(Scratch::kTokens, m == 1 ? depth : k_blocks * m * kLda);
  T* tile = scratch<T>(Scratch::kTile, m * ldc);
  for (int64_t t = 0; t < m; ++t) {
    for (int64_t b = 0; b < k_blocks; ++b) {
      T* dst = a + (b * m + t) * kLda;
      const int64_t kc = std::min(block_k, K - b * block_k);
      load_tokens<kPairs>(d, k, it.row_begin + t, b * block_k, kc, dst);
      if (b == k_blocks - 1 && depth > K) dst[kc] = T(0);
    }
  }
  const char* first = static_cast<const char*>(d.b.panels) + it.expert * layout.expert_bytes() +
                      it.feature_begin / P * d.segments * layout.panel_bytes;
  const int type = static_cast<int>(d.b.type);
  const int64_t count = padded_n / P * d.segments;
  // Where the sums of panel i begin: panels of the segments take turns.
  const auto sums = [&](int64_t i) {
    return tile + i % d.segments * padded_n + i / d.segments * P;
  };
  int64_t done = 0;
  if (m <= kMaxStreamRows) {
    // A share of the item's panels for each stream, so that streams are long.
    const int64_t streams = k.num_panel_streams[m - 1], share = count / streams;
    const auto run = kPairs ? k.pair_panel_streams[m - 1] : k.panel_streams[type][m - 1];
    T* c[8];
    for (; done < share; ++done) {
      for (int64_t s = 0; s < streams; ++s) c[s] = sums(done + s * share);
      for (int64_t b = 0; b < k_blocks; ++b) {
        run(std::min(block_k, depth - b * block_k), a + b * m * kLda,
            first + done * layout.panel_bytes + b * block_k * size, share * layout.panel_bytes, c,
            ldc, b > 0);
      }
    }
    done = share * streams;
  }
  const auto* tiles = kPairs ? k.pair_panel_tile : k.panel_tile[type];
  const int64_t blocks = ceil_div<int64_t>(m, k.mr2);
  // Every tile asks for panels ahead of its own: the core's window is too short to compute and to
  // wait for memory at once. Several tiles on one block share the next block between them.
  const int64_t ahead_step = std::max<int64_t>(size * step / blocks, 2);
  for (; done < count; ++done) {
    const char* panel = first + done * layout.panel_bytes;
    for (int64_t b = 0; b < k_blocks; ++b) {
      const int64_t kc = std::min(block_k, depth - b * block_k);
      const char* block = panel + b * block_k * size;
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t i0 = m * i / blocks, i1 = m * (i + 1) / blocks;
        tiles[i1 - i0 - 1](
            kc, a + (b * m + i0) * kLda, block, sums(done) + i0 * ldc, ldc, b > 0,
            block + (blocks == 1 ? kBytesAhead : kc * size) + i * ahead_step * (kc / step),
            ahead_step);
      }
    }
  }
  for (int64_t t = 0; t < m; ++t) {
    fn(it.expert, it.row_begin + t, it.feature_begin, n, tile + t * ldc, tile + t * ldc + padded_n);
  }
}

}  // namespace moe_ops::cpu
