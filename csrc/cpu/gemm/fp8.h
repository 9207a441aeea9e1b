// The grouped product of e4m3 operands. Blocks of 128 steps of k are products of the codes, which
// float32 and bfloat16 hold exactly, in an accumulator of their own; scaled, they are added to the
// sums. Few rows read weights as they lie; more rows go through the register tiles: weight rows,
// decoded once a block of tokens, are A, and tokens are packed as B. A weight gradient is the same
// product of the features of both operands.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/gemm/heuristics.h"
#include "cpu/gemm/pack_b.h"
#include "cpu/kernels/fp8.h"
#include "moe_ops/grouped_gemm_fp8.h"

namespace moe_ops::cpu {

struct Fp8Desc : GemmProblem {
  Fp8Rows a;
  Fp8Matrices b;
  int64_t b_stride_k = 1;

  int64_t blocks() const { return ceil_div(in_features, kFp8Block); }
  const uint8_t* row(int64_t r) const {
    return a.data + (a.index != nullptr ? a.index[r] : r) * a.stride;
  }
  const float* row_scale(int64_t r) const {
    return a.scale + (a.index != nullptr ? a.index[r] : r) * a.scale_stride;
  }
  float row_scale(int64_t r, int64_t block) const { return row_scale(r)[block]; }
  const uint8_t* weight(int64_t e, int64_t o) const {
    return b.data + e * b.stride_e + o * b.stride_o;
  }
  // Returns the stride between rows of values: features, or steps of k if they are transposed.
  int64_t weight_stride() const { return turned() ? b_stride_k : b.stride_o; }
  const float* weight_scale(int64_t e, int64_t o) const {
    return b.scale + e * b.scale_stride_e + o / kFp8Block * b.scale_stride_o;
  }
  float weight_scale(int64_t e, int64_t o, int64_t block) const {
    return weight_scale(e, o)[block];
  }
  // Returns whether weights are dense along features, as in the gradient of a layer's input.
  bool turned() const { return b_stride_k != 1; }
};

// The weight gradient of expert e: rows of the product are features of grad, features those of a.
struct Fp8WgradDesc {
  Fp8Columns grad, a;
  int64_t in_features;  // rows of the expert
  int64_t features;
  int segments = 1;

