// Many rows an expert: tiles of rows and features on the tensor cores, by the parts of
// grouped_gemm. The rows of a come by cp.async, several steps ahead. Codes go to registers a step
// ahead, become numbers of a's type there, and are stored into one of two tiles of shared memory.
//
// Codes are exact in the halves' types. A scale of a whole line (8 bits) multiplies the finished
// sum; scales of groups (4 bits) multiply the sum of their step of 32 or 64 before it is added to
// that of the line. float32 products take three tf32 ones each, beside which it costs nothing to
// multiply a code by its scale first.
//
// With a gate, the columns of a tile are gate and up of a feature interleaved, whatever their
// places in w: both are in one thread, which writes act of the two.
#pragma once

#include "cuda/grouped_gemm/gemm_kernel.cuh"
#include "cuda/moe_ffn/fused_act.cuh"
#include "cuda/moe_ffn_quantized/codes.cuh"
#include "cuda/moe_ffn_quantized/stage.h"

namespace moe_ops::cuda::quantized {

using generic::Product;
using generic::Schedule;
using generic::TileConfig;
using generic::TileCopy;
using generic::TileWork;

struct TileLaunch {
  QuantStage s;
  FusedAct act;
  int columns;  // lines of w
  int column_tiles;
  bool aligned;    // lines of w start on 16 bytes
  bool out_pairs;  // two neighbors of a row of out can be stored at once
};

// Returns the line of w that is column c of the product.
__device__ __forceinline__ int64_t line_of_column(const QuantStage& s, int c) {
  return s.gated && !s.act.interleaved ? c / 2 + c % 2 * s.features : c;
}

// Sums of steps times the scales of their groups.
template <class Config>
struct GroupProduct : generic::WarpTile<Config> {
  using Warp = generic::WarpTile<Config>;
  using S = typename Config::Element;
  using Mma = typename generic::HalfProduct<Config>::Mma;
  using Warp::kMTiles, Warp::kNTiles;
  float sum[kMTiles][kNTiles][4];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kMTiles * kNTiles * 4; ++i) (&sum[0][0][0])[i] = 0;
  }

  // Multiplies a step. scale: of each column, for consecutive spans of 32 k; kSpan: the k that
  // share a scale.
  template <int kSpan>
  __device__ void multiply(const S* a, const S* b, const float* scale) {
#pragma unroll 1
    for (int span = 0; span < Config::kTileK / kSpan; ++span) {
      float acc[kMTiles][kNTiles][4];
#pragma unroll
      for (int i = 0; i < kMTiles * kNTiles * 4; ++i) (&acc[0][0][0])[i] = 0;
#pragma unroll 2  // all at once would take more registers than there are
      for (int in = 0; in < kSpan / 16; ++in) {
        const int step = span * (kSpan / 16) + in;
        uint32_t fa[kMTiles][4], fb[kNTiles / 2][4];
#pragma unroll
        for (int i = 0; i < kMTiles; ++i) this->load_a(a, i, step, fa[i]);
#pragma unroll
        for (int j = 0; j < kNTiles / 2; ++j) this->load_b(b, j, step, fb[j]);
#pragma unroll
        for (int i = 0; i < kMTiles; ++i) {
#pragma unroll
          for (int j = 0; j < kNTiles; ++j) {
            float (&c)[4] = acc[i][j];
            const uint32_t* f = &fb[j / 2][j % 2 * 2];
            Mma::fma(c[0], c[1], c[2], c[3], fa[i][0], fa[i][1], fa[i][2], fa[i][3], f[0], f[1],
                     c[0], c[1], c[2], c[3]);
          }
        }
      }
      const float* const s = scale + span * (kSpan / 32) * Config::kTileN;
#pragma unroll
      for (int j = 0; j < kNTiles; ++j) {
        const Wide<float, 2> factor = load_wide<2>(s + this->col(j));
#pragma unroll
        for (int i = 0; i < kMTiles; ++i) {
#pragma unroll
          for (int h = 0; h < 4; ++h)
            sum[i][j][h] = fmaf(acc[i][j][h], factor.v[h % 2], sum[i][j][h]);
        }
      }
    }
  }

  __device__ float value(int i, int j, int h) const { return sum[i / 2][j][i % 2 * 2 + h]; }
};

