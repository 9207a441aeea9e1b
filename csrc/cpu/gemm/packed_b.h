// GEMM on weights that were packed ahead of time (prepack.h): no copying of weights.
#pragma once

#include "cpu/gemm/heuristics.h"
#include "cpu/gemm/prepack.h"

namespace moe_ops::cpu {

// Least distance, in bytes, at which a tile prefetches panels from memory into L2: at 40 GB/s, 8
// KiB are twice the latency of DRAM.
constexpr int64_t kPanelPrefetch = 8192;

template <class Op, class T, class Epilogue>
void packed_b_item(const GemmDesc<T>& d, const GemmKernels<T>& k, const GemmItem& it,
                   const Epilogue& fn) {
  const PanelLayout layout =
      panel_layout(d.b.type, d.features * d.segments, d.in_features, d.segments);
  const int64_t P = layout.width;
  // Bytes of a panel for one element of a, and elements that a tile takes in one step.
  const int64_t size = P * element_bytes<Op>(d);
  const int64_t step = size < P * static_cast<int64_t>(sizeof(T)) ? 2 : 1;
  const int64_t m = it.row_end - it.row_begin;
  // Tokens are copied once for the item; more rows than streams take meet a part of it at a time.
  const int64_t part = m <= k.packed.stream_rows ? it.feature_end - it.feature_begin
                                                 : round_up(kPanelFeatureBlock / d.segments, P);
  const int64_t K = ceil_div(d.in_features, Op::kSteps);
  // Blocks of equal depth: a short one would pay for its sums in memory with little arithmetic.
  // One row has no leading dimension, and no next row that would want the sums' registers: one
  // block, unless its bits are to be those that it has among others.
  const int64_t depth = round_up(K, step);
  const bool one_block = m == 1 && !d.invariant;
  const int64_t block_k = one_block ? depth : balanced(depth, kPanelDepth, 8);
  const int64_t k_blocks = ceil_div(depth, block_k);
  ScratchScope scratch;
  T* a = scratch.take<T>(Scratch::kTokens, one_block ? depth : k_blocks * m * kPanelLda);
  T* tile = scratch.take<T>(Scratch::kTile, m * round_up(part, P) * d.segments);
  for (int64_t t = 0; t < m; ++t) {
    for (int64_t b = 0; b < k_blocks; ++b) {
      T* dst = a + (b * m + t) * kPanelLda;
      const int64_t kc = std::min(block_k, K - b * block_k);
      Op::load(d, it.row_begin + t, b * block_k, kc, dst);
      if (b == k_blocks - 1 && depth > K) dst[kc] = T(0);
    }
  }
  for (int64_t f0 = it.feature_begin; f0 < it.feature_end; f0 += part) {
    const int64_t n = std::min(part, it.feature_end - f0);
    const int64_t padded_n = round_up(n, P), ldc = padded_n * d.segments;
    const char* first = static_cast<const char*>(d.b.panels) + it.expert * layout.expert_bytes() +
                        f0 / P * d.segments * layout.panel_bytes;
    const int type = static_cast<int>(d.b.type);
    const int64_t count = padded_n / P * d.segments;
    // Returns where the sums of panel i begin; panels of the segments alternate.
    const auto sums = [&](int64_t i) {
      return tile + i % d.segments * padded_n + i / d.segments * P;
    };
    int64_t done = 0;
    if (m <= k.packed.stream_rows) {
      // A share of the item's panels for each stream, so that streams are long.
      const int64_t streams = k.packed.num_streams[m - 1], share = count / streams;
      const bool ahead = m <= kStreamPrefetchRows &&
                         d.num_experts * layout.expert_bytes() >= k.packed.stream_min_bytes;
      const auto run =
          Op::kBf16 ? k.packed.bf16_streams[ahead][m - 1] : k.packed.streams[type][ahead][m - 1];
      T* c[8];
      for (; done < share; ++done) {
        for (int64_t s = 0; s < streams; ++s) c[s] = sums(done + s * share);
        for (int64_t b = 0; b < k_blocks; ++b) {
          run(std::min(block_k, depth - b * block_k), a + b * m * kPanelLda,
              {first + done * layout.panel_bytes + b * block_k * size, share * layout.panel_bytes,
               k.packed.stream_distance},
              {c, ldc, b > 0});
        }
      }
      done = share * streams;
    }
    const int64_t blocks = ceil_div<int64_t>(m, k.mr2);
    const BalancedPartition tile_rows(m, blocks);
    const bool widen = d.b.type == DType::kFloat16 && blocks >= k.packed.widen_tiles;
    ScratchScope scratch;
    T* wide = widen ? scratch.take<T>(Scratch::kPackB, block_k * P) : nullptr;
    const auto* tiles = Op::kBf16 ? k.packed.bf16_tile
                                  : k.packed.tile[widen ? static_cast<int>(kAccumulate<T>) : type];
    const int64_t tile_step = widen ? 1 : step;
    // Every tile prefetches panels ahead of its own: the core's window is too short to compute and
    // to wait for memory at once. Several tiles on one block share the next block between them; one
    // alone goes no further ahead than it must, unless for halves of blocks.
    const int64_t streams = k.prefetch_halves ? k.packed.prefetch_lines : 1;
    const int64_t ahead_step = std::max<int64_t>(ceil_div(size * tile_step, blocks) / streams, 1);
    for (; done < count; ++done) {
      const char* panel = first + done * layout.panel_bytes;
      for (int64_t b = 0; b < k_blocks; ++b) {
        const int64_t kc = std::min(block_k, depth - b * block_k);
        const char* block = panel + b * block_k * size;
        const bool next_block = blocks > 1 || k.prefetch_halves;
        const char* ahead =
            block + (next_block ? std::max(kPanelPrefetch, kc * size) : kPanelPrefetch);
        if (widen) k.packed.widen_fp16(kc, block, wide);
        for (int64_t i = 0; i < blocks; ++i) {
          const int64_t i0 = tile_rows.begin(i), i1 = tile_rows.begin(i + 1);
          const void* weights = widen ? static_cast<const void*>(wide) : block;
          tiles[i1 - i0 - 1](kc, a + (b * m + i0) * kPanelLda, weights,
                             {sums(done) + i0 * ldc, ldc, b > 0},
                             {ahead + i * ahead_step * (kc / tile_step),
                              k.prefetch_halves ? kc * size / 2 : kLineBytes, ahead_step});
        }
      }
    }
    for (int64_t t = 0; t < m; ++t) {
      fn(it.expert, it.row_begin + t, f0, n, tile + t * ldc, tile + t * ldc + padded_n);
    }
  }
}

}  // namespace moe_ops::cpu
