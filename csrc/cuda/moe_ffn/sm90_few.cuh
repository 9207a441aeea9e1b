// Products of few rows an expert, for sm_90a: out[r] = act(w[e(r)] a[r] + bias). The weights are
// most of the bytes, so everything serves reading them once and evenly:
// - Operands change sides: 128 rows of weights are the M of a tile and the expert's rows its N, so
//   that a wgmma is no larger than the rows there are.
// - A block is one tile over the whole sum, two blocks an SM: all are at work at once, and the ones
//   beyond that share the memory bandwidth, not waves of SMs.
// - The M of a tile are two blocks of 64 features from two tensor maps. In halves they are gate and
//   up of the same columns, both in one thread; interleaved they are neighbors, and lanes exchange
//   them.
// - The weights are dense along k or along their features: a box is 64 x 64 either way.
#pragma once

#include "cuda/grouped_gemm/sm90_launch.cuh"
#include "cuda/moe_ffn/few_sort.cuh"
#include "cuda/moe_ffn/fused_act.cuh"
#include "cuda/moe_ffn/sm90_stages.h"
#include "cuda/overlap.cuh"
#include "cuda/row_experts.cuh"

namespace moe_ops::cuda::sm90 {

template <DType type, int rows>
struct FewConfig : GemmDefaults {
  using Element = ElementOf<type>;
  using Output = Element;
  static constexpr int kTileM = 128, kTileN = rows;
  static constexpr int kBoxM = 64;
  static constexpr int kConsumers = 1;
  // One operand comes by cp.async: B, whatever the name says (produce_few).
  static constexpr Source kSourceA = Source::kGather;
  static constexpr int kStages = rows == 32 ? 5 : 4;  // two blocks an SM
};

struct FewParams {
  CUtensorMap map[2];  // of the two blocks
  bool along_k;        // how the weights lie
  Problem problem;     // n: features of out
  GatherRows rows;     // index may be nullptr
  int map_features;    // of a map: I of halves, else all
  FewSort sort;        // if it has ids, the kernel sorts, and `rows` is read through its slots
  int block_step;      // features from the first block to the second in their maps
  int tile_features;   // of out: 64 with a gate, else 128
  bool interleaved;    // gate in even, up in odd features
  bool activate;
  FusedAct act;
  void* out;         // [rows, n]
  const void* bias;  // [E, features of w], or nullptr
  int64_t bias_stride;
  int bias_step;    // from the bias of the first map to that of the second
  ScaleRows scale;  // before the bias
};

// Rows of the tile's expert, taken kN at a time; `feature` of out is `map_feature` of the maps.
struct FewTile {
  int expert, feature, map_feature, begin, end;
};

// slots: of the tile's rows, if the kernel sorted them.
template <class Config>
__device__ inline void produce_few(const FewParams& p, typename Traits<Config>::SharedStorage& smem,
                                   const FewTile& tile, int k_tiles, const uint16_t* slots) {
  using T = Traits<Config>;
  using Element = typename Config::Element;
  constexpr int kPiece = 16 / static_cast<int>(sizeof(Element));
  constexpr int kLines = T::kN / kCopyLines;
  constexpr int kBlock = 64 * T::kSpan;  // elements of a box
  // Nobody reads these weights again before the next call.
  constexpr auto kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST);
  static_assert(T::kK == T::kSpan && T::kM == 128);
  auto write = cutlass::PipelineState<T::kStages>{0, 1, 0};
  const int piece = threadIdx.x % kPieces, line = threadIdx.x / kPieces;
  const int place = line * T::kSpan + (piece ^ (line % 8)) * kPiece;
  for (int row0 = tile.begin; row0 < tile.end; row0 += T::kN) {
    int source[kLines];
#pragma unroll
    for (int i = 0; i < kLines; ++i) {
      const int r = row0 + line + i * kCopyLines;
      source[i] = r >= tile.end                ? -1
                  : p.sort.ids.data != nullptr ? slots[r - tile.begin] / p.sort.top_k
                  : p.rows.index == nullptr    ? r
                                               : source_row(p.rows, __ldg(p.rows.index + r));
    }
#pragma unroll 1
    for (int kt = 0; kt < k_tiles; ++kt, ++write) {
      const int s = write.index();
      smem.empty[s].wait(write.phase());
      auto* full = reinterpret_cast<uint64_t*>(&smem.full[s]);
      if (threadIdx.x == 0) {
        smem.full[s].arrive_and_expect_tx(T::kStageBytesA);
        Element* to = smem.a + s * 2 * kBlock;
#pragma unroll
        for (int block = 0; block < 2; ++block) {
          const int f = tile.map_feature + block * p.block_step, k = kt * T::kK;
          cute::SM90_TMA_LOAD_3D::copy(&p.map[block], full, kHint, to + block * kBlock,
                                       p.along_k ? k : f, p.along_k ? f : k, tile.expert);
        }
      }
      Element* to = smem.b + s * T::kN * T::kK + place;
      const int k = kt * T::kK + piece * kPiece;
      const auto* from = static_cast<const Element*>(p.rows.data) + k;
#pragma unroll
      for (int i = 0; i < kLines; ++i) {
        const bool copy = k < p.problem.k && source[i] >= 0;
        const void* at = copy ? from + source[i] * p.rows.stride : p.rows.data;
        cutlass::arch::cp_async_zfill<16, cutlass::arch::CacheOperation::Global>(
            to + i * kCopyLines * T::kSpan, at, copy);
      }
      cutlass::arch::cpasync_barrier_arrive_noinc(full);
    }
  }
  finish_copies();
}

