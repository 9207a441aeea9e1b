// The kernel of grouped_gemm_fp8 for sm_90a: scheduler, producers, ring of stages and stores of
// grouped_gemm (sm90_kernel.cuh there), with a mainloop of its own.
//
// A stage is 128 of k, one block of scales. A tile has 128 or 256 columns, parts of 128 with a
// scale of b each. The products of a part (four wgmma m64n128k32 a warpgroup) go to an accumulator
// that starts from zero; scaled, they are added to the part's sums, as the tensor cores keep about
// 14 bits of the largest product inside a sum. One accumulator serves the parts one after the
// other: 64 registers beside the 128 of the sums. While a warpgroup scales, the other one's
// products run; a product in flight within a warpgroup would need a second accumulator.
//
// Scales of a are two for a thread, those of its rows; all are fetched a stage ahead.
#pragma once

#include "cuda/grouped_gemm/sm90_kernel.cuh"
#include "cuda/grouped_gemm/sm90_operands.h"
#include "cuda/grouped_gemm_fp8/sm90.h"
#include "cuda/grouped_gemm_fp8/sm90_operands.h"

namespace moe_ops::cuda::sm90::fp8 {

template <TileShape shape, bool kGathered>
struct Fp8Config : GemmDefaults {
  static constexpr int kRows = shape == TileShape::k64x128 ? 64 : 128;
  using Element = cutlass::float_e4m3_t;
  static constexpr int kTileM = kRows, kTileN = kRows == 64 ? 128 : 256, kTileK = 128;
  static constexpr Schedule kSchedule = kRows == 64 ? Schedule::kPingpong : Schedule::kCooperative;
  static constexpr int kCluster = shape == TileShape::k2x128x256 ? 2 : 1;
  static constexpr Source kSourceA = kGathered ? Source::kGather : Source::kTma;
  static constexpr int kBoxM = kRows == 64 ? 16 : 64;
  static constexpr bool kStoreBoxes = kRows == 128;
};

// A part of a tile as the epilogue's helpers see it.
template <class Config>
struct PartOf : Config {
  static constexpr int kTileN = kFp8Block;
  static constexpr bool kSplitB = false;
  static_assert(Config::kTileK == kFp8Block && Config::kTileN % kFp8Block == 0);
};

template <class Config>
constexpr int kParts = Config::kTileN / static_cast<int>(kFp8Block);

// The sums of a part, in registers.
template <class Config>
using PartSums = decltype(cute::partition_fragment_C(
    typename Traits<PartOf<Config>>::TiledMma{},
    cute::Shape<cute::Int<Config::kTileM>, cute::Int<PartOf<Config>::kTileN>>{}));

struct BlockScales {
  const float* a;  // [limit, blocks] a_stride apart; row r has those of index[r] / divisor
  int64_t a_stride;
  const int32_t* index;
  int divisor;
  int limit;
  const float* b;  // [E, column blocks, blocks]
  int64_t b_stride_e, b_stride_o;
};

// Returns where the scales of row `row` of the product begin in `a`, or -1 if there is no such row.
// Offsets of scales have 32 bits to save registers.
__device__ inline int row_scales(const BlockScales& s, const Tile& tile, int row) {
  if (row >= tile.row_end) return -1;
  int source = row;
  if (s.index != nullptr) {
    const int at = __ldg(s.index + row);
    source = at < 0 ? -1 : at / s.divisor;
  }
  return source >= 0 && source < s.limit ? source * static_cast<int>(s.a_stride) : -1;
}

// Computes sums = products of the stages of `tile`, each times its scales; otherwise like
// multiply() of grouped_gemm.
template <class Config, class Issued>
__device__ inline void multiply_scaled(typename Traits<Config>::SharedStorage& smem,
                                       const BlockScales& scales, const Problem& problem,
                                       int split_offset, const Tile& tile,
                                       PipelineState<Config>& read,
                                       PartSums<Config> (&sums)[kParts<Config>], int thread,
                                       const Issued& issued) {
  using namespace cute;
  using T = Traits<Config>;
  using Part = Traits<PartOf<Config>>;
  static_assert(T::kRowsM == 1 && T::kK == T::kSpan, "a part of B is one column of atoms");
  using LayoutPart = decltype(tile_to_shape(typename Part::template Atom<Major::kK>{},
                                            Shape<Int<Part::kN>, Int<Part::kK>>{}, Step<_1, _2>{}));
  constexpr int kBlock = static_cast<int>(kFp8Block);
  // Values that depend on the thread index are recomputed for each tile: kept, they would leave the
  // sums too few registers.
  asm volatile("" : "+r"(thread));
  Tensor sA = make_tensor(make_smem_ptr(smem.a), typename T::LayoutA{});  // (M, K, stage)
  typename Part::TiledMma mma;
  // Descriptors are uniform over a warpgroup.
  const int group = __shfl_sync(~0u, thread / kWarpgroup, 0);
  auto slice = mma.get_slice(group * kWarpgroup);
  Tensor tA = slice.make_fragment_A(slice.partition_A(sA));  // (mma, m, k, stage)
  PartSums<Config> acc;

  int a_at[2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
    a_at[i] = row_scales(scales, tile, tile.row0 + output_row<Config>(thread, 0) + 8 * i);
  const int stride_o = static_cast<int>(scales.b_stride_o);
  const int b_at =
      tile.expert * static_cast<int>(scales.b_stride_e) + tile.col0 / kBlock * stride_o;
  // From a part's scales to the next one's. A part past the last column has products of zero.
  const int b_step = Config::kSplitB                  ? split_offset / kBlock * stride_o
                     : tile.col0 + kBlock < problem.n ? stride_o
                                                      : 0;
#pragma unroll
  for (auto& sum : sums) clear(sum);
  if (tile.k_tiles == 0) issued();

#pragma unroll 1
  for (int kt = 0; kt < tile.k_tiles; ++kt) {
    const int s = read.index();
    smem.full[s].wait(read.phase());
    // cp.async writes through the generic proxy, wgmma reads through the asynchronous one.
    if constexpr (T::kGather) cutlass::arch::fence_view_async_shared();
    float a[2];
#pragma unroll
    for (int h = 0; h < kParts<Config>; ++h) {
      Tensor sB = make_tensor(make_smem_ptr(smem.b + (s * T::kN + h * Part::kN) * T::kK),
                              LayoutPart{});                     // (N, K)
      Tensor tB = slice.make_fragment_B(slice.partition_B(sB));  // (mma, n, k)
      mma.accumulate_ = GMMA::ScaleOut::Zero;
      warpgroup_fence_operand(acc);
      warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < size<2>(tA); ++k) {
        gemm(mma, tA(_, _, k, s), tB(_, _, k), acc);
        mma.accumulate_ = GMMA::ScaleOut::One;
      }
      warpgroup_commit_batch();
      // Scales come from L1 or L2 while products run.
      float factor[2];
      const float b = __ldg(scales.b + static_cast<uint32_t>(b_at + h * b_step + kt));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (h == 0)
          a[i] = a_at[i] >= 0 ? __ldg(scales.a + static_cast<uint32_t>(a_at[i] + kt)) : 0.f;
        factor[i] = a[i] * b;
      }
      const bool last = h + 1 == kParts<Config>;
      if (last && kt + 1 == tile.k_tiles) issued();
      warpgroup_wait<0>();
      warpgroup_fence_operand(acc);
      if (last) release<Config>(smem, s);
#pragma unroll
      for (int j = 0; j < Part::kN / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& to = sums[h](make_coord(c, i, j), 0, 0);
            to = fmaf(acc(make_coord(c, i, j), 0, 0), factor[i], to);
          }
        }
      }
    }
    ++read;
  }
}