  Fp8WgradDesc(const GroupedGemmFp8WgradParams& p, int64_t e)
      : grad(p.grad),
        a(p.a),
        in_features(p.expert_offsets[e + 1] - p.expert_offsets[e]),
        features(p.in_features) {
    const int64_t group = fp8_first_group(p.expert_offsets[e], e);
    for (Fp8Columns* c : {&grad, &a}) {
      c->data += group * kFp8Block;
      c->scale += group * c->scale_stride;
    }
  }
  int64_t blocks() const { return ceil_div(in_features, kFp8Block); }
  const uint8_t* row(int64_t o) const { return grad.data + o * grad.stride; }
  float row_scale(int64_t o, int64_t block) const {
    return grad.scale[block * grad.scale_stride + o];
  }
  const uint8_t* weight(int64_t, int64_t k) const { return a.data + k * a.stride; }
  int64_t weight_stride() const { return a.stride; }
  float weight_scale(int64_t, int64_t k, int64_t block) const {
    return a.scale[block * a.scale_stride + k];
  }
};

// Transposes bytes: dst[c][r] = src[r][c] for r < rows and c < cols.
inline void turn_bytes(const uint8_t* src, int64_t ld_src, int64_t rows, int64_t cols, uint8_t* dst,
                       int64_t ld_dst) {
  constexpr int64_t S = 8;
  // Blocks of 8 x 8 as eight words, whose quarters, then pairs of bytes, then bytes change places.
  const auto swap = [](uint64_t& a, uint64_t& b, int shift, uint64_t mask) {
    const uint64_t t = ((a >> shift) ^ b) & mask;
    b ^= t;
    a ^= t << shift;
  };
  for (int64_t r = 0; r < rows; r += S) {
    for (int64_t c = 0; c < cols; c += S) {
      const int64_t height = std::min(S, rows - r), width = std::min(S, cols - c);
      uint64_t w[S] = {};
      for (int64_t i = 0; i < height; ++i) {
        std::memcpy(&w[i], src + (r + i) * ld_src + c, static_cast<size_t>(width));
      }
      for (int i = 0; i < 4; ++i) swap(w[i], w[i + 4], 32, 0x00000000ffffffffu);
      for (const int i : {0, 1, 4, 5}) swap(w[i], w[i + 2], 16, 0x0000ffff0000ffffu);
      for (const int i : {0, 2, 4, 6}) swap(w[i], w[i + 1], 8, 0x00ff00ff00ff00ffu);
      for (int64_t i = 0; i < width; ++i) {
        std::memcpy(dst + (c + i) * ld_dst + r, &w[i], static_cast<size_t>(height));
      }
    }
  }
}

inline GemmConfig choose_config(const Fp8Desc& d, int64_t rows) {
  // A GEMV reads weights along k.
  if (d.turned()) rows = std::max(rows, kFp8GemvRows + 1);
  GemmShape s;
  s.b = GemmShape::B::kFp8;
  s.features = s.range = d.features;
  s.segments = d.segments;
  s.in_features = d.in_features;
  s.invariant = d.invariant;
  return choose_config(s, gemm_kernels<float>(), quant_kernels(), rows);
}

inline std::vector<GemmItem> gemm_items(const Fp8Desc& d, int num_threads) {
  return gemm_items(d, num_threads, 0, d.features,
                    [&](int64_t rows) { return choose_config(d, rows); });
}

// Computes an item by GEMV, which reads codes in place, in four long streams like gemv_item; its
// blocked form, for more rows, decodes four rows of weights once. The sums of both are bitwise
// identical.
template <class Epilogue>
void fp8_gemv_item(const Fp8Desc& d, const GemmKernels<float>& k, const GemmItem& it,
                   const Epilogue& fn) {
  const Fp8Kernels& kernels = fp8_kernels();
  constexpr int64_t F = kGemvFeatures;
  const bool blocked = it.config.algorithm == Algorithm::kGemvBlocked;
  const int64_t m = it.row_end - it.row_begin, n = it.feature_end - it.feature_begin;
  const int64_t K = d.in_features, ldx = round_up<int64_t>(K, k.lanes) + kPanelPad / 2;
  ScratchScope scratch;
  float* x = scratch.take<float>(Scratch::kTokens, m * ldx);
  float* decoded = scratch.take<float>(Scratch::kPackB, blocked ? F * ldx : 0);
  const float* x_scale[kRowBlock];
  for (int64_t t = 0; t < m; ++t) {
    kernels.decode(d.row(it.row_begin + t), x + t * ldx, K);
    std::fill(x + t * ldx + K, x + (t + 1) * ldx, 0.0f);
    x_scale[t] = d.row_scale(it.row_begin + t);
  }
  const int64_t ldo = n * d.segments, groups = n / F;
  float* out = scratch.take<float>(Scratch::kTile, m * ldo);
  for (int s = 0; s < d.segments; ++s) {
    for (int64_t i = 0; i < groups + n % F; ++i) {
      const int64_t features = i < groups ? F : 1;
      const int64_t first = i >= groups ? groups * F + i - groups : blocked ? i * F : i;
      const int64_t step = i < groups && !blocked ? groups : 1;
      const int64_t feature = s * d.features + it.feature_begin + first;
      const float* w_scale[F];
      for (int64_t f = 0; f < features; ++f) {
        w_scale[f] = d.weight_scale(it.expert, feature + f * step);
        if (blocked) kernels.decode(d.weight(it.expert, feature + f), decoded + f * ldx, K);
      }
      for (int64_t t = 0; t < m; t += kFp8DotTokens) {
        const Fp8DotParams p = {
            .features = static_cast<int>(features),
            .tokens = static_cast<int>(std::min<int64_t>(kFp8DotTokens, m - t)),
            .k = K,
            .w = blocked ? static_cast<const void*>(decoded) : d.weight(it.expert, feature),
            .ldw = blocked ? ldx : step * d.b.stride_o,
            .w_scale = w_scale,
            .x = x + t * ldx,
            .ldx = ldx,
            .x_scale = x_scale + t,
            .out = out + t * ldo + s * n + first,
            .ldo = ldo,
            .out_step = step};
        blocked ? kernels.dot_widened(p) : kernels.dot(p);
      }
    }
  }
  for (int64_t t = 0; t < m; ++t) {
    fn(it.expert, it.row_begin + t, it.feature_begin, n, out + t * ldo, out + t * ldo + n);
  }
}

// Computes an item by GEMV with products in bfloat16, which holds every code exactly; one pass of
// tokens, with weights in four long streams.
template <class Epilogue>
void fp8_bf16_gemv_item(const Fp8Desc& d, const GemmItem& it, const Epilogue& fn) {
  const QuantKernels& kernels = quant_kernels();
  constexpr int64_t F = kGemvFeatures;
  const int64_t m = it.row_end - it.row_begin, n = it.feature_end - it.feature_begin;
  const int64_t K = d.in_features, padded_k = round_up<int64_t>(K, 256), ldx = e4m3_row_floats(K);
  ScratchScope scratch;
  float* x = scratch.take<float>(Scratch::kPackA, padded_k);
  float* tokens = scratch.take<float>(Scratch::kTokens, m * ldx);
  const float* x_scale[kFp8GemvRows];
  std::fill(x + K, x + padded_k, 0.0f);
  for (int64_t t = 0; t < m; ++t) {
    fp8_kernels().decode(d.row(it.row_begin + t), x, K);
    kernels.e4m3_arrange(K, x, tokens + t * ldx);
    x_scale[t] = d.row_scale(it.row_begin + t);
  }
  const CodeRows rows = {
      .codes = Codes::kFp8,
      .k = K,
      .scale_type = ScaleType::kFloat32,
      .group = kFp8Block,
      .w = d.weight(it.expert, 0),
      .ldw = d.b.stride_o,
      .scale = d.weight_scale(it.expert, 0),
      .ld_scale = d.b.scale_stride_o * static_cast<int64_t>(sizeof(float)),
      .scale_rows = kFp8Block,
      .zero = nullptr,
      .ld_zero = 0,
  };
  const int64_t ldo = n * d.segments, groups = n / F;
  float* out = scratch.take<float>(Scratch::kTile, m * ldo);
  for (int s = 0; s < d.segments; ++s) {
    // `count` times `features` features from `first` on, `step` apart.
    const auto run = [&](int64_t features, int64_t count, int64_t first, int64_t step) {
      if (count == 0) return;
      kernels.e4m3_dot({.rows = rows,
                        .first = s * d.features + it.feature_begin + first,
                        .step = step,
                        .features = static_cast<int>(features),
                        .count = count,
                        .tokens = static_cast<int>(m),
                        .x = tokens,
                        .x_bytes = ldx * static_cast<int64_t>(sizeof(float)),
                        .scratch = nullptr,
                        .out = out + s * n + first,
                        .ldo = ldo,
                        .out_step = step,
                        .x_scale = x_scale});
    };
    run(F, groups, 0, groups);
    run(1, n % F, groups * F, 1);
  }
  for (int64_t t = 0; t < m; ++t) {
    fn(it.expert, it.row_begin + t, it.feature_begin, n, out + t * ldo, out + t * ldo + n);
  }
}

template <class Op, bool kTurned, class Desc, class Epilogue>
void fp8_pack_tokens_item(const Desc& d, const GemmKernels<float>& k, const GemmItem& it,
                          const Epilogue& fn) {
  const Fp8Kernels& kernels = fp8_kernels();
  constexpr int64_t kStep = Op::kSteps;
  constexpr int64_t kBlock = kFp8Block / kStep;
  const auto& tiles = Op::row_a(k);
  const int64_t W = k.lanes, K = d.in_features, k_blocks = d.blocks();
  const int64_t m = it.row_end - it.row_begin, n = it.feature_end - it.feature_begin;
  const int64_t total = n * d.segments;
  const int64_t padded_m = round_up(m, W), padded_n = round_up(total, W);
  // Blocks of k that stay packed while weights are read: runs of up to 1 KiB of each weight row.
  const int64_t block_bytes = padded_m * kBlock * static_cast<int64_t>(sizeof(float));
  const int64_t chunk = std::clamp<int64_t>(kWholeDepthBytes / block_bytes, 1, k_blocks);
  const int64_t ld_codes = chunk * kFp8Block, turned_bytes = kTurned ? total * ld_codes : 0;
  ScratchScope scratch;
  Arena arena(
      scratch, Scratch::kPackA,
      4 * (kMaxMr * kLda + kMaxMr * 2 * W + chunk * padded_m + kMaxMr) + turned_bytes + 5 * 64);
  float* a = arena.take<float>(kMaxMr * kLda);
  float* partial = arena.take<float>(kMaxMr * 2 * W);
  float* token_scale = arena.take<float>(chunk * padded_m);
  float* weight_scale = arena.take<float>(kMaxMr);
  uint8_t* codes = arena.take<uint8_t>(turned_bytes);
  float* panels = scratch.take<float>(Scratch::kPackB, chunk * padded_m * kBlock);
  float* rows = scratch.take<float>(Scratch::kTokens, std::max(2 * W * kLda, padded_m * padded_n));
  float* sums = scratch.take<float>(Scratch::kTile, padded_n * padded_m);
  // Elements of block b of k, and its codes as elements; what the last pair lacks is zero.
  const auto depth = [&](int64_t b) {
    return ceil_div(std::min(kFp8Block, K - b * kFp8Block), kStep);
  };
  const auto widen = [&](const uint8_t* src, int64_t b, float* dst) {
    const int64_t count = std::min(kFp8Block, K - b * kFp8Block);
    if constexpr (Op::kBf16) {
      auto* halves = reinterpret_cast<uint16_t*>(dst);
      kernels.decode_bf16(src, halves, count);
      if (count % 2 != 0) halves[count] = 0;
    } else {
      kernels.decode(src, dst, count);
    }
  };
  const int64_t mr = padded_m == W ? k.mr1 : k.mr2;
  const int64_t blocks = ceil_div(total, mr);
  const BalancedPartition tile_rows(total, blocks);
  const auto feature_of = [&](int64_t i) { return i / n * d.features + it.feature_begin + i % n; };
  for (int64_t b0 = 0; b0 < k_blocks; b0 += chunk) {
    const int64_t b1 = std::min(k_blocks, b0 + chunk);
    if constexpr (kTurned) {
      const int64_t k0 = b0 * kFp8Block, depth_of_chunk = std::min(K - k0, ld_codes);
      for (int s = 0; s < d.segments; ++s) {
        turn_bytes(d.weight(it.expert, s * d.features + it.feature_begin) + k0 * d.weight_stride(),
                   d.weight_stride(), depth_of_chunk, n, codes + s * n * ld_codes, ld_codes);
      }
    }
    // The codes of feature i of the item in block b.
    const auto weight = [&](int64_t i, int64_t b) -> const uint8_t* {
      if constexpr (kTurned) return codes + i * ld_codes + (b - b0) * kFp8Block;
      return d.weight(it.expert, feature_of(i)) + b * kFp8Block;
    };
    for (int64_t b = b0; b < b1; ++b) {
      for (int64_t t = 0; t < padded_m; ++t) {
        token_scale[(b - b0) * padded_m + t] = t < m ? d.row_scale(it.row_begin + t, b) : 0.0f;
      }
      for (int64_t t0 = 0; t0 < padded_m; t0 += 2 * W) {
        const int64_t width = std::min(2 * W, padded_m - t0);
        for (int64_t t = 0; t < width; ++t) {
          const int64_t r = it.row_begin + t0 + t;
          if (r < it.row_end) {
            widen(d.row(r) + b * kFp8Block, b, rows + t * kLda);
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
          widen(weight(f, b), b, a + (f - i0) * kLda);
          weight_scale[f - i0] = d.weight_scale(it.expert, feature_of(f), b);
        }
        // The tiles prefetch the weights of the next step: the next block of k, or the next rows.
        TileOptions next;
        const bool last = b + 1 == b1;
        const int64_t next_i = last ? i1 : i0, next_b = last ? b0 : b + 1;
        if (next_i < total) {
          next.base = reinterpret_cast<const char*>(weight(next_i, next_b));
          next.stride = kTurned ? ld_codes : d.weight_stride();
          next.rows = std::min(mr, n - next_i % n);
          next.bytes = std::min(kFp8Block, K - next_b * kFp8Block);
          next.spread(std::max<int64_t>(1, kc / kPrefetchStep) * ceil_div(padded_m, 2 * W),
                      k.prefetch_halves);
        }
        for (int64_t t0 = 0; t0 < padded_m; t0 += 2 * W) {
          const int64_t width = std::min(2 * W, padded_m - t0);
          tiles[width / W - 1][i1 - i0 - 1](kc, a, panels + (b - b0) * padded_m * kBlock + t0 * kc,
                                            {partial, width, false}, next);
          kernels.promote({.rows = i1 - i0,
                           .cols = width,
                           .block = partial,
                           .ld_block = width,
                           .row_scale = weight_scale,
                           .col_scale = token_scale + (b - b0) * padded_m + t0,
                           .sums = sums + i0 * padded_m + t0,
                           .ld_sums = padded_m,
                           .accumulate = b > 0});
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

template <bool kTurned, class Desc, class Epilogue>
void fp8_pack_tokens_item(const Desc& d, const GemmKernels<float>& k, const GemmItem& it,
                          const Epilogue& fn) {
  it.config.operand == Operand::kFp8Bf16 ? fp8_pack_tokens_item<Bf16, kTurned>(d, k, it, fn)
                                         : fp8_pack_tokens_item<Wide, kTurned>(d, k, it, fn);
}

template <class Epilogue>
void run_item(const Fp8Desc& d, const GemmItem& it, const Epilogue& fn) {
  const GemmKernels<float>& k = gemm_kernels<float>();
  switch (it.config.algorithm) {
    case Algorithm::kGemv:
    case Algorithm::kGemvBlocked:
      if (it.config.operand == Operand::kFp8Bf16) return fp8_bf16_gemv_item(d, it, fn);
      return fp8_gemv_item(d, k, it, fn);
    case Algorithm::kPackTokens:
      return d.turned() ? fp8_pack_tokens_item<true>(d, k, it, fn)
                        : fp8_pack_tokens_item<false>(d, k, it, fn);
    default:
      return zero_item<float>(it, fn);
  }
}

}  // namespace moe_ops::cpu
