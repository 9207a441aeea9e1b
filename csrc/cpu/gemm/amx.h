// bfloat16 products on AMX: forward, gradient of the tokens, gradient of the weights.
#pragma once

#include <vector>

#include "cpu/gemm/blocking.h"
#include "cpu/gemm/heuristics.h"
#include "cpu/gemm/pack_b.h"
#include "cpu/gemm/prepack.h"

namespace moe_ops::cpu {

// Depth of the blocks of weights that amx_row_major_item packs: 256 x 512 in bfloat16 are 256 KiB
// of L2, and 256 steps of k amortize loading and storing the sums.
constexpr int64_t kAmxKc = 256;
// Distance, in bytes, at which a tile prefetches packed weights.
constexpr int64_t kAmxPrefetch = 2048;

// Loads the rows of an item as bfloat16, `ld` apart, with zeros in columns K to `depth` and in rows
// m to padded_m.
inline void load_bf16_rows(const GemmDesc<float>& d, const GemmItem& it, int64_t depth,
                           int64_t padded_m, uint16_t* dst, int64_t ld) {
  const int64_t K = d.in_features, m = it.row_end - it.row_begin;
  for (int64_t t = 0; t < padded_m; ++t) {
    uint16_t* row = dst + t * ld;
    const int64_t valid = t < m ? K : 0;
    if (t < m) load_bf16_row(d.a.type, row_of(d.a, it.row_begin + t), K, 1.0f, nullptr, row);
    std::fill(row + valid, row + depth, uint16_t{0});
  }
}

template <class Epilogue>
void amx_packed_b_item(const GemmDesc<float>& d, const GemmKernels<float>& k, const GemmItem& it,
                       const Epilogue& fn) {
  const PanelLayout layout =
      panel_layout(d.b.type, d.features * d.segments, d.in_features, d.segments);
  const int64_t P = layout.width, depth = layout.depth;
  const int64_t m = it.row_end - it.row_begin, padded_m = round_up<int64_t>(m, 16);
  // A line more than the row keeps the 16 rows of a tile out of one L1 set.
  const int64_t lda = depth + 32;
  ScratchScope scratch;
  auto* a = scratch.take<uint16_t>(Scratch::kTokens, padded_m * lda);
  load_bf16_rows(d, it, depth, padded_m, a, lda);
  const char* panel = static_cast<const char*>(d.b.panels) + it.expert * layout.expert_bytes() +
                      it.feature_begin / P * d.segments * layout.panel_bytes;
  for (int64_t f = it.feature_begin; f < it.feature_end; f += kPanelFeatureBlock) {
    const int64_t n = std::min(kPanelFeatureBlock, it.feature_end - f);
    const int64_t padded_n = round_up(n, P), ldc = padded_n * d.segments;
    ScratchScope part;
    float* tile = part.take<float>(Scratch::kTile, padded_m * ldc);
    k.amx.begin();
    for (int64_t j = 0; j < padded_n; j += P) {
      for (int s = 0; s < d.segments; ++s, panel += layout.panel_bytes) {
        TileOptions next;
        next.base = panel + kAmxPrefetch;
        next.rows = 1;
        next.bytes = layout.panel_bytes;
        next.spread(depth / 32, k.prefetch_halves);
        for (int64_t t = 0; t < padded_m; t += 32) {
          k.amx.panel({depth / 32, a + t * lda, lda, padded_m - t > 16 ? 2 : 1,
                       reinterpret_cast<const uint16_t*>(panel)},
                      {tile + t * ldc + s * padded_n + j, ldc, false}, next);
        }
      }
    }
    k.amx.end();
    for (int64_t t = 0; t < m; ++t) {
      fn(it.expert, it.row_begin + t, f, n, tile + t * ldc, tile + t * ldc + padded_n);
    }
  }
}

template <class Epilogue>
void amx_pack_tokens_item(const GemmDesc<float>& d, const GemmKernels<float>& k, const GemmItem& it,
                          const Epilogue& fn) {
  const int64_t K = d.in_features, m = it.row_end - it.row_begin;
  const int64_t padded_m = round_up<int64_t>(m, 16), token_tiles = padded_m / 16;
  // Pairs of k are 32-bit elements, so the transposition of floats puts 16 tokens side by side.
  ScratchScope scratch;
  auto* x = scratch.take<uint16_t>(Scratch::kTokens, padded_m * K);
  for (int64_t t = 0; t < padded_m; t += 16) {
    ScratchScope packing;
    auto* rows = packing.take<uint16_t>(Scratch::kPackB, 16 * (K + 32));
    GemmItem part = it;
    part.row_begin = it.row_begin + t;
    part.row_end = std::min(it.row_end, part.row_begin + 16);
    load_bf16_rows(d, part, K, 16, rows, K + 32);
    k.transpose(reinterpret_cast<const float*>(rows), (K + 32) / 2, 16, K / 2,
                reinterpret_cast<float*>(x + t * K), 16);
  }
  const auto* w =
      reinterpret_cast<const uint16_t*>(element(d.b.data, d.b.type, it.expert * d.b.stride_e));
  const int64_t chunk = kPanelFeatureBlock / d.segments;
  for (int64_t f = it.feature_begin; f < it.feature_end; f += chunk) {
    const int64_t n = std::min(chunk, it.feature_end - f);
    const int64_t padded_n = round_up<int64_t>(n, 16), ldo = padded_n * d.segments;
    ScratchScope part;
    float* tile = part.take<float>(Scratch::kTile, ldo * padded_m);
    float* out = part.take<float>(Scratch::kPackB, ldo * padded_m);
    auto* last_rows = part.take<uint16_t>(Scratch::kPackA, 16 * K);
    k.amx.begin();
    for (int s = 0; s < d.segments; ++s) {
      for (int64_t i = 0; i < n; i += 16) {
        const uint16_t* src = w + (s * d.features + f + i) * d.b.stride_o;
        int64_t ldw = d.b.stride_o;
        if (n - i < 16) {  // A tile reads 16 rows; there may be no memory behind the last ones.
          std::memset(last_rows, 0, static_cast<size_t>(16 * K) * 2);
          for (int64_t j = 0; j < n - i; ++j) {
            std::memcpy(last_rows + j * K, src + j * ldw, static_cast<size_t>(K) * 2);
          }
          src = last_rows;
          ldw = K;
        }
        k.amx.rows({K / 32, src, ldw, x, 16 * K, static_cast<int>(token_tiles)},
                   tile + (s * padded_n + i) * padded_m, padded_m);
      }
    }
    k.amx.end();
    k.transpose(tile, padded_m, ldo, m, out, ldo);
    for (int64_t t = 0; t < m; ++t) {
      fn(it.expert, it.row_begin + t, f, n, out + t * ldo, out + t * ldo + padded_n);
    }
  }
}

template <class Epilogue>
void amx_row_major_item(const GemmDesc<float>& d, const GemmKernels<float>& k, const GemmItem& it,
                        const Epilogue& fn) {
  const int64_t K = d.in_features, depth = round_up<int64_t>(K, 32);
  const int64_t m = it.row_end - it.row_begin, padded_m = round_up<int64_t>(m, 16);
  const int64_t n = it.feature_end - it.feature_begin, padded_n = round_up<int64_t>(n, 32);
  const int64_t ldc = padded_n * d.segments, lda = depth + 32;
  ScratchScope scratch;
  auto* a = scratch.take<uint16_t>(Scratch::kTokens, padded_m * lda);
  auto* panels =
      scratch.take<uint16_t>(Scratch::kPackB, (kAmxKc * 32 + 2 * kPanelPad) * (padded_n / 32));
  float* tile = scratch.take<float>(Scratch::kTile, padded_m * ldc);
  load_bf16_rows(d, it, depth, padded_m, a, lda);
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
      k.bf16_pack_b(rows, s * d.features, kc, n, panels, panel_stride);
      // The tiles prefetch the next block of weights, as in row_major_item.
      const bool same_k = s + 1 < d.segments;
      const int64_t next_k = same_k ? k0 : k0 + kAmxKc;
      TileOptions next;
      if (next_k < K) {
        next.base = reinterpret_cast<const char*>(w + next_k * d.b.stride_k + it.feature_begin +
                                                  (same_k ? (s + 1) * d.features : 0));
        next.stride = d.b.stride_k * 2;
        next.rows = std::min(kAmxKc, K - next_k);
        next.bytes = n * 2;
        next.spread(kc / 32 * (padded_n / 32) * ceil_div<int64_t>(padded_m, 32), k.prefetch_halves);
      }
      k.amx.begin();
      for (int64_t j = 0; j < padded_n; j += 32) {
        for (int64_t t = 0; t < padded_m; t += 32) {
          k.amx.panel({kc / 32, a + t * lda + k0, lda, padded_m - t > 16 ? 2 : 1,
                       panels + j / 32 * panel_stride},
                      {tile + t * ldc + s * padded_n + j, ldc, k0 > 0}, next);
        }
      }
      k.amx.end();
    }
  }
  for (int64_t t = 0; t < m; ++t) {
    fn(it.expert, it.row_begin + t, it.feature_begin, n, tile + t * ldc, tile + t * ldc + padded_n);
  }
}