// The codes of a tile of lines on their way from memory to shared memory, and the scales of groups.
template <class Config, int kBits>
struct CodeTile {
  using S = typename Config::Element;
  using TileB = typename Config::TileB;
  static constexpr bool kWide = std::is_same_v<S, float>;
  static constexpr int kEach = 128 / kBits;  // codes of 16 bytes
  static constexpr int kPieces = Config::kTileK / kEach;
  static constexpr int kAll = Config::kTileN * kPieces;
  static constexpr int kPasses = (kAll + Config::kThreads - 1) / Config::kThreads;
  // Scales of a step, 32 of k after another: a thread loads one or none.
  static constexpr int kScales = kBits == 4 && !kWide ? Config::kTileK / 32 * Config::kTileN : 0;
  static_assert(Config::kTileK % kEach == 0 && kScales <= Config::kThreads);
  static constexpr bool kEven = kAll % Config::kThreads == 0;

  // This thread's lines of w, from its piece on, and their scales; nullptr: there is none.
  const uint8_t* lines[kPasses];
  const float* line_scales[kPasses];  // float32 with 4 bits
  const float* column_scale;
  uint4 codes[kPasses];
  float factor[kPasses];  // of the piece, where there are line_scales
  float scale;            // of this thread's column and 32 of k

  static __device__ int line(int pass) {
    return (static_cast<int>(threadIdx.x) + pass * Config::kThreads) / kPieces;
  }
  static __device__ int piece() { return static_cast<int>(threadIdx.x) % kPieces; }

  // Starts the tile of columns from n0 on.
  __device__ __forceinline__ void start(const TileLaunch& launch, int expert, int n0) {
    const QuantStage& s = launch.s;
    const auto* const w = static_cast<const uint8_t*>(s.w.data) + expert * s.w.stride_e;
    const float* const scales = s.w.format.scale + expert * s.w.format.scale_stride_e;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int n = n0 + line(pass);
      const bool there = (kEven || line(pass) < Config::kTileN) && n < launch.columns;
      const int64_t at = line_of_column(s, n);
      lines[pass] = there ? w + at * s.w.stride_o + piece() * 16 : nullptr;
      if constexpr (kWide && kBits == 4)
        line_scales[pass] = scales + at * s.w.format.scale_stride_o;
    }
    if constexpr (kScales > 0) {
      const int t = static_cast<int>(threadIdx.x), n = n0 + t % Config::kTileN;
      column_scale = t < kScales && n < launch.columns
                         ? scales + line_of_column(s, n) * s.w.format.scale_stride_o
                         : nullptr;
    }
  }

  __device__ __forceinline__ void load(const TileLaunch& launch, int k0) {
    const QuantStage& s = launch.s;
    const int group = static_cast<int>(s.w.format.group);
    const int line_bytes = static_cast<int>(s.depth * kBits / 8), begin = k0 * kBits / 8;
    const int left = line_bytes - begin - piece() * 16;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      codes[pass] = make_uint4(0, 0, 0, 0);
      factor[pass] = 0;
      if (lines[pass] == nullptr || left <= 0) continue;
      const uint8_t* const from = lines[pass] + begin;
      if (launch.aligned) {
        codes[pass] = *reinterpret_cast<const uint4*>(from);
      } else {
        union {
          uint8_t bytes[16];
          uint4 all;
        } u;
#pragma unroll
        for (int i = 0; i < 16; ++i) u.bytes[i] = i < left ? from[i] : uint8_t{0};
        codes[pass] = u.all;
      }
      if constexpr (kWide && kBits == 4)
        factor[pass] = line_scales[pass][(k0 + piece() * kEach) / group];
    }
    if constexpr (kScales > 0) {
      const int k = k0 + static_cast<int>(threadIdx.x) / Config::kTileN * 32;
      scale = column_scale != nullptr && k < s.depth ? column_scale[k / group] : 0.0f;
    }
  }

  __device__ __forceinline__ void store(S* tile, float* scales) const {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      if (!kEven && line(pass) >= Config::kTileN) continue;
      const uint32_t w[4] = {codes[pass].x, codes[pass].y, codes[pass].z, codes[pass].w};
      const auto put = [&](int chunk, const uint4& v) {
        *reinterpret_cast<uint4*>(tile + TileB::chunk(line(pass), chunk)) = v;
      };
#pragma unroll
      for (int i = 0; i < kEach / 8; ++i) {
        const int chunk = piece() * kEach / TileB::kVec + i * (kWide ? 2 : 1);
        if constexpr (kWide) {
          float v[8];
          if constexpr (kBits == 8) {
            expand8(w[2 * i], w[2 * i + 1], v);
          } else {
            expand4(w[i], v);
#pragma unroll
            for (int c = 0; c < 8; ++c) v[c] *= factor[pass];
          }
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            put(chunk + h,
                make_uint4(__float_as_uint(v[4 * h]), __float_as_uint(v[4 * h + 1]),
                           __float_as_uint(v[4 * h + 2]), __float_as_uint(v[4 * h + 3])));
          }
        } else if constexpr (kBits == 8) {
          uint32_t r[4];
          expand8<S>(w[2 * i], w[2 * i + 1], r);
          put(chunk, make_uint4(r[0], r[1], r[2], r[3]));
        } else {
          uint32_t r[4];
          expand4<S>(w[i], r);
          put(chunk, make_uint4(__byte_perm(r[0], r[1], 0x5410), __byte_perm(r[2], r[3], 0x5410),
                                __byte_perm(r[0], r[1], 0x7632), __byte_perm(r[2], r[3], 0x7632)));
        }
      }
    }
    if constexpr (kScales > 0) {
      if (static_cast<int>(threadIdx.x) < kScales) scales[threadIdx.x] = scale;
    }
  }
};

