// The kernel of grouped_gemm_fp8 for sm_90a: scheduler, producers, ring of stages and stores of
// grouped_gemm (sm90_kernel.cuh there), with a mainloop of its own.
//
// A stage is 128 of k, one block of scales. Its products (four wgmma m64n128k32 a warpgroup) go to
// an accumulator that starts from zero; scaled, they are added to a second one, as the tensor cores
// keep about 14 bits of the largest product inside a sum. While a warpgroup scales, the other one's
// products run: there is nothing to gain from a product in flight within a warpgroup, which would
// need a third accumulator.
//
// The scale of b is one for a tile and stage. Those of a are two for a thread, those of its rows;
// they are fetched a stage ahead.
#pragma once

#include "cuda/grouped_gemm/sm90_kernel.cuh"
#include "cuda/grouped_gemm_fp8/sm90.h"
#include "cuda/grouped_gemm_fp8/sm90_operands.h"

namespace moe_ops::cuda::sm90::fp8 {

template <TileShape shape, bool kGathered>
struct Fp8Config : GemmDefaults {
  static constexpr int kRows = shape == TileShape::k64x128 ? 64 : 128;
  using Element = cutlass::float_e4m3_t;
  static constexpr int kTileM = kRows, kTileN = 128, kTileK = 128;
  static constexpr Schedule kSchedule = kRows == 64 ? Schedule::kPingpong : Schedule::kCooperative;
  static constexpr int kCluster = shape == TileShape::k2x128x128 ? 2 : 1;
  static constexpr Source kSourceA = kGathered ? Source::kGather : Source::kTma;
  static constexpr int kBoxM = kRows == 64 ? 16 : 64;
  static_assert(kTileK == kFp8Block && kTileN == kFp8Block, "a stage has one scale of b");
};

struct BlockScales {
  const float* a;  // [limit, blocks] a_stride apart; row r has those of index[r] / divisor
  int64_t a_stride;
  const int32_t* index;
  int divisor;
  int limit;
  const float* b;  // [E, column blocks, blocks]
  int64_t b_stride_e, b_stride_o;
};

// The scales of row `row` of the product, or nullptr where there is no such row.
__device__ inline const float* row_scales(const BlockScales& s, const Tile& tile, int row) {
  if (row >= tile.row_end) return nullptr;
  int source = row;
  if (s.index != nullptr) {
    const int at = __ldg(s.index + row);
    source = at < 0 ? -1 : at / s.divisor;
  }
  return source >= 0 && source < s.limit ? s.a + source * s.a_stride : nullptr;
}

// sum = products of the stages of `tile` (at least one), each times its scales. The rest as
// multiply() of grouped_gemm.
template <class Config, class Accumulators, class Issued>
__device__ inline void multiply_scaled(typename Traits<Config>::SharedStorage& smem,
                                       const BlockScales& scales, const Tile& tile,
                                       PipelineState<Config>& read, Accumulators& sum, int thread,
                                       const Issued& issued) {
  using namespace cute;
  using T = Traits<Config>;
  static_assert(T::kRowsM == 1);
  Tensor sA = make_tensor(make_smem_ptr(smem.a), typename T::LayoutA{});  // (M, K, stage)
  Tensor sB = make_tensor(make_smem_ptr(smem.b), typename T::LayoutB{});  // (N, K, stage)
  typename T::TiledMma mma;
  // Descriptors are uniform over a warpgroup.
  const int group = __shfl_sync(~0u, thread / kWarpgroup, 0);
  auto slice = mma.get_slice(group * kWarpgroup);
  Tensor tA = slice.make_fragment_A(slice.partition_A(sA));  // (mma, m, k, stage)
  Tensor tB = slice.make_fragment_B(slice.partition_B(sB));  // (mma, n, k, stage)
  Tensor acc = make_fragment_like(sum);

  const float* a_scale[2];
  float a[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    a_scale[i] = row_scales(scales, tile, tile.row0 + output_row<Config>(thread, 0) + 8 * i);
    a[i] = a_scale[i] != nullptr ? __ldg(a_scale[i]) : 0.f;
  }
  const float* b_scale = scales.b + tile.expert * scales.b_stride_e +
                         tile.col0 / static_cast<int>(kFp8Block) * scales.b_stride_o;
  float b = __ldg(b_scale);

  clear(sum);
#pragma unroll 1
  for (int kt = 0; kt < tile.k_tiles; ++kt) {
    const int s = read.index();
    smem.full[s].wait(read.phase());
    // cp.async writes through the generic proxy, wgmma reads through the asynchronous one.
    if constexpr (T::kGather) cutlass::arch::fence_view_async_shared();
    mma.accumulate_ = GMMA::ScaleOut::Zero;
    warpgroup_fence_operand(acc);
    warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < size<2>(tA); ++k) {
      gemm(mma, tA(_, _, k, s), tB(_, _, k, s), acc);
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
    const float factor[2] = {a[0] * b, a[1] * b};
    const bool last = kt + 1 == tile.k_tiles;
    if (!last) {
#pragma unroll
      for (int i = 0; i < 2; ++i) a[i] = a_scale[i] != nullptr ? __ldg(a_scale[i] + kt + 1) : 0.f;
      b = __ldg(b_scale + kt + 1);
    } else {
      issued();
    }
    warpgroup_wait<0>();
    warpgroup_fence_operand(acc);
    release<Config>(smem, s);
    ++read;
#pragma unroll
    for (int j = 0; j < T::kN / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& to = sum(make_coord(c, i, j), 0, 0);
          to = fmaf(acc(make_coord(c, i, j), 0, 0), factor[i], to);
        }
      }
    }
  }
}