// Transposes grad, m rows from `begin` on and n features from o_begin on, to bfloat16: rows of g
// are features, lda apart, with zeros from m to the next multiple of 32 and in rows n to the next
// multiple of 32.
inline void transpose_grad(const GroupedWgradParams& p, const GemmKernels<float>& k, int64_t begin,
                           int64_t m, int64_t o_begin, int64_t n, uint16_t* g, int64_t lda) {
  const int64_t depth = round_up<int64_t>(m, 32), padded_n = round_up<int64_t>(n, 32);
  const int64_t ld_rows = padded_n + 16;
  const auto* grad_scale = static_cast<const float*>(p.grad_scale);
  ScratchScope scratch;
  float* rows = scratch.take<float>(Scratch::kPackA, 16 * ld_rows);
  float* turned = scratch.take<float>(Scratch::kTile, padded_n * 16);
  std::fill(g + n * lda, g + padded_n * lda, uint16_t{0});
  for (int64_t r0 = 0; r0 < depth; r0 += 16) {
    for (int64_t r = 0; r < 16; ++r) {
      float* row = rows + r * ld_rows;
      if (r0 + r < m) {
        row_kernels<float>().load_row(p.grad.type,
                                      element(row_of(p.grad, begin + r0 + r), p.grad.type, o_begin),
                                      row, n, grad_scale ? grad_scale[begin + r0 + r] : 1.0f);
      } else {
        std::fill(row, row + n, 0.0f);
      }
    }
    k.transpose(rows, ld_rows, 16, n, turned, 16);
    for (int64_t o = 0; o < n; ++o) {
      row_kernels<float>().store_row(DType::kBFloat16, turned + o * 16, g + o * lda + r0, 16);
    }
  }
}

