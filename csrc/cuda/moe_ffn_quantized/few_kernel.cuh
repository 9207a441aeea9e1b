// Few rows an expert: the bytes of the weights are nearly all there is, so each is read once, in
// accesses of 16 bytes that go straight to registers.
//
// A block makes 32 features of an expert's rows, with a gate the gate and the up of 16 columns. Its
// warps split the sum: they alternate in steps of 64 bytes of all 32 lines, and the partial sums
// are added up in the order of the warps. Lines are the M of mma.sync, 16 at a time, and rows the
// N, 8 at a time: nothing is multiplied more often than 8 rows need.
//
// Lane l has line l / 4 of a tile and the 16 bytes l % 4 of the step. The k of a fragment may be
// any k as long as both operands agree, so what a lane has loaded is what it multiplies: with 8
// bits the four lanes of a line work on codes that lie 16 apart. With 4 bits these would be of
// different groups; a transpose within the four lanes makes each access one group of 32, spread
// over them.
#pragma once

#include <cute/arch/mma_sm80.hpp>

#include "cuda/grouped_gemm/launch.cuh"
#include "cuda/moe_ffn_quantized/codes.cuh"
#include "cuda/moe_ffn_quantized/few_block.cuh"
#include "cuda/overlap.cuh"
#include "cuda/quad.cuh"

namespace moe_ops::cuda::quantized {

constexpr int kStepBytes = 64;  // of a line

// Row tiles of 8 that a block takes at once: 1 or 4. The sums of 4 want up to 200 registers, so
// these blocks are smaller.
template <int kRowTiles>
struct FewConfig {
  static constexpr int kWarps = kRowTiles == 1 ? 8 : 4, kBlocksPerSm = 2;
  static constexpr int kThreads = kWarps * kWarp;
};

// Eight neighboring numbers of a row of x, as `first` and `rest` of the products with codes: rest
// is what float32 needs beside tf32. In the order of expand8 or expand4.
template <class S, int kBits>
struct Operand {
  uint32_t r[4];

  __device__ __forceinline__ void load(const S* x) {
    const uint4 v = *reinterpret_cast<const uint4*>(x);
    if constexpr (kBits == 8) {
      r[0] = v.x, r[1] = v.y, r[2] = v.z, r[3] = v.w;
    } else {
      r[0] = __byte_perm(v.x, v.z, 0x5410);
      r[1] = __byte_perm(v.x, v.z, 0x7632);
      r[2] = __byte_perm(v.y, v.w, 0x5410);
      r[3] = __byte_perm(v.y, v.w, 0x7632);
    }
  }
};

template <int kBits>
struct Operand<float, kBits> {
  uint32_t first[8], rest[8];

  __device__ __forceinline__ void load(const float* x) {
    const Wide<float, 4> v[2] = {load_wide<4>(x), load_wide<4>(x + 4)};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float value = v[i / 4].v[i % 4];
      first[i] = __float_as_uint(value) & 0xffffe000u;
      asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rest[i]) : "f"(value - __uint_as_float(first[i])));
    }
  }
};

// Eight codes of lines g and g + 8 times the eight numbers of a row.
template <class S>
struct Codes {
  uint32_t low[4], high[4];

  template <int kBits>
  __device__ __forceinline__ void expand(const uint32_t (&low_words)[2],
                                         const uint32_t (&high_words)[2]) {
    if constexpr (kBits == 8) {
      expand8<S>(low_words[0], low_words[1], low);
      expand8<S>(high_words[0], high_words[1], high);
    } else {
      expand4<S>(low_words[0], low);
      expand4<S>(high_words[0], high);
    }
  }
  template <int kBits>
  __device__ __forceinline__ void multiply(float (&c)[4], const Operand<S, kBits>& x) const {
    using Mma = std::conditional_t<std::is_same_v<S, bf16>, cute::SM80_16x8x16_F32BF16BF16F32_TN,
                                   cute::SM80_16x8x16_F32F16F16F32_TN>;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      Mma::fma(c[0], c[1], c[2], c[3], low[i], high[i], low[i + 1], high[i + 1], x.r[i], x.r[i + 1],
               c[0], c[1], c[2], c[3]);
    }
  }
};

template <>
struct Codes<float> {
  float low[8], high[8];

  template <int kBits>
  __device__ __forceinline__ void expand(const uint32_t (&low_words)[2],
                                         const uint32_t (&high_words)[2]) {
    if constexpr (kBits == 8) {
      expand8(low_words[0], low_words[1], low);
      expand8(high_words[0], high_words[1], high);
    } else {
      expand4(low_words[0], low);
      expand4(high_words[0], high);
    }
  }
  template <int kBits>
  __device__ __forceinline__ void multiply(float (&c)[4], const Operand<float, kBits>& x) const {
    using Mma = cute::SM80_16x8x8_F32TF32TF32F32_TN;
    const auto bits = [](float v) { return __float_as_uint(v); };
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
#pragma unroll
      for (int term = 0; term < 2; ++term) {
        const uint32_t (&b)[8] = term == 0 ? x.rest : x.first;
        Mma::fma(c[0], c[1], c[2], c[3], bits(low[i]), bits(high[i]), bits(low[i + 1]),
                 bits(high[i + 1]), b[i], b[i + 1], c[0], c[1], c[2], c[3]);
      }
    }
  }
};