template <class Config, class Type>
struct WithOutput : Config {
  using Output = Type;
};

// out[row, :] = factor[row] * sum + bias[expert], with types known at run time.
struct StoreFp8 {
  struct Params {
    void* out;
    int64_t out_stride;
    DType out_type;
    const void* bias;  // [E, n], or nullptr
    int64_t bias_stride;
    DType bias_type;
    ScaleRows factor;
  };

  template <class Config, class Type, class Acc>
  __device__ static void bias(const Params& p, const Problem& problem, const Tile& tile, Acc& acc,
                              int thread) {
    add_bias<WithOutput<Config, Type>>(
        static_cast<const Type*>(p.bias) + tile.expert * p.bias_stride, tile, problem.n, acc,
        thread);
  }

  template <class Config, class Acc>
  __device__ static void store(const Params& p, const Problem& problem, const Tile& tile, Acc& acc,
                               int thread) {
    using cutlass::bfloat16_t, cutlass::half_t;
    if (tile.expert < problem.num_experts) {
      if (p.factor.data != nullptr) scale_rows<Config>(p.factor, tile, acc, thread);
      if (p.bias != nullptr) {
        if (p.bias_type == DType::kBFloat16) {
          bias<Config, bfloat16_t>(p, problem, tile, acc, thread);
        } else if (p.bias_type == DType::kFloat16) {
          bias<Config, half_t>(p, problem, tile, acc, thread);
        } else {
          bias<Config, float>(p, problem, tile, acc, thread);
        }
      }
    }
    const OutRows out{p.out, p.out_stride, p.out_type == DType::kFloat32, nullptr, 1, problem.rows};
    if (p.out_type == DType::kFloat16) {
      store_rows<WithOutput<Config, half_t>>(out, tile, problem.n, acc, thread);
    } else {
      store_rows<WithOutput<Config, bfloat16_t>>(out, tile, problem.n, acc, thread);
    }
  }
};

struct Fp8KernelParams {
  CUtensorMap map_a;
  CUtensorMap map_b;
  Problem problem;
  int split_offset;
  GatherRows gather;
  BlockScales scales;
  StoreFp8::Params epilogue;
};

// Of the 64512 that a block is launched with: two consumer warpgroups at 224 and a producer at 56.
// A gathering producer needs more than the 40 that bfloat16 kernels leave it.
constexpr int kFp8ProducerRegisters = 56;
constexpr int kFp8ConsumerRegisters = 224;

