// out[r] = scale(r) * b[e(r)] a[r] + bias[e(r)] for any strides and alignments.
//
// Blocks are persistent and take tiles one after the other (schedule.cuh). For each tile:
//   1. resolve the source rows of A through the index, once;
//   2. keep kStages - 1 steps of k in flight (cp.async; plain loads where rows are not aligned),
//      the first ones since before the results of the tile before were stored;
//   3. multiply on the tensor cores, sums in registers, k in order: the same bits for any grid;
//   4. scale, bias, store, through the output's index.
// The tail is an expert with k = 0 and no bias: its tiles store zeros.
#pragma once

#include "cuda/grouped_gemm/launch.cuh"
#include "cuda/grouped_gemm/mma.cuh"
#include "cuda/grouped_gemm/schedule.cuh"
#include "cuda/quad.cuh"

namespace moe_ops::cuda::generic {

struct GemmLaunch {
  GroupedGemmParams p;
  int column_tiles;
  bool a_aligned, b_aligned;  // rows of A, lines of B start on 16 bytes
  bool out_pairs;             // two neighbors of a row of out can be stored at once
  bool out_vectors;           // rows of out are whole accesses of 16 bytes
};

// Stores v[0], v[1] at out[col], out[col + 1] as far as col < cols.
template <class S>
__device__ void store_pair(S* out, int col, int cols, bool pairs, Accumulate<S> v0,
                           Accumulate<S> v1) {
  if (pairs && col + 1 < cols) {
    store_wide(out + col, Wide<S, 2>{{v0, v1}});
  } else {
    if (col < cols) out[col] = narrow<S>(v0);
    if (col + 1 < cols) out[col + 1] = narrow<S>(v1);
  }
}

// Stores value(j, h), the elements h of column pair j of `sums`, of a row that starts at `out`.
// before: added to what is there.
template <class Out, class Sums, class Value>
__device__ void store_pairs(Out* out, int col0, int cols, bool pairs, bool before, const Sums& sums,
                            const Value& value) {
#pragma unroll
  for (int j = 0; j < Sums::kPairs; ++j) {
    const int col = col0 + sums.col(j);
    Accumulate<Out> v[2] = {value(j, 0), value(j, 1)};
    if (before) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (col + h < cols) v[h] += widen(out[col + h]);
      }
    }
    store_pair(out, col, cols, pairs, v[0], v[1]);
  }
}

// True if a quad holds whole 16-byte accesses of a row of 16-bit results in each four column pairs.
template <class Config, class Out>
constexpr bool kQuadsOfVectors = sizeof(Out) == 2 && Product<Config>::kPairs % 4 == 0;

// Stores v(j, h), the elements h of column pair j, of a row that starts at `out`, 16 bytes a lane:
// a quad writes 64 bytes. before: added to what is there. All lanes of a warp take part; a lane
// whose row is not `inside` stores nothing.
template <class Config, class Out, class Value>
__device__ void store_vectors(Out* out, bool inside, int n0, int cols, bool before,
                              const Product<Config>& sums, const Value& v) {
#pragma unroll
  for (int g = 0; g < Product<Config>::kPairs / 4; ++g) {
    const int col = n0 + sums.col(4 * g) - 2 * (sums.lane % 4) + 8 * (sums.lane % 4);
    auto* at = reinterpret_cast<uint4*>(out + col);
    const bool stores = inside && col < cols;
    uint32_t r[4];
    if (before) {
      const uint4 old = stores ? *at : make_uint4(0, 0, 0, 0);
      r[0] = old.x, r[1] = old.y, r[2] = old.z, r[3] = old.w;
      quad_transpose(r);
    }
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      Wide<Out, 2> pair{{v(4 * g + b, 0), v(4 * g + b, 1)}};
      if (before) {
        const auto old = unpack(Packed<Out, 2>{r[b]});
        pair.v[0] += old.v[0];
        pair.v[1] += old.v[1];
      }
      r[b] = pack(pair).raw;
    }
    quad_transpose(r);
    if (stores) *at = make_uint4(r[0], r[1], r[2], r[3]);
  }
}