// Stores two elements. Lanes whose features are neighbors exchange, so that each stores both
// features of one row. v0 and v1 are feature `feature` of rows `row` and row + 1; interleaved, they
// are features `feature` and feature + 4 of row `row`.
template <class Element>
__device__ __forceinline__ void store_few(const FewParams& p, int feature, int row, int end,
                                          float v0, float v1) {
  const int distance = p.interleaved ? 8 : 4;
  const bool odd = threadIdx.x & distance;  // as the feature is
  const float got = __shfl_xor_sync(~0u, odd ? v0 : v1, distance);
  const int f = feature + (!odd ? 0 : p.interleaved ? 3 : -1);
  const int r = row + (odd && !p.interleaved);
  if (f < p.problem.n && r < end) {
    auto* to = static_cast<Element*>(p.out) + static_cast<int64_t>(r) * p.problem.n + f;
    *reinterpret_cast<uint32_t*>(to) = odd ? pack<Element>(got, v1) : pack<Element>(v0, got);
  }
}

// Finishes rows from row0 on. acc(make_coord(c, i, j), m, 0) is row 8 j + 2 q + c of feature 16
// warp + lane / 4 + 8 i of block m.
template <class Config, class Acc>
__device__ __forceinline__ void finish_few(const FewParams& p, const FewTile& tile, int row0,
                                           Acc& acc, int thread) {
  using T = Traits<Config>;
  using Element = typename Config::Element;
  using cute::make_coord;
  const int lane = thread % kWarp, q = lane % 4;
  const int place = thread / kWarp * 16 + lane / 4;  // in a block
  const bool gated = p.tile_features == 64;
  const bool up_lane = lane & 4;  // interleaved: its features are odd
  const auto* bias = static_cast<const Element*>(p.bias) + tile.expert * p.bias_stride;
  float b[2][2];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int f = tile.map_feature + place + 8 * i + m * p.block_step;
      b[m][i] = p.bias != nullptr && f < p.map_features
                    ? static_cast<float>(bias[f + m * p.bias_step])
                    : 0.f;
    }
  }
  // Feature of out. Interleaved, block m holds 32 columns from 32 m on, and a lane stores half of
  // those that it has.
  const int feature = tile.feature + (p.interleaved ? place / 16 * 8 + place % 8 / 2 : place);
  const int step = p.interleaved ? 32 : 8;
  const auto each = [&](const auto& gate_and_up, const auto& one) {
#pragma unroll
    for (int j = 0; j < T::kN / 8; ++j) {
      const int row = row0 + 8 * j + 2 * q;
      if (row0 + 8 * j >= tile.end) break;
      float s[2] = {1.f, 1.f};
#pragma unroll
      for (int c = 0; c < 2; ++c)
        if (p.scale.data != nullptr && row + c < tile.end) s[c] = p.scale.at(row + c);
      // Without a gate, `up` is the second block.
      float gate[2][2], up[2][2];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float v0 = acc(make_coord(0, i, j), m, 0) * s[0] + b[m][i];
          const float v1 = acc(make_coord(1, i, j), m, 0) * s[1] + b[m][i];
          if (p.interleaved) {
            // Two lanes have gate and up of two rows; each takes one row.
            const float got = __shfl_xor_sync(~0u, up_lane ? v0 : v1, 4);
            gate[m][i] = up_lane ? got : v0;
            up[m][i] = up_lane ? v1 : got;
          } else {
            auto& to = m == 0 ? gate : up;
            to[i][0] = v0;
            to[i][1] = v1;
          }
        }
      }
      const int r = row + (p.interleaved && up_lane);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int f = feature + step * i;
        if (gated) {
          store_few<Element>(p, f, r, tile.end, gate_and_up(gate[i][0], up[i][0]),
                             gate_and_up(gate[i][1], up[i][1]));
        } else {
          store_few<Element>(p, f, r, tile.end, one(gate[i][0]), one(gate[i][1]));
          store_few<Element>(p, f + 64, r, tile.end, one(up[i][0]), one(up[i][1]));
        }
      }
    }
  };
  if (!p.activate) {
    const auto same = [](float v) { return v; };
    each([](float v, float) { return v; }, same);
    return;
  }
  with_family(p.act.family, [&](auto family) {
    each([&](float g, float u) { return fused_forward<family.value, true>(p.act, g, u); },
         [&](float g) { return fused_forward<family.value, true>(p.act, g, 0.f); });
  });
}