template <class Config>
__global__ void __launch_bounds__(Traits<Config>::kThreads, 1)
    sm90_grouped_gemm_fp8_kernel(const __grid_constant__ Fp8KernelParams p) {
  using T = Traits<Config>;
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& smem = *reinterpret_cast<typename T::SharedStorage*>(shared_bytes);

  const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  const int cluster_rank = T::kCluster == 1 ? 0 : static_cast<int>(cute::block_rank_in_cluster());
  const int first = blockIdx.x / T::kCluster, step = gridDim.x / T::kCluster;
  if (threadIdx.x == 0) {
    if constexpr (!T::kGather) cute::prefetch_tma_descriptor(&p.map_a);
    cute::prefetch_tma_descriptor(&p.map_b);
    init_barriers<Config>(smem);
  }
  if constexpr (T::kCluster > 1) {
    cute::cluster_sync();
  } else {
    __syncthreads();
  }

  if (group == 0) {
    cutlass::arch::warpgroup_reg_dealloc<kFp8ProducerRegisters>();
    if constexpr (T::kGather) {
      produce_gather<Config>(p, smem, first, step, cluster_rank);
    } else {
      if (threadIdx.x < kWarp) produce_tma<Config>(p, smem, first, step, cluster_rank);
    }
    return;
  }

  cutlass::arch::warpgroup_reg_alloc<kFp8ConsumerRegisters>();
  const int player = group - 1;
  const int thread = static_cast<int>(threadIdx.x) - kWarpgroup * (T::kPingpong ? group : 1);
  PipelineState<Config> read;
  uint32_t turn_phase = player == 0;  // as in grouped_gemm
  Scheduler<Config> scheduler(p.problem, smem);
  Tile tile;
  int count = 0;
  for (int index = first; scheduler.get(index, cluster_rank, tile); index += step, ++count) {
    if (T::kPingpong && count % 2 != player) {
      read.advance(tile.k_tiles);
      continue;
    }
    auto sum = cute::partition_fragment_C(typename T::TiledMma{},
                                          cute::Shape<cute::Int<T::kM>, cute::Int<T::kN>>{});
    if constexpr (T::kPingpong) {
      smem.turn[player].wait(turn_phase);
      turn_phase ^= 1;
    }
    auto pass_turn = [&] {
      if (T::kPingpong && threadIdx.x % kWarp == 0) smem.turn[1 - player].arrive();
    };
    if (tile.k_tiles > 0) {
      multiply_scaled<Config>(smem, p.scales, tile, read, sum, thread, pass_turn);
    } else {
      cute::clear(sum);
      pass_turn();
    }
    StoreFp8::store<Config>(p.epilogue, p.problem, tile, sum, thread);
  }
}

// ---- Host ----

inline Problem problem_of(const GroupedGemmFp8Params& p) {
  Problem out{};
  out.expert_offsets = p.expert_offsets;
  out.num_experts = static_cast<int>(p.num_experts);
  out.rows = static_cast<int>(p.num_rows);
  out.n = static_cast<int>(p.out_features);
  out.k = static_cast<int>(p.in_features);
  out.zero_tail = p.zero_tail;
  return out;
}

inline GatherRows gather_of(const GroupedGemmFp8Params& p) {
  return {p.a.data, p.a.stride, static_cast<int>(p.a.limit), p.a.index, p.a.index_divisor};
}

inline BlockScales scales_of(const GroupedGemmFp8Params& p) {
  return {p.a.scale,
          p.a.scale_stride,
          p.a.index,
          p.a.index_divisor,
          static_cast<int>(p.a.limit),
          p.b.scale,
          p.b.scale_stride_e,
          p.b.scale_stride_o};
}

inline StoreFp8::Params epilogue_of(const GroupedGemmFp8Params& p) {
  StoreFp8::Params out{};
  out.out = p.out.data;
  out.out_stride = p.out.stride;
  out.out_type = p.out.type;
  out.bias = p.bias.data;
  out.bias_stride = p.bias.stride_e;
  out.bias_type = p.bias.type;
  out.factor = {static_cast<const float*>(p.factor.data), p.factor.index, p.factor.limit};
  return out;
}

template <class Config, auto kernel, class Params>
Status launch_on(const Params& params, Stream stream) {
  using T = Traits<Config>;
  const unsigned blocks = grid_blocks<Config>(params.problem, usable_sms());
  if (blocks == 0) return cudaSuccess;
  return launch_kernel<kernel>({blocks, T::kThreads, stream, T::kSharedBytes, T::kCluster}, params);
}

template <TileShape shape, bool kGather>
Status run(const GroupedGemmFp8Params& p, Stream stream) {
  using Config = Fp8Config<shape, kGather>;
  Fp8KernelParams params{};
  TensorMapDesc a = operand_a(p), b = operand_b(p);
  if constexpr (!kGather) {
    std::copy_n(Boxes<Config>::kA, 2, a.box);
    if (const Status s = encode_tensor_map(&params.map_a, a); s != cudaSuccess) return s;
  }
  std::copy_n(Boxes<Config>::kB, 3, b.box);
  if (const Status s = encode_tensor_map(&params.map_b, b); s != cudaSuccess) return s;
  params.problem = problem_of(p);
  params.gather = gather_of(p);
  params.scales = scales_of(p);
  params.epilogue = epilogue_of(p);
  return launch_on<Config, sm90_grouped_gemm_fp8_kernel<Config>>(params, stream);
}

}  // namespace moe_ops::cuda::sm90::fp8