// Computes the item with bfloat16 tiles of AMX: grad^T is the row operand and pairs of rows of a
// are the panels, so the depth of the tiles is the expert's rows, rounded up to 32.
inline void amx_wgrad_item(const GroupedWgradParams& p, const GemmKernels<float>& k, int64_t e,
                           int64_t o_begin, int64_t o_end) {
  const int64_t O = p.out_features, J = p.in_features;
  const int64_t begin = p.expert_offsets[e], m = p.expert_offsets[e + 1] - begin;
  const int64_t depth = round_up<int64_t>(m, 32), lda = depth + 32;
  const int64_t n = o_end - o_begin, padded_n = round_up<int64_t>(n, 32);
  const auto* a_scale = static_cast<const float*>(p.a_scale);
  const int64_t size = dtype_size(p.out_type);
  char* out = static_cast<char*>(p.out) + (e * O + o_begin) * J * size;

  ScratchScope scratch;
  auto* g = scratch.take<uint16_t>(Scratch::kTokens, padded_n * lda);
  transpose_grad(p, k, begin, m, o_begin, n, g, lda);

  const bool large = !p.accumulate && p.out_type == DType::kBFloat16 &&
                     p.num_experts * O * J * size >= kStreamBytes;
  TileOptions none;
  const int64_t j_block = balanced(J, kAmxRowMajorFeatures, 32);
  auto* copies = scratch.take<uint16_t>(Scratch::kPackA, depth * j_block);
  float* widened = scratch.take<float>(Scratch::kRowAsFloat, j_block);
  const int64_t panel_stride = depth * 32 + 2 * kPanelPad, widest = round_up<int64_t>(j_block, 32);
  auto* panels = scratch.take<uint16_t>(Scratch::kPackB, panel_stride * (widest / 32));
  float* tile = scratch.take<float>(Scratch::kTile, 32 * widest);
  std::vector<const uint16_t*> a_rows(static_cast<size_t>(depth), nullptr);
  for (int64_t j0 = 0; j0 < J; j0 += j_block) {
    const int64_t cols = std::min(j_block, J - j0), ldc = round_up<int64_t>(cols, 32);
    for (int64_t r = 0; r < m; ++r) {
      const void* src = element(row_of(p.a, begin + r), p.a.type, j0);
      const float scale = a_scale ? a_scale[begin + r] : 1.0f;
      a_rows[r] = static_cast<const uint16_t*>(src);
      if (p.a.type != DType::kBFloat16 || scale != 1.0f) {
        load_bf16_row(p.a.type, src, cols, scale, widened, copies + r * j_block);
        a_rows[r] = copies + r * j_block;
      }
    }
    k.bf16_pack_b(a_rows.data(), 0, depth, cols, panels, panel_stride);
    for (int64_t o = 0; o < n; o += 32) {
      k.amx.begin();
      for (int64_t j = 0; j < ldc; j += 32) {
        k.amx.panel(
            {depth / 32, g + o * lda, lda, n - o > 16 ? 2 : 1, panels + j / 32 * panel_stride},
            {tile + j, ldc, false}, none);
      }
      k.amx.end();
      for (int64_t i = 0; i < std::min<int64_t>(32, n - o); ++i) {
        float* row = tile + i * ldc;
        char* dst = out + ((o + i) * J + j0) * size;
        if (large) {
          row_kernels<float>().stream_row(p.out_type, row, dst, cols);
        } else {
          if (p.accumulate) row_kernels<float>().axpy(p.out_type, dst, 1.0f, row, cols);
          row_kernels<float>().store_row(p.out_type, row, dst, cols);
        }
      }
    }
  }
  if (large) row_kernels<float>().stream_fence();
}

}  // namespace moe_ops::cpu