// The four lines of a lane, g and g + 8 of both tiles, at the bytes of the step: 16 of each.
struct FewLines {
  const uint8_t* codes[2][2];
  int scales[2][2];  // of the line's first group, from the expert's first on
};

// 16 bytes of each line and, with groups, the scale of the lane's own 32 codes.
template <int kGroup>
struct FewStep {
  uint32_t words[2][2][4];
  float scale[2][2];

  // Loads a step. The lane's bytes are `ahead` from those of `lines`, at `byte` of a line of
  // line_bytes.
  template <bool kAligned>
  __device__ __forceinline__ void load(const FewLines& lines, const float* scales, int ahead,
                                       int byte, int line_bytes) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint4 v = make_uint4(0, 0, 0, 0);
      float& factor = scale[i / 2][i % 2];
      factor = 0;
      const uint8_t* const from = lines.codes[i / 2][i % 2] + ahead;
      if (byte < line_bytes) {
        if constexpr (kAligned) {
          // Nobody reads these weights again before the next call.
          v = __ldcs(reinterpret_cast<const uint4*>(from));
        } else {
          union {
            uint8_t bytes[16];
            uint4 all;
          } u;
#pragma unroll
          for (int n = 0; n < 16; ++n) u.bytes[n] = byte + n < line_bytes ? from[n] : uint8_t{0};
          v = u.all;
        }
        if constexpr (kGroup != 0) factor = scales[lines.scales[i / 2][i % 2] + 2 * byte / kGroup];
      }
      uint32_t (&w)[4] = words[i / 2][i % 2];
      w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
    }
  }
};

// The sums of up to kRows rows. Lanes without a row, which make sums that nobody reads, have the
// first one.
template <class S, int kGroup, int kRowTiles>
struct FewRows {
  static constexpr int kBits = kGroup == 0 ? 8 : 4;
  static constexpr int kRows = 8 * kRowTiles;
  float sum[2][kRowTiles][4];
  const S* row[kRowTiles];  // row g of each tile
  int count;                // of rows, kRows at most

  __device__ __forceinline__ void start(const DeviceRows& a, int begin, int end) {
    count = min(end - begin, kRows);
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      const int r = 8 * j + static_cast<int>(threadIdx.x) % kWarp / 4;
      const int source = max(source_row(a, begin + (r < count ? r : 0)), 0);
      row[j] = static_cast<const S*>(a.data) + source * a.stride;
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[0][j][i] = sum[1][j][i] = 0;
    }
  }

  // Adds eight codes of each line, words `first` and `second` of the step (4 bits: `first` alone),
  // times eight numbers from k on.
  __device__ __forceinline__ void eight(const FewStep<kGroup>& step, int first, int second, int k,
                                        float (&to)[2][kRowTiles][4]) const {
    Codes<S> codes[2];
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const auto& w = step.words[tile];
      const uint32_t low[2] = {w[0][first], w[0][second]}, high[2] = {w[1][first], w[1][second]};
      codes[tile].template expand<kBits>(low, high);
    }
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      if (j > 0 && 8 * j >= count) break;
      Operand<S, kBits> x;
      x.load(row[j] + k);
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) codes[tile].multiply(to[tile][j], x);
    }
  }

  // Adds a loaded step to the sums. byte: see load.
  __device__ __forceinline__ void add(FewStep<kGroup>& step, int byte, int line_bytes) {
    if constexpr (kGroup == 0) {
      // Codes past the end are zeros.
      const int k = byte < line_bytes ? byte : 0;
#pragma unroll
      for (int i = 0; i < 2; ++i) eight(step, 2 * i, 2 * i + 1, k + 8 * i, sum);
    } else {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        quad_transpose(step.words[tile][0]);
        quad_transpose(step.words[tile][1]);
      }
      const int lane = static_cast<int>(threadIdx.x) % 4, start = byte - 16 * lane;
      float part[2][kRowTiles][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (start + 16 * i >= line_bytes) break;
        if (32 * i % kGroup == 0) {
#pragma unroll
          for (int n = 0; n < 8 * kRowTiles; ++n) (&part[0][0][0])[n] = 0;
        }
        eight(step, i, i, 2 * start + 32 * i + 8 * lane, part);
        if (32 * (i + 1) % kGroup != 0) continue;
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float scale = step.scale[tile][half];
            if (kGroup < 128) scale = __shfl_sync(kAllLanes, scale, i, 4);
#pragma unroll
            for (int j = 0; j < kRowTiles; ++j) {
#pragma unroll
              for (int n = 2 * half; n < 2 * half + 2; ++n)
                sum[tile][j][n] = fmaf(part[tile][j][n], scale, sum[tile][j][n]);
            }
          }
        }
      }
    }
  }
};

