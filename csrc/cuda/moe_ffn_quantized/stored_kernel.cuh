// Few rows per expert, weights as checkpoints store them (stored_steps.cuh). Blocks, tiles and the
// sums of warps are those of few_kernel.cuh, 8 rows at a time. Scales multiply sums in fp32, but
// for nvfp4, whose e4m3 scales multiply codes exactly.
#pragma once

#include "cuda/launch.h"
#include "cuda/moe_ffn_quantized/stored_steps.cuh"
#include "cuda/overlap.cuh"

namespace moe_ops::cuda::quantized {

__device__ __forceinline__ StoredLines stored_lines(const StoredLaunch& p, int expert, int64_t f0) {
  const QuantStage& s = p.few.s;
  const QuantFormat& format = s.w.format;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t before = expert * format.scale_stride_e;
  StoredLines lines;
  lines.scales =
      static_cast<const uint8_t*>(format.scales) + before * scale_size(format.scale_type);
  lines.zeros = format.zero == nullptr ? nullptr : format.zero + before;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t line = lane_line(s, f0, i / 2, lane / 4 + 8 * (i % 2));
    lines.codes[i] = static_cast<const uint8_t*>(s.w.data) + expert * s.w.stride_e +
                     line * s.w.stride_o + 16 * quad_lane();
    lines.scale[i] = static_cast<int>(line / format.scale_rows * format.scale_stride_o);
  }
  return lines;
}

template <class S, class Step>
__global__ void __launch_bounds__(Step::kWarps* kWarp, Step::kBlocksPerSm)
    stored_few_kernel(const __grid_constant__ StoredLaunch p) {
  constexpr int kWarps = Step::kWarps, kRows = 8;
  __shared__ float partial[kWarps][2][1][4][kWarp];
  const QuantStage& s = p.few.s;
  await_previous_kernel();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  // By a shuffle, so that the compiler knows it to be the same in all lanes.
  const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarp, 0);
  const int ordinal = static_cast<int>(blockIdx.x) / p.few.tiles;
  const int64_t f0 =
      static_cast<int64_t>(static_cast<int>(blockIdx.x) - ordinal * p.few.tiles) * p.few.tile_lines;
  if (s.zero_tail && ordinal == 0) zero_tail<S>(p.few, f0);
  const int expert = expert_with_rows(s.expert_offsets, static_cast<int>(s.num_experts),
                                      static_cast<int>(s.num_rows), ordinal);
  if (expert < 0) return;
  const RowRange range = expert_rows(s.expert_offsets, expert, static_cast<int>(s.num_rows));
  const StoredLines lines = stored_lines(p, expert, f0);
  const auto line_factor = [&](int64_t line) {
    const QuantFormat& format = s.w.format;
    return Step::line_factor(lines.scales + line / format.scale_rows * format.scale_stride_o);
  };
#pragma unroll 1
  for (int row0 = range.begin; row0 < range.end; row0 += kRows) {
    const int count = min(range.end - row0, kRows);
    // Lanes without a row, which make sums that nobody reads, have the first one.
    const int own = max(source_row(s.a, row0 + (lane / 4 < count ? lane / 4 : 0)), 0);
    const S* const row = static_cast<const S*>(s.a.data) + own * s.a.stride;
    float sum[2][4] = {};
    // One step is under way while another is multiplied.
    Step step, next;
    if (warp < p.steps) step.load(p, lines, warp);
#pragma unroll 1
    for (int at = warp; at < p.steps; at += kWarps) {
      if (at + kWarps < p.steps) next.load(p, lines, at + kWarps);
      step.add(p, row, at, sum);
      step = next;
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) partial[warp][tile][0][i][lane] = sum[tile][i];
    }
    __syncthreads();
    few_finish<S, 1, kWarps>(p.few, partial, line_factor, expert, f0, row0, count);
    __syncthreads();  // The next rows' sums come to the same place.
  }
}

template <class S, class Step>
Status run_stored(const QuantStage& s, Stream stream) {
  StoredLaunch launch{few_launch(s), cutlass::FastDivmod(1), static_cast<int>(s.depth), 0, 0,
                      false};
  if (!counts_fit(launch.few)) return cudaErrorInvalidValue;
  launch.group = cutlass::FastDivmod(static_cast<int>(std::max<int64_t>(s.w.format.group, 1)));
  launch.steps = static_cast<int>(ceil_div<int64_t>(s.depth, Step::kWeights));
  launch.line_bytes = static_cast<int>(s.depth * s.w.format.bits / 8);
  launch.aligned = lines_aligned(s);
  Launch at{static_cast<unsigned>(launch.few.blocks), Step::kWarps * kWarp, stream};
  at.overlaps = true;
  return launch_kernel<stored_few_kernel<S, Step>>(at, launch);
}

template <class S>
Status run_stored(const QuantStage& s, Stream stream) {
  switch (s.w.format.codes) {
    case Codes::kInt8:
      return run_stored<S, GroupedStep<S, Codes::kInt8>>(s, stream);
    case Codes::kInt4:
      return run_stored<S, GroupedStep<S, Codes::kInt4>>(s, stream);
    case Codes::kMxfp4:
      return run_stored<S, GroupedStep<S, Codes::kMxfp4>>(s, stream);
    case Codes::kNvfp4:
      return run_stored<S, Nvfp4Step<S>>(s, stream);
    case Codes::kQ4K:
      return run_stored<S, Q4KStep<S>>(s, stream);
    case Codes::kQ6K:
      return run_stored<S, Q6KStep<S>>(s, stream);
    default:  // kE4m3, kFp8
      return run_stored<S, GroupedStep<S, Codes::kE4m3>>(s, stream);
  }
}

}  // namespace moe_ops::cuda::quantized
