// Weight gradient of e4m3 columns for sm_90a: scheduler, TMA producer and ring of grouped_gemm,
// with a mainloop of its own.
//
// Both operands are matrices [features, columns] whose groups of 128 columns are stages: quantized
// columns start on a stage, whatever row an expert starts with, and are zero past its last one. So
// nothing that belongs to another expert is ever loaded. A stage's products go, see
// sm90_kernel.cuh, to an accumulator that starts from zero and are scaled and added to a second
// one; while a warpgroup does that, the other one's products run.
//
// A stage has a scale for each row and each column of the tile: two of grad for a thread, and 32 of
// a, those of its columns. They come from L1 while the products run. Two blocks of a cluster, row
// tiles of one expert, share every tile of a.
#include "cuda/grouped_gemm/sm90_kernel.cuh"
#include "cuda/grouped_gemm/tensor_map.h"
#include "cuda/grouped_gemm_fp8/sm90.h"
#include "cuda/grouped_gemm_fp8/wgrad.h"

namespace moe_ops::cuda::sm90::fp8 {

namespace {

struct WgradConfig : GemmDefaults {
  using Element = cutlass::float_e4m3_t;
  static constexpr int kTileM = 128, kTileN = 128, kTileK = 128;
  static constexpr int kCluster = 2;
  static constexpr bool kRaggedK = true, kFp8Groups = true;
  static_assert(kTileK == kFp8Block, "a stage is a group");
};
template <class Type>
struct WithOutput : WgradConfig {
  using Output = Type;
};
using T = Traits<WgradConfig>;

struct WgradKernelParams {
  CUtensorMap map_a;  // of grad
  CUtensorMap map_b;  // of a
  Problem problem;    // m: O, n: K
  int split_offset;   // not used
  const float *grad_scale, *a_scale;
  int64_t grad_scale_stride, a_scale_stride;
  void* out;
  DType out_type;
  bool add;
};

// Computes sum = products of the stages of `tile` (at least one), each times its scales.
template <class Accumulators>
__device__ inline void multiply_groups(T::SharedStorage& smem, const WgradKernelParams& p,
                                       const Tile& tile, PipelineState<WgradConfig>& read,
                                       Accumulators& sum, int thread) {
  using namespace cute;
  static_assert(T::kRowsM == 1);
  Tensor sA = make_tensor(make_smem_ptr(smem.a), T::LayoutA{});  // (M, K, stage)
  Tensor sB = make_tensor(make_smem_ptr(smem.b), T::LayoutB{});  // (N, K, stage)
  T::TiledMma mma;
  // Descriptors are uniform over a warpgroup.
  const int group = __shfl_sync(~0u, thread / kWarpgroup, 0);
  auto slice = mma.get_slice(group * kWarpgroup);
  Tensor tA = slice.make_fragment_A(slice.partition_A(sA));  // (mma, m, k, stage)
  Tensor tB = slice.make_fragment_B(slice.partition_B(sB));  // (mma, n, k, stage)
  Tensor acc = make_fragment_like(sum);

  constexpr int kOctets = T::kN / 8;
  const int row = tile.row0 + output_row<WgradConfig>(thread, 0),
            col = tile.col0 + 2 * (thread % 4);
  // Asking for each pair of columns would take three instructions a pair and stage.
  const bool whole = tile.col0 + T::kN <= p.problem.n;
  const int first = tile.k0 / static_cast<int>(kFp8Block);
  const float* grad_scale = p.grad_scale + first * p.grad_scale_stride + row;
  const float* a_scale = p.a_scale + first * p.a_scale_stride + col;

  clear(sum);
#pragma unroll 1
  for (int kt = 0; kt < tile.k_tiles; ++kt) {
    const int s = read.index();
    smem.full[s].wait(read.phase());
    mma.accumulate_ = GMMA::ScaleOut::Zero;
    warpgroup_fence_operand(acc);
    warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < size<2>(tA); ++k) {
      gemm(mma, tA(_, _, k, s), tB(_, _, k, s), acc);
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
    float of_row[2];
    float2 of_column[kOctets];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      of_row[i] = row + 8 * i < p.problem.m ? __ldg(grad_scale + 8 * i) : 0.f;
    const auto scales = [&](int j) { return reinterpret_cast<const float2*>(a_scale + 8 * j); };
    if (whole) {
#pragma unroll
      for (int j = 0; j < kOctets; ++j) of_column[j] = __ldg(scales(j));
    } else {
#pragma unroll
      for (int j = 0; j < kOctets; ++j) {
        of_column[j] = col + 8 * j < p.problem.n ? __ldg(scales(j)) : make_float2(0.f, 0.f);
      }
    }
    grad_scale += p.grad_scale_stride;
    a_scale += p.a_scale_stride;
    warpgroup_wait<0>();
    warpgroup_fence_operand(acc);
    release<WgradConfig>(smem, s);
    ++read;
#pragma unroll
    for (int j = 0; j < kOctets; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& to = sum(make_coord(c, i, j), 0, 0);
          const float factor = of_row[i] * (c == 0 ? of_column[j].x : of_column[j].y);
          to = fmaf(acc(make_coord(c, i, j), 0, 0), factor, to);
        }
      }
    }
  }
}

