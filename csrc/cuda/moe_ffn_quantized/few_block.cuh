// Blocks of the kernels for few rows per expert: which lines of w and features of out a block has,
// and what becomes of the sums of its warps.
#pragma once

#include <algorithm>

#include "cuda/moe_ffn/fused_act.cuh"
#include "cuda/moe_ffn_quantized/stage.h"
#include "cuda/row_experts.cuh"

namespace moe_ops::cuda::quantized {

struct FewLaunch {
  QuantStage s;
  FusedAct act;
  int tiles;       // of features
  int tile_lines;  // features of one: 16 with a gate, else 32
  int64_t blocks;
};

inline FewLaunch few_launch(const QuantStage& s) {
  FewLaunch launch{s, fused_act(s.act), 0, s.gated ? 16 : 32, 0};
  launch.tiles = static_cast<int>(ceil_div<int64_t>(s.features, launch.tile_lines));
  launch.blocks = std::min(s.num_experts, s.num_rows) * launch.tiles;
  return launch;
}

// Returns whether kernels can count blocks, and the scales of an expert, in 32 bits.
inline bool counts_fit(const FewLaunch& launch) {
  const QuantStage& s = launch.s;
  const int64_t scales = s.features * (s.gated ? 2 : 1) * s.w.format.scale_stride_o;
  return launch.blocks <= INT32_MAX && scales <= INT32_MAX;
}

// Returns whether every line of w starts on 16 bytes and consists of whole 16 bytes.
inline bool lines_aligned(const QuantStage& s) {
  return reinterpret_cast<uintptr_t>(s.w.data) % 16 == 0 && s.w.stride_e % 16 == 0 &&
         s.w.stride_o % 16 == 0 && s.depth * s.w.format.bits % 128 == 0;
}

// Stores zeros to the rows of out without an expert, in the features of a tile.
template <class S>
__device__ void zero_tail(const FewLaunch& p, int64_t f0) {
  const QuantStage& s = p.s;
  const int rows = static_cast<int>(s.num_rows), width = p.tile_lines;
  const int first = min(max(s.expert_offsets[s.num_experts], 0), rows);
  for (int64_t at = threadIdx.x; at < int64_t{rows - first} * width; at += blockDim.x) {
    const int64_t r = first + at / width, f = f0 + at % width;
    if (f < s.out_stride) static_cast<S*>(s.out)[r * s.out_stride + f] = narrow<S>(0.0f);
  }
}

// Returns the line i of tile `tile` from feature f0 on, as a row of w.
__device__ __forceinline__ int64_t line_of(const QuantStage& s, int64_t f0, int tile, int i) {
  if (!s.gated) return f0 + 16 * tile + i;
  return s.act.interleaved ? 2 * (f0 + i) + tile : f0 + i + tile * s.features;
}

// Returns the row of w of a lane's line `in_tile`. Past the last feature it is the last one again:
// nobody reads its sums.
__device__ __forceinline__ int64_t lane_line(const QuantStage& s, int64_t f0, int tile,
                                             int64_t in_tile) {
  const int64_t last = s.features - 1 - f0 - (s.gated ? 0 : 16 * tile);
  return last < 0 ? line_of(s, 0, 0, 0)
                  : line_of(s, f0, tile, static_cast<int>(min(in_tile, last)));
}

// Adds up the partial sums of the warps, for rows row0 to row0 + count of the expert, and stores
// what the stage makes of them. line_scale(line): a factor of the sums of a line.
template <class S, int kRowTiles, int kWarps, class LineScale>
__device__ void few_finish(const FewLaunch& p, const float (*partial)[2][kRowTiles][4][kWarp],
                           const LineScale& line_scale, int expert, int64_t f0, int row0,
                           int count) {
  const QuantStage& s = p.s;
  for (int at = static_cast<int>(threadIdx.x); at < 16 * count; at += kWarps * kWarp) {
    const int i = at % 16, j = at / 16, r = row0 + j;
    const int reg = i / 8 * 2 + j % 2, lane = i % 8 * 4 + j % 8 / 2;
    const float factor = row_factor<float>(s.factor, r);
    float v[2];
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      v[tile] = 0;
      const int64_t f = f0 + i + (s.gated ? 0 : 16 * tile);
      if (f >= s.features) continue;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += partial[w][tile][j / 8][reg][lane];
      const int64_t line = line_of(s, f0, tile, i);
      sum *= line_scale(line);
      const float bias =
          s.bias.data == nullptr
              ? 0.0f
              : widen(static_cast<const S*>(s.bias.data)[expert * s.bias.stride_e + line]);
      v[tile] = fmaf(sum, factor, bias);
    }
    if (s.activate) {
      with_family(p.act.family, [&](auto family) {
        if (s.gated) {
          v[0] = fused_forward<family.value>(p.act, v[0], v[1]);
        } else {
          v[0] = fused_forward<family.value>(p.act, v[0], 0.0f);
          v[1] = fused_forward<family.value>(p.act, v[1], 0.0f);
        }
      });
    }
    S* const out = static_cast<S*>(s.out) + r * s.out_stride;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const int64_t f = f0 + i + 16 * tile;
      if ((s.gated && tile == 1) || f >= s.out_stride) continue;
      out[f] = narrow<S>(f < s.features ? v[tile] : 0.0f);
    }
  }
}

}  // namespace moe_ops::cuda::quantized