template <class Config, class Type>
struct WithOutput : Config {
  using Output = Type;
};

// Bias and factor of the op, with types known at run time.
struct Finish {
  const void* bias;  // [E, n], or nullptr
  int64_t bias_stride;
  DType bias_type;
  ScaleRows factor;

  // Computes sum = factor[row] * sum + bias[expert, column + `first`]; `part`: a tile of
  // Config::kTileN columns.
  template <class Config, class Acc>
  __device__ void apply(const Problem& problem, const Tile& part, int first, Acc& sum,
                        int thread) const {
    if (part.expert >= problem.num_experts) return;
    if (factor.data != nullptr) scale_rows<Config>(factor, part, sum, thread);
    if (bias == nullptr) return;
    const auto add = [&]<class Type>(Type) {
      add_bias<WithOutput<Config, Type>>(
          static_cast<const Type*>(bias) + part.expert * bias_stride + first, part, problem.n, sum,
          thread);
    };
    if (bias_type == DType::kBFloat16) {
      add(cutlass::bfloat16_t{});
    } else if (bias_type == DType::kFloat16) {
      add(cutlass::half_t{});
    } else {
      add(float{});
    }
  }
};

struct StoreFp8 {
  struct Params {
    void* out;
    int64_t out_stride;
    DType out_type;
    Finish finish;
    bool boxed;  // store through map_out
    CUtensorMap map_out;
  };

  template <class Config>
  __device__ static void store(const Params& p, const Problem& problem, const Tile& tile,
                               PartSums<Config> (&sums)[kParts<Config>], int thread,
                               unsigned char* boxes) {
    asm volatile("" : "+r"(thread));  // as in multiply_scaled
    using Bf16 = WithOutput<PartOf<Config>, cutlass::bfloat16_t>;
    using Fp16 = WithOutput<PartOf<Config>, cutlass::half_t>;
    const auto each_part = [&](const auto& visit) {
      Tile part = tile;
#pragma unroll
      for (int h = 0; h < kParts<Config>; ++h, part.col0 += Bf16::kTileN)
        if (part.col0 < problem.n) visit(part, sums[h]);
    };
    each_part([&](const Tile& part, auto& sum) {
      p.finish.template apply<Bf16>(problem, part, 0, sum, thread);
    });
    if (Config::kStoreBoxes && p.boxed) {
      StoreBoxes box(boxes, tile.row0 + box_row<Config>(thread, 0), tile.row_end);
      if (box.empty()) return;
      each_part([&](const Tile& part, const auto& sum) {
        if (p.out_type == DType::kFloat16) {
          store_columns<Fp16>(box, p.map_out, part.col0, problem.n, sum, 0);
        } else {
          store_columns<Bf16>(box, p.map_out, part.col0, problem.n, sum, 0);
        }
      });
      return;
    }
    const OutRows out{p.out, p.out_stride, p.out_type == DType::kFloat32, nullptr, 1, problem.rows};
    each_part([&](const Tile& part, const auto& sum) {
      if (p.out_type == DType::kFloat16) {
        store_rows<Fp16>(out, part, problem.n, sum, thread);
      } else {
        store_rows<Bf16>(out, part, problem.n, sum, thread);
      }
    });
  }
};