__global__ void __launch_bounds__(T::kThreads, 1)
    sm90_fp8_wgrad_kernel(const __grid_constant__ WgradKernelParams p) {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& smem = *reinterpret_cast<T::SharedStorage*>(shared_bytes);

  const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  const int cluster_rank = static_cast<int>(blockIdx.x) % T::kCluster;
  const int first = blockIdx.x / T::kCluster, step = gridDim.x / T::kCluster;
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(&p.map_a);
    cute::prefetch_tma_descriptor(&p.map_b);
    init_barriers<WgradConfig>(smem);
  }
  order_experts<WgradConfig>(p.problem, smem);
  cute::cluster_sync();

  if (group == 0) {
    cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters>();
    if (threadIdx.x < kWarp) produce_tma<WgradConfig>(p, smem, first, step, cluster_rank);
    return;
  }

  cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters>();
  const int thread = static_cast<int>(threadIdx.x) - kWarpgroup;
  PipelineState<WgradConfig> read;
  Scheduler<WgradConfig> scheduler(p.problem, smem);
  Tile tile;
  for (int index = first; scheduler.get(index, cluster_rank, tile); index += step) {
    auto sum = cute::partition_fragment_C(T::TiledMma{},
                                          cute::Shape<cute::Int<T::kM>, cute::Int<T::kN>>{});
    if (tile.k_tiles > 0) {
      multiply_groups(smem, p, tile, read, sum, thread);
    } else {
      cute::clear(sum);
    }
    const StoreExperts::Params out{p.out, p.out_type == DType::kFloat32, p.add, false, {}};
    if (p.out_type == DType::kFloat16) {
      StoreExperts::store<WithOutput<cutlass::half_t>>(out, p.problem, tile, sum, thread, nullptr);
    } else {
      StoreExperts::store<WithOutput<cutlass::bfloat16_t>>(out, p.problem, tile, sum, thread,
                                                           nullptr);
    }
  }
}

TensorMapDesc matrix_of(const GroupedGemmFp8WgradParams& p, const Fp8Columns& c, int64_t features) {
  TensorMapDesc d;
  d.data = c.data;
  d.type = CU_TENSOR_MAP_DATA_TYPE_UINT8;
  d.element_size = 1;
  d.rank = 2;
  d.size[0] = p.num_groups * kFp8Block;
  d.size[1] = features;
  d.stride[0] = c.stride;
  return d;
}

TensorMapDesc map_of_grad(const GroupedGemmFp8WgradParams& p) {
  return matrix_of(p, p.grad, p.out_features);
}

// Returns the map of a: B is always of rank 3; the values of all experts are one matrix.
TensorMapDesc map_of_a(const GroupedGemmFp8WgradParams& p) {
  TensorMapDesc d = matrix_of(p, p.a, p.in_features);
  d.rank = 3;
  return d;
}

}  // namespace

bool supports(const GroupedGemmFp8WgradParams& p) {
  return device_info().capability == 90 && forced_tile() != "generic" && p.in_features % 8 == 0 &&
         aligned_to(p.out, 16) && aligned_to(p.a.scale, 8) && p.a.scale_stride % 2 == 0 &&
         tensor_map_possible(map_of_grad(p)) && tensor_map_possible(map_of_a(p));
}

Status grouped_gemm_fp8_wgrad(const GroupedGemmFp8WgradParams& p, Stream stream) {
  WgradKernelParams params{};
  TensorMapDesc a = map_of_grad(p), b = map_of_a(p);
  std::copy_n(Boxes<WgradConfig>::kA, 2, a.box);
  std::copy_n(Boxes<WgradConfig>::kB, 3, b.box);
  MOE_TRY(encode_tensor_map(&params.map_a, a));
  MOE_TRY(encode_tensor_map(&params.map_b, b));
  params.problem.expert_offsets = p.expert_offsets;
  params.problem.num_experts = static_cast<int>(p.num_experts);
  params.problem.rows = static_cast<int>(p.max_rows());
  params.problem.m = static_cast<int>(p.out_features);
  params.problem.n = static_cast<int>(p.in_features);
  params.grad_scale = p.grad.scale;
  params.grad_scale_stride = p.grad.scale_stride;
  params.a_scale = p.a.scale;
  params.a_scale_stride = p.a.scale_stride;
  params.out = p.out;
  params.out_type = p.out_type;
  params.add = p.accumulate;
  const unsigned blocks = grid_blocks<WgradConfig>(params.problem, usable_sms());
  const Launch at{blocks, T::kThreads, stream, T::kSharedBytes, T::kCluster};
  return launch_kernel<sm90_fp8_wgrad_kernel>(at, params);
}

}  // namespace moe_ops::cuda::sm90::fp8