// kGroup: 4-bit codes that share a scale; 0: 8-bit codes with one scale per line.
template <class S, int kGroup, bool kAligned, int kRowTiles>
__global__ void __launch_bounds__(FewConfig<kRowTiles>::kThreads,
                                  FewConfig<kRowTiles>::kBlocksPerSm)
    quantized_few_kernel(const __grid_constant__ FewLaunch p) {
  using Rows = FewRows<S, kGroup, kRowTiles>;
  constexpr int kWarps = FewConfig<kRowTiles>::kWarps;
  __shared__ float partial[kWarps][2][kRowTiles][4][kWarp];
  const QuantStage& s = p.s;
  await_previous_kernel();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int ordinal = static_cast<int>(blockIdx.x) / p.tiles;
  const int64_t f0 =
      static_cast<int64_t>(static_cast<int>(blockIdx.x) - ordinal * p.tiles) * p.tile_lines;
  if (s.zero_tail && ordinal == 0) zero_tail<S>(p, f0);
  const int expert = expert_with_rows(s.expert_offsets, static_cast<int>(s.num_experts),
                                      static_cast<int>(s.num_rows), ordinal);
  if (expert < 0) return;
  const RowRange range = expert_rows(s.expert_offsets, expert, static_cast<int>(s.num_rows));

  const QuantFormat& format = s.w.format;
  const float* const scales = format.scale + expert * format.scale_stride_e;
  const int line_bytes = static_cast<int>(s.depth * Rows::kBits / 8);
  constexpr int kStride = kWarps * kStepBytes;
  const int first = warp * kStepBytes + lane % 4 * 16;
  const int end = line_bytes + lane % 4 * 16;  // all lanes leave together
#pragma unroll 1
  for (int row0 = range.begin; row0 < range.end; row0 += Rows::kRows) {
    FewLines lines;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t line = lane_line(s, f0, i / 2, lane / 4 + 8 * (i % 2));
      lines.codes[i / 2][i % 2] = static_cast<const uint8_t*>(s.w.data) + expert * s.w.stride_e +
                                  line * s.w.stride_o + first;
      lines.scales[i / 2][i % 2] = static_cast<int>(line * format.scale_stride_o);
    }
    Rows rows;
    rows.start(s.a, row0, range.end);
    if constexpr (kAligned) {
      // One step is under way while another is multiplied.
      FewStep<kGroup> even, odd;
      even.template load<true>(lines, scales, 0, first, line_bytes);
      odd.template load<true>(lines, scales, kStride, first + kStride, line_bytes);
#pragma unroll 1
      for (int byte = first; byte < end; byte += 2 * kStride) {
#pragma unroll
        for (int i = 0; i < 4; ++i) lines.codes[i / 2][i % 2] += 2 * kStride;
        rows.add(even, byte, line_bytes);
        even.template load<true>(lines, scales, 0, byte + 2 * kStride, line_bytes);
        if (byte + kStride >= end) break;
        rows.add(odd, byte + kStride, line_bytes);
        odd.template load<true>(lines, scales, kStride, byte + 3 * kStride, line_bytes);
      }
    } else {
#pragma unroll 1
      for (int byte = first; byte < end; byte += kStride) {
        FewStep<kGroup> step;
        step.template load<false>(lines, scales, byte - first, byte, line_bytes);
        rows.add(step, byte, line_bytes);
      }
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) partial[warp][tile][j][i][lane] = rows.sum[tile][j][i];
      }
    }
    __syncthreads();
    const auto line_scale = [&](int64_t line) {
      return kGroup == 0 ? scales[line * format.scale_stride_o] : 1.0f;
    };
    few_finish<S, kRowTiles, kWarps>(p, partial, line_scale, expert, f0, row0, rows.count);
    __syncthreads();  // The next rows' sums come to the same place.
  }
}

template <class S, int kGroup, bool kAligned, int kRowTiles>
Status launch_few(const FewLaunch& launch, Stream stream) {
  Launch at{static_cast<unsigned>(launch.blocks), FewConfig<kRowTiles>::kThreads, stream};
  at.overlaps = true;
  return launch_kernel<quantized_few_kernel<S, kGroup, kAligned, kRowTiles>>(at, launch);
}

template <class S, int kGroup>
Status run_few(const QuantStage& s, Stream stream) {
  const FewLaunch launch = few_launch(s);
  if (!counts_fit(launch)) return cudaErrorInvalidValue;
  // Codes that lie anywhere take 16 accesses, and come with 8 rows at a time only.
  if (!lines_aligned(s)) return launch_few<S, kGroup, false, 1>(launch, stream);
  return s.num_tokens <= 8 ? launch_few<S, kGroup, true, 1>(launch, stream)
                           : launch_few<S, kGroup, true, 4>(launch, stream);
}

template <class S>
Status run_few(const QuantStage& s, Stream stream) {
  if (s.w.format.bits == 8) return run_few<S, 0>(s, stream);
  switch (s.w.format.group) {
    case 32:
      return run_few<S, 32>(s, stream);
    case 64:
      return run_few<S, 64>(s, stream);
    default:
      return run_few<S, 128>(s, stream);
  }
}

}  // namespace moe_ops::cuda::quantized