template <class Config, int kBits, class Sums>
__device__ void finish_tile(const TileLaunch& launch, const TileWork& work, const Sums& sums) {
  using S = typename Config::Element;
  const QuantStage& s = launch.s;
  const QuantFormat& format = s.w.format;
  const int n0 = work.column_tile * Config::kTileN;
  float scale[Sums::kPairs][2], bias[Sums::kPairs][2];
#pragma unroll
  for (int j = 0; j < Sums::kPairs; ++j) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int c = n0 + sums.col(j) + h;
      const bool there = c < launch.columns;
      const int64_t line = there ? line_of_column(s, c) : 0;
      scale[j][h] = 1;
      bias[j][h] = 0;
      if (kBits == 8 && there) {
        scale[j][h] =
            format.scale[work.expert * format.scale_stride_e + line * format.scale_stride_o];
      }
      if (s.bias.data != nullptr && there)
        bias[j][h] =
            widen(static_cast<const S*>(s.bias.data)[work.expert * s.bias.stride_e + line]);
    }
  }
  const int features = static_cast<int>(s.features);
  const auto each = [&](const auto& act) {
#pragma unroll
    for (int i = 0; i < Sums::kRows; ++i) {
      const int r = work.row + sums.row(i);
      if (r >= work.end) continue;
      S* const out = static_cast<S*>(s.out) + r * s.out_stride;
      const float factor = row_factor<float>(s.factor, r);
#pragma unroll
      for (int j = 0; j < Sums::kPairs; ++j) {
        float v[2];
#pragma unroll
        for (int h = 0; h < 2; ++h)
          v[h] = fmaf(sums.value(i, j, h) * scale[j][h], factor, bias[j][h]);
        const int c = n0 + sums.col(j);
        if (s.gated) {
          if (c / 2 < s.out_stride)
            out[c / 2] = narrow<S>(c / 2 < features ? act(v[0], v[1]) : 0.0f);
        } else {
#pragma unroll
          for (int h = 0; h < 2; ++h) v[h] = c + h < features ? act(v[h], 0.0f) : 0.0f;
          generic::store_pair(out, c, static_cast<int>(s.out_stride), launch.out_pairs, v[0], v[1]);
        }
      }
    }
  };
  if (!s.activate) {
    each([](float v, float) { return v; });
    return;
  }
  with_family(launch.act.family, [&](auto family) {
    each([&](float g, float u) { return fused_forward<family.value>(launch.act, g, u); });
  });
}