template <class Epilogue>
struct Fp8KernelParams {
  CUtensorMap map_a;
  CUtensorMap map_b;
  Problem problem;
  int split_offset;
  GatherRows gather;
  BlockScales scales;
  typename Epilogue::Params epilogue;
};

// Registers per thread, from the 64512 of a block: two consumer warpgroups at 224 and a producer at
// 56. A gathering producer needs more than the 40 that bfloat16 kernels leave it.
constexpr int kFp8ProducerRegisters = 56;
constexpr int kFp8ConsumerRegisters = 224;

template <class Config, class Epilogue>
__global__ void __launch_bounds__(Traits<Config>::kThreads, 1)
    sm90_grouped_gemm_fp8_kernel(const __grid_constant__ Fp8KernelParams<Epilogue> p) {
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
  const int consumer = group - 1;
  const int thread = static_cast<int>(threadIdx.x) - kWarpgroup * (T::kPingpong ? group : 1);
  PipelineState<Config> read;
  Scheduler<Config> scheduler(p.problem, smem);
  Tile tile;
  int count = 0;
  for (int index = first; scheduler.get(index, cluster_rank, tile); index += step, ++count) {
    if (T::kPingpong && count % 2 != consumer) {
      read.advance(tile.k_tiles);
      continue;
    }
    PartSums<Config> sums[kParts<Config>];
    if constexpr (T::kPingpong) await_mma_order<Config>(smem, consumer, count);
    const auto issued = [&] {
      if constexpr (T::kPingpong) pass_mma_order<Config>(smem, consumer);
    };
    if (index == first) begin_later<Config>(smem, tile, consumer);
    multiply_scaled<Config>(smem, p.scales, p.problem, p.split_offset, tile, read, sums, thread,
                            issued);
    Epilogue::template store<Config>(p.epilogue, p.problem, tile, sums, thread,
                                     warp_boxes<Config>(smem));
  }
  if constexpr (Config::kStoreBoxes) StoreBoxes::finish();
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

inline Finish finish_of(const GroupedGemmFp8Params& p) {
  return {p.bias.data,
          p.bias.stride_e,
          p.bias.type,
          {static_cast<const float*>(p.factor.data), p.factor.index, p.factor.limit}};
}

// Sets all parameters but the epilogue's, which the caller has set, and launches the kernel.
template <class Config, class Epilogue>
Status launch(Fp8KernelParams<Epilogue>& params, const GroupedGemmFp8Params& p, Stream stream) {
  using T = Traits<Config>;
  TensorMapDesc a = operand_a(p), b = operand_b(p);
  if constexpr (!T::kGather) {
    std::copy_n(Boxes<Config>::kA, 2, a.box);
    MOE_TRY(encode_tensor_map(&params.map_a, a));
  }
  std::copy_n(Boxes<Config>::kB, 3, b.box);
  MOE_TRY(encode_tensor_map(&params.map_b, b));
  params.problem = problem_of(p);
  if constexpr (Config::kSplitB) params.problem.n /= 2;
  params.split_offset = params.problem.n;
  params.gather = gather_of(p);
  params.scales = scales_of(p);
  const unsigned blocks = grid_blocks<Config>(params.problem, usable_sms());
  if (blocks == 0) return cudaSuccess;
  return launch_kernel<sm90_grouped_gemm_fp8_kernel<Config, Epilogue>>(
      {blocks, T::kThreads, stream, T::kSharedBytes, T::kCluster}, params);
}

template <TileShape shape, bool kGather>
Status run(const GroupedGemmFp8Params& p, Stream stream) {
  using Config = Fp8Config<shape, kGather>;
  Fp8KernelParams<StoreFp8> params{};
  StoreFp8::Params& e = params.epilogue;
  e.out = p.out.data;
  e.out_stride = p.out.stride;
  e.out_type = p.out.type;
  e.finish = finish_of(p);
  if (Config::kStoreBoxes && p.out.type != DType::kFloat32) {
    const TensorMapDesc out =
        rows_to_store(matrix(p.out.data, p.out.type, p.out_features, p.num_rows, p.out.stride));
    e.boxed = tensor_map_possible(out);
    if (e.boxed) MOE_TRY(encode_tensor_map(&e.map_out, out));
  }
  return launch<Config>(params, p, stream);
}

}  // namespace moe_ops::cuda::sm90::fp8