template <class Config, class Out>
__device__ void store_rows(const GemmLaunch& launch, const TileWork& work, bool tail,
                           const Product<Config>& sums) {
  using Acc = typename Config::Acc;
  using Sums = Product<Config>;
  const GroupedGemmParams& p = launch.p;
  const int O = static_cast<int>(p.out_features), n0 = work.column_tile * Config::kTileN;
  Acc bias[Sums::kPairs][2];
#pragma unroll
  for (int j = 0; j < Sums::kPairs; ++j) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int col = n0 + sums.col(j) + h;
      bias[j][h] = 0;
      if (p.bias.data != nullptr && !tail && col < O) {
        bias[j][h] = widen(static_cast<const typename Config::Element*>(
            p.bias.data)[work.expert * p.bias.stride_e + col]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < Sums::kRows; ++i) {
    const int r = work.row + sums.row(i);
    const int target = r < work.end ? source_row(p.out, r) : -1;
    auto* out = static_cast<Out*>(p.out.data) + target * p.out.stride;
    const Acc scale = tail || target < 0 ? Acc(0) : row_factor<Acc>(p.a_scale, r);
    const auto value = [&](int j, int h) { return fma(scale, sums.value(i, j, h), bias[j][h]); };
    if constexpr (kQuadsOfVectors<Config, Out>) {
      if (launch.out_vectors) {
        store_vectors<Config>(out, target >= 0, n0, O, false, sums, value);
        continue;
      }
    }
    if (target >= 0) store_pairs(out, n0, O, launch.out_pairs, false, sums, value);
  }
}

// Adds the products of `steps` steps of k to the sums. load(step) starts the copies of a step into
// its stage, step % kStages; the first kStages - 1 steps were loaded and committed before.
// factors(step): one for each k of the step, or nullptr.
template <class Config, class Load, class Factors>
__device__ void add_steps(Product<Config>& sums, const typename Config::Element* stages, int steps,
                          const Load& load, const Factors& factors) {
  using S = typename Config::Element;
  constexpr int kStages = Config::kStages;
  constexpr int kStageSize = Config::TileA::kSize + Config::TileB::kSize;
  const auto stage = [&](int step) { return stages + step % kStages * kStageSize; };
  // Own copies of the next step are done; after the barrier everybody's are, and nobody reads the
  // stage of the step before any more.
  const auto meet = [] {
    wait_copies<kStages - 2>();
    __syncthreads();
  };
  const auto load_ahead = [&](int step) {
    if (step + kStages - 1 < steps) load(step + kStages - 1);
    commit_copies();
  };
  if constexpr (requires { Product<Config>::kFragments; }) {
    // Fragments are read while those before them are multiplied, across the barrier too.
    constexpr int kFragments = Product<Config>::kFragments;
    static_assert(kFragments % 2 == 0);
    typename Product<Config>::Fragments fragments[2];
    const auto read = [&](int step, int i) {
      const S* tile = stage(step);
      sums.read(fragments[i % 2], tile, tile + Config::TileA::kSize, i, factors(step));
    };
    if (steps > 0) {
      meet();
      read(0, 0);
    }
    for (int step = 0; step < steps; ++step) {
#pragma unroll
      for (int i = 0; i < kFragments; ++i) {
        if (i == 0) load_ahead(step);  // while one set of fragments holds nothing
        if (i + 1 < kFragments) {
          read(step, i + 1);
        } else if (step + 1 < steps) {
          meet();
          read(step + 1, 0);
        }
        sums.add(fragments[i % 2]);
      }
    }
  } else {
    for (int step = 0; step < steps; ++step) {
      meet();
      load_ahead(step);
      const S* tile = stage(step);
      sums.multiply(tile, tile + Config::TileA::kSize, factors(step));
    }
  }
  __syncthreads();  // The next tile fills the same stages.
}

template <class Config, int kBlocksPerSm>
__global__ void __launch_bounds__(Config::kThreads, kBlocksPerSm)
    grouped_gemm_kernel(const __grid_constant__ GemmLaunch launch) {
  using S = typename Config::Element;
  using TileA = typename Config::TileA;
  using TileB = typename Config::TileB;
  using CopyA = TileCopy<S, TileA, Config::kThreads>;
  using CopyB = TileCopy<S, TileB, Config::kThreads>;
  constexpr int kStages = Config::kStages;
  constexpr int kStageSize = TileA::kSize + TileB::kSize;
  extern __shared__ __align__(128) unsigned char shared[];
  auto* stages = reinterpret_cast<S*>(shared);

  const GroupedGemmParams& p = launch.p;
  const auto* a = static_cast<const S*>(p.a.data);
  const auto* b = static_cast<const S*>(p.b.data);
  const int K = static_cast<int>(p.in_features), O = static_cast<int>(p.out_features);
  const int E = static_cast<int>(p.num_experts), N = static_cast<int>(p.num_rows);

  Schedule<Config::kTileM> schedule;
  int64_t tile = blockIdx.x;
  TileWork work{};  // whose operands are loaded
  int a_rows[CopyA::kPasses] = {};
  const S* b_line = b;  // that this thread copies in its first pass, at the first step
  // The first warp looks for the next tile while the others go on, and all read it after a barrier:
  // kept in registers, it would be spilled. Two places, as a warp may read one late.
  __shared__ TileWork found[2];
  const auto find = [&](int place) {
    if (threadIdx.x < 32) {
      TileWork next{};
      if (!schedule.find(tile, p.expert_offsets, E, N, p.zero_tail, launch.column_tiles, next)) {
        next.expert = -1;
      }
      if (threadIdx.x == 0) found[place] = next;
      tile += gridDim.x;
    }
  };
  const auto num_steps = [&](const TileWork& of) {
    return of.expert == E ? 0 : (K + Config::kTileK - 1) / Config::kTileK;
  };

  const auto load = [&](int step) {
    S* stage = stages + step % kStages * kStageSize;
    const int k0 = step * Config::kTileK, n0 = work.column_tile * Config::kTileN;
    CopyA::template run<Config::kAligned>(
        stage, [&](int pass) { return a_rows[pass] < 0 ? nullptr : a + a_rows[pass] * p.a.stride; },
        k0, K, launch.a_aligned, a);
    if constexpr (Config::kBKMajor) {
      const auto line = [&](int pass) -> const S* {
        return n0 + CopyB::row(pass) < O ? b_line + pass * CopyB::kRowsPerPass * p.b.stride_o
                                         : nullptr;
      };
      CopyB::template run<Config::kAligned>(stage + TileA::kSize, line, k0, K, launch.b_aligned, b);
    } else {
      const auto line = [&](int pass) -> const S* {
        return k0 + CopyB::row(pass) < K ? b_line + (k0 + pass * CopyB::kRowsPerPass) * p.b.stride_k
                                         : nullptr;
      };
      CopyB::template run<Config::kAligned>(stage + TileA::kSize, line, n0, O, launch.b_aligned, b);
    }
  };
  const auto begin = [&] {
    const int steps = num_steps(work);
    b_line = b + work.expert * p.b.stride_e;
    if constexpr (Config::kBKMajor) {
      b_line += (work.column_tile * Config::kTileN + CopyB::row(0)) * p.b.stride_o;
    } else {
      b_line += CopyB::row(0) * p.b.stride_k;
    }
#pragma unroll
    for (int pass = 0; pass < CopyA::kPasses; ++pass) {
      const int r = work.row + CopyA::row(pass);
      a_rows[pass] = steps > 0 && r < work.end ? source_row(p.a, r) : -1;
    }
#pragma unroll 1
    for (int step = 0; step < kStages - 1; ++step) {
      if (step < steps) load(step);
      commit_copies();
    }
  };

  find(0);
  __syncthreads();
  work = found[0];
  if (work.expert >= 0) begin();
  Product<Config> sums;
  for (int place = 1; work.expert >= 0; place ^= 1) {
    const TileWork current = work;
    find(place);  // while the first copies are under way
    sums.clear();
    add_steps<Config>(sums, stages, num_steps(current), load, [](int) { return nullptr; });
    work = found[place];
    if (work.expert >= 0) begin();
    if (p.out.type == p.b.type) {
      store_rows<Config, S>(launch, current, current.expert == E, sums);
    } else {
      store_rows<Config, Accumulate<S>>(launch, current, current.expert == E, sums);
    }
  }
}

template <class AnyRows>
bool rows_aligned(const AnyRows& rows) {
  return aligned_to(rows.data, 16) && rows.stride * dtype_size(rows.type) % 16 == 0;
}
inline bool matrices_aligned(const ExpertMatrices& m) {
  const int64_t size = dtype_size(m.type), line = m.stride_k == 1 ? m.stride_o : m.stride_k;
  return aligned_to(m.data, 16) && line * size % 16 == 0 && m.stride_e * size % 16 == 0;
}

template <class Config, int kBlocksPerSm>
Status launch_grouped_gemm(const GroupedGemmParams& p, Stream stream) {
  GemmLaunch launch;
  launch.p = p;
  launch.column_tiles = static_cast<int>(ceil_div<int64_t>(p.out_features, Config::kTileN));
  launch.a_aligned = rows_aligned(p.a);
  launch.b_aligned = matrices_aligned(p.b);
  const int64_t out_size = dtype_size(p.out.type);
  launch.out_pairs = aligned_to(p.out.data, 2 * out_size) && p.out.stride % 2 == 0;
  launch.out_vectors = rows_aligned(p.out) && p.out_features * out_size % 16 == 0;
  // No expert's last tile is shared: each may add one that is not full, and so may the tail.
  const int64_t tiles =
      (ceil_div<int64_t>(p.num_rows, Config::kTileM) + std::min(p.num_experts + 1, p.num_rows)) *
      launch.column_tiles;
  constexpr int kShared = Config::kStages * (Config::TileA::kSize + Config::TileB::kSize) *
                          static_cast<int>(sizeof(typename Config::Element));
  return launch_tiles<grouped_gemm_kernel<Config, kBlocksPerSm>>(launch, tiles, Config::kThreads,
                                                                 kShared, kBlocksPerSm, stream);
}

}  // namespace moe_ops::cuda::generic
