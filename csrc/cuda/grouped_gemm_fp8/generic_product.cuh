// The product of two tiles of e4m3 codes in shared memory, for any card.
//
// Codes go to shared memory as they are, 128 of k a step, which is one block of scales. Fragments
// of e4m3 are widened in registers to float16, exactly, and multiplied by mma.sync m16n8k16 with
// fp32 sums; a step's sums are scaled and added to those of the tile.
//
// The k of an operand is permuted: the four codes of a lane, k = 4t to 4t + 3, take the places of
// k = 2t, 2t + 1, 2t + 8 and 2t + 9, in A and B alike, which leaves the sum what it is.
#pragma once

#include "cuda/fp8.cuh"
#include "cuda/grouped_gemm/gemm_kernel.cuh"

namespace moe_ops::cuda::generic {

// 8 warps of 32 x 32 sums, twice; three stages of 24 KiB. Two blocks an SM would
// leave 128 registers a thread, and some would be spilled.
using Fp8TileConfig = TileConfig<uint8_t, 64, 128, 128, 2, 4, 3, true, true>;
constexpr int kFp8BlocksPerSm = 1;
static_assert(Fp8TileConfig::kTileK == kFp8Block && Fp8TileConfig::kTileN == kFp8Block,
              "a step has one scale of b");

struct Fp8Product : WarpTile<Fp8TileConfig> {
  using Config = Fp8TileConfig;
  using Warp = WarpTile<Config>;
  using Mma = cute::SM80_16x8x16_F32F16F16F32_TN;
  float sum[kMTiles][kNTiles][4];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kMTiles * kNTiles * 4; ++i) (&sum[0][0][0])[i] = 0;
  }

  // Computes sum += (a b^T of the step) * factor(i, j, h); for the indices see value().
  template <class Factor>
  __device__ void multiply(const uint8_t* a, const uint8_t* b, const Factor& factor) {
    float acc[kMTiles][kNTiles][4];
#pragma unroll
    for (int i = 0; i < kMTiles * kNTiles * 4; ++i) (&acc[0][0][0])[i] = 0;
#pragma unroll
    for (int step = 0; step < Config::kTileK / 32; ++step) {
      // Fragments of each 32 k: [half of k][rows 0-7, 8-15: first pair, then second].
      uint32_t fa[kMTiles][2][4];
#pragma unroll
      for (int i = 0; i < kMTiles; ++i) {
        uint32_t r[4];
        load_a(a, i, step, r);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const Fp16Pairs wide = fp16_pairs(r[j]);
          fa[i][j / 2][j % 2] = wide.low;
          fa[i][j / 2][j % 2 + 2] = wide.high;
        }
      }
#pragma unroll
      for (int pair = 0; pair < kNTiles / 2; ++pair) {
        uint32_t r[4];
        load_b(b, pair, step, r);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const Fp16Pairs fb = fp16_pairs(r[2 * n + h]);
#pragma unroll
            for (int i = 0; i < kMTiles; ++i) {
              float (&d)[4] = acc[i][2 * pair + n];
              Mma::fma(d[0], d[1], d[2], d[3], fa[i][h][0], fa[i][h][1], fa[i][h][2], fa[i][h][3],
                       fb.low, fb.high, d[0], d[1], d[2], d[3]);
            }
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float& s = sum[i / 2][j][i % 2 * 2 + h];
          s = fmaf(acc[i / 2][j][i % 2 * 2 + h], factor(i, j, h), s);
        }
      }
    }
  }

  __device__ float value(int i, int j, int h) const { return sum[i / 2][j][i % 2 * 2 + h]; }
};

}  // namespace moe_ops::cuda::generic