// kSpan: k of a sum before the scale of its group, or 0: there are no groups.
template <class Config, int kBits, int kSpan, int kBlocksPerSm>
__global__ void __launch_bounds__(Config::kThreads, kBlocksPerSm)
    quantized_tile_kernel(const __grid_constant__ TileLaunch launch) {
  using S = typename Config::Element;
  using TileA = typename Config::TileA;
  using TileB = typename Config::TileB;
  using CopyA = TileCopy<S, TileA, Config::kThreads>;
  using Codes = CodeTile<Config, kBits>;
  using Sums = std::conditional_t<kSpan == 0, Product<Config>, GroupProduct<Config>>;
  constexpr int kStages = Config::kStages;
  extern __shared__ __align__(128) unsigned char shared[];
  auto* const a_stages = reinterpret_cast<S*>(shared);
  S* const b_stages = a_stages + kStages * TileA::kSize;
  auto* const scale_stages = reinterpret_cast<float*>(b_stages + 2 * TileB::kSize);

  const QuantStage& s = launch.s;
  const int K = static_cast<int>(s.depth), E = static_cast<int>(s.num_experts);
  const int steps = (K + Config::kTileK - 1) / Config::kTileK;
  const auto* const base = static_cast<const S*>(s.a.data);

  Schedule<Config::kTileM> schedule;
  TileWork work;
  Sums sums;
  for (int64_t tile = blockIdx.x;
       schedule.find(tile, s.expert_offsets, E, static_cast<int>(s.num_rows), false,
                     launch.column_tiles, work);
       tile += gridDim.x) {
    const int n0 = work.column_tile * Config::kTileN;
    int a_rows[CopyA::kPasses];
#pragma unroll
    for (int pass = 0; pass < CopyA::kPasses; ++pass) {
      const int r = work.row + CopyA::row(pass);
      a_rows[pass] = r < work.end ? source_row(s.a, r) : -1;
    }
    const auto load_a = [&](int step) {
      CopyA::template run<true>(
          a_stages + step % kStages * TileA::kSize,
          [&](int pass) { return a_rows[pass] < 0 ? nullptr : base + a_rows[pass] * s.a.stride; },
          step * Config::kTileK, K, true, base);
    };

    sums.clear();
    Codes codes;
    codes.start(launch, work.expert, n0);
    codes.load(launch, 0);
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) {
      if (step < steps) load_a(step);
      generic::commit_copies();
    }
    codes.store(b_stages, scale_stages);
    if (1 < steps) codes.load(launch, Config::kTileK);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      // Own copies and codes of this step are in place; after the barrier everybody's are, and
      // nobody reads the tiles of the step before any more.
      generic::wait_copies<kStages - 2>();
      __syncthreads();
      if (step + kStages - 1 < steps) load_a(step + kStages - 1);
      generic::commit_copies();
      const int now = step % 2, next = 1 - now;
      if (step + 1 < steps) {
        codes.store(b_stages + next * TileB::kSize, scale_stages + next * Codes::kScales);
        if (step + 2 < steps) codes.load(launch, (step + 2) * Config::kTileK);
      }
      const S* const a = a_stages + step % kStages * TileA::kSize;
      const S* const b = b_stages + now * TileB::kSize;
      if constexpr (kSpan == 0) {
        sums.multiply(a, b, nullptr);
      } else {
        sums.template multiply<kSpan>(a, b, scale_stages + now * Codes::kScales);
      }
    }
    __syncthreads();  // The next tile fills the same stages.
    finish_tile<Config, kBits>(launch, work, sums);
  }
}

template <class Config, int kBits, int kSpan, int kBlocksPerSm>
Status launch_tiles(const QuantStage& s, Stream stream) {
  TileLaunch launch;
  launch.s = s;
  launch.act = fused_act(s.act);
  launch.columns = static_cast<int>(s.features * (s.gated ? 2 : 1));
  launch.column_tiles = ceil_div(launch.columns, Config::kTileN);
  launch.aligned = aligned_to(s.w.data, 16) && s.w.stride_e % 16 == 0 && s.w.stride_o % 16 == 0 &&
                   s.depth % 16 == 0;
  const int64_t size = sizeof(typename Config::Element);
  launch.out_pairs = aligned_to(s.out, 2 * size) && s.out_stride % 2 == 0;
  const int64_t tiles =
      (ceil_div<int64_t>(s.num_rows, Config::kTileM) + std::min(s.num_experts, s.num_rows)) *
      launch.column_tiles;
  constexpr int kShared = (Config::kStages * Config::TileA::kSize + 2 * Config::TileB::kSize) *
                              static_cast<int>(sizeof(typename Config::Element)) +
                          2 * CodeTile<Config, kBits>::kScales * static_cast<int>(sizeof(float));
  return generic::launch_tiles<quantized_tile_kernel<Config, kBits, kSpan, kBlocksPerSm>>(
      launch, tiles, Config::kThreads, kShared, kBlocksPerSm, stream);
}

// Halves: 8 warps of 64 x 32 sums, or of 32 x 32 for few rows an expert.
template <class S, int kM>
using HalfTile = TileConfig<S, kM, 128, 64, 2, 4, 3, true, true, true>;

template <class S, int kM>
Status run_half_tiles(const QuantStage& s, Stream stream) {
  using Config = HalfTile<S, kM>;
  constexpr int kBlocks = kM == 64 ? 2 : 1;
  if (s.w.format.bits == 8) return launch_tiles<Config, 8, 0, kBlocks>(s, stream);
  return s.w.format.group == 32 ? launch_tiles<Config, 4, 32, kBlocks>(s, stream)
                                : launch_tiles<Config, 4, 64, kBlocks>(s, stream);
}

template <class S>
Status run_half_tiles(const QuantStage& s, Stream stream) {
  return s.num_rows / s.num_experts >= 64 ? run_half_tiles<S, 128>(s, stream)
                                          : run_half_tiles<S, 64>(s, stream);
}

}  // namespace moe_ops::cuda::quantized