template <class Config>
__global__ void __launch_bounds__(Traits<Config>::kThreads, 2)
    sm90_few_rows_kernel(const __grid_constant__ FewParams p) {
  using T = Traits<Config>;
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& smem = *reinterpret_cast<typename T::SharedStorage*>(shared_bytes);
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(&p.map[0]);
    cute::prefetch_tma_descriptor(&p.map[1]);
    init_barriers<Config>(smem);
  }
  await_previous_kernel();
  const int column_tiles = (p.problem.n + p.tile_features - 1) / p.tile_features;
  const int ordinal = static_cast<int>(blockIdx.x) / column_tiles;
  const int column_tile = static_cast<int>(blockIdx.x) - ordinal * column_tiles;
  FewTile tile;
  tile.feature = column_tile * p.tile_features;
  tile.map_feature = p.interleaved ? 2 * tile.feature : tile.feature;
  __shared__ FewSortShared sorted;
  // Two blocks must fit in an SM's 228 KiB; the system reserves 1 KiB per block.
  static_assert(2 * (T::kSharedBytes + round_up<int>(sizeof(sorted), 1024) + 1024) <= 228 * 1024);
  if (p.sort.ids.data != nullptr) {
    const ExpertRows found = sort_few(p.sort, p.problem.num_experts, ordinal, sorted);
    tile.expert = found.expert;
    tile.begin = found.begin;
    tile.end = found.end;
    // By a warp that has to wait for the first weights anyway.
    if (column_tile == 0 && threadIdx.x >= T::kThreads - kWarp)
      write_maps(p.sort, p.problem.num_experts, found, sorted, ordinal == 0);
  } else {
    tile.expert =
        expert_with_rows(p.problem.expert_offsets, p.problem.num_experts, p.problem.rows, ordinal);
    tile.begin = tile.expert < 0 ? 0 : clamp_offset(p.problem, tile.expert, 0);
    tile.end = tile.expert < 0 ? 0 : clamp_offset(p.problem, tile.expert + 1, tile.begin);
    __syncthreads();
  }
  if (tile.expert < 0) return;
  const int k_tiles = (p.problem.k + T::kK - 1) / T::kK;

  const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (group == 0) {
    produce_few<Config>(p, smem, tile, k_tiles, sorted.slots);
    return;
  }
  const int thread = static_cast<int>(threadIdx.x) - kWarpgroup;
  PipelineState<Config> read;
  Tile sum{};
  sum.row_end = T::kM;  // features, all of which are multiplied
  sum.k_tiles = k_tiles;
#pragma unroll 1
  for (int row0 = tile.begin; row0 < tile.end; row0 += T::kN) {
    auto acc = cute::partition_fragment_C(typename T::TiledMma{},
                                          cute::Shape<cute::Int<T::kM>, cute::Int<T::kN>>{});
    if (p.along_k) {
      multiply<Config, Major::kK>(smem, sum, read, acc, thread, 0, [] {});
    } else {
      multiply<Config, Major::kMN>(smem, sum, read, acc, thread, 0, [] {});
    }
    finish_few<Config>(p, tile, row0, acc, thread);
  }
}

template <DType type, int rows>
Status run_few(const FewProduct& f, Stream stream) {
  using Config = FewConfig<type, rows>;
  using T = Traits<Config>;
  FewParams params{};
  for (int block = 0; block < 2; ++block) {
    TensorMapDesc d = f.block[block];
    d.box[0] = d.box[1] = T::kSpan;
    d.box[2] = 1;
    if (const Status s = encode_tensor_map(&params.map[block], d); s != cudaSuccess) return s;
  }
  params.problem.expert_offsets = f.expert_offsets;
  params.problem.num_experts = static_cast<int>(f.num_experts);
  params.problem.rows = static_cast<int>(f.num_rows);
  params.problem.n = static_cast<int>(f.out_features);
  params.problem.k = static_cast<int>(f.in_features);
  params.rows = gather_rows(f.rows);
  const bool halves = f.gated && !f.act.interleaved;
  params.along_k = f.along_k;
  params.map_features = static_cast<int>(f.block[0].size[f.along_k ? 1 : 0]);
  params.block_step = halves ? 0 : 64;
  params.sort = f.sort;
  params.tile_features = f.gated ? 64 : 128;
  params.interleaved = f.gated && f.act.interleaved;
  params.activate = f.activate;
  params.act = fused_act(f.act);
  params.out = f.out;
  params.bias = f.bias.data;
  params.bias_stride = f.bias.stride_e;
  params.bias_step = halves ? params.map_features : 0;
  params.scale = {static_cast<const float*>(f.scale.data), f.scale.index, f.scale.limit};
  const int64_t blocks =
      std::min(f.num_experts, f.num_rows) * ceil_div<int64_t>(f.out_features, params.tile_features);
  Launch at{static_cast<unsigned>(blocks), T::kThreads, stream, T::kSharedBytes};
  at.overlaps = true;
  return launch_kernel<sm90_few_rows_kernel<Config>>(at, params);
}

}  // namespace moe_ops::cuda::sm90
