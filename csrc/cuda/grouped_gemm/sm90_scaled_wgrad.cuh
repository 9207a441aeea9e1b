// The weight gradient with a factor for each row, both operands gathered: what moe_linear_reduce
// asks for. Scheduler, ring and gathering producer are those of the other kernels.
//
// cp.async cannot scale and wgmma reads B from shared memory only, so the consumers multiply the
// lines of B (rows of the product) where they lie, before their products are issued and while those
// of the stage before run: 16 KiB read and written, 256 cycles of shared memory beside the 384 of
// the 512 that a stage's products read theirs. Factor times B is rounded to the element type, as in
// the kernels for any card.
#pragma once

#include "cuda/grouped_gemm/sm90_launch.cuh"
#include "cuda/grouped_gemm/sm90_scaled_wgrad.h"

namespace moe_ops::cuda::sm90 {

template <class Config>
struct ScaledWgradParams : KernelParams<Config, StoreExperts> {
  ScaleRows scale;
};

// A thread's piece of a line is the same in all lines, kAtOnce apart, that it scales. Factors are
// looked up behind the products: their places two stages ahead, themselves one.
template <class Config>
class LineFactors {
  using T = Traits<Config>;
  using Element = typename Config::Element;
  static constexpr int kThreads = T::kTileGroups * kWarpgroup;
  static constexpr int kAtOnce = kThreads / kPieces;
  static constexpr int kLines = T::kK / kAtOnce;
  static_assert(T::kGatherB && Config::kMajorB == Major::kMN && T::kK % kAtOnce == 0);

 public:
  __device__ LineFactors(const ScaleRows& scale, const Tile& tile, int thread)
      : scale_(scale), thread_(thread), begin_(tile.k0), end_(tile.k0 + tile.k_size) {
    look_up(0);
    next(0);
  }

  // Prepares the next stage, after the products of stage kt - 1 of the tile have been issued.
  __device__ void next(int kt) {
#pragma unroll
    for (int i = 0; i < kLines; ++i) {
      const bool inside = place_[i] >= 0 && place_[i] < scale_.limit;
      factor_[i] = inside ? __ldg(scale_.data + place_[i]) : 0.f;
    }
    look_up(kt + 1);
  }

  // Multiplies B of the stage by the factors. All threads that share the tile take part. Lines past
  // the end of the expert hold zeros.
  __device__ void multiply(Element* b, int barrier) const {
#pragma unroll
    for (int block = 0; block < T::kN / T::kSpan; ++block) {
      auto* pieces = reinterpret_cast<uint4*>(b + block * T::kSpan * T::kK) + thread_;
#pragma unroll
      for (int i = 0; i < kLines; ++i) {
        const uint4 v = pieces[i * kThreads];
        uint32_t r[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const float2 f = unpack<Element>(r[w]);
          r[w] = pack<Element>(f.x * factor_[i], f.y * factor_[i]);
        }
        pieces[i * kThreads] = make_uint4(r[0], r[1], r[2], r[3]);
      }
    }
    // Written through the generic proxy, read through the asynchronous one.
    cutlass::arch::fence_view_async_shared();
    cutlass::arch::NamedBarrier::sync(kThreads, barrier);
  }

 private:
  __device__ void look_up(int kt) {
#pragma unroll
    for (int i = 0; i < kLines; ++i) {
      const int r = begin_ + kt * T::kK + thread_ / kPieces + i * kAtOnce;
      place_[i] = r >= end_ ? -1 : scale_.index != nullptr ? __ldg(scale_.index + r) : r;
    }
  }

  const ScaleRows& scale_;
  int thread_, begin_, end_;
  int place_[kLines];
  float factor_[kLines];
};

// Computes acc = sum over the stages of `tile` (at least one), like multiply() of
// sm90_mainloop.cuh.
template <class Config, class Accumulators, class Issued>
__device__ inline void multiply_scaled_lines(typename Traits<Config>::SharedStorage& smem,
                                             const ScaleRows& scale, const Tile& tile,
                                             PipelineState<Config>& read, Accumulators& acc,
                                             int thread, int barrier, const Issued& issued) {
  using namespace cute;
  using T = Traits<Config>;
  Tensor sA = make_tensor(make_smem_ptr(smem.a), typename T::LayoutA{});  // (M, K, stage)
  Tensor sB = make_tensor(make_smem_ptr(smem.b), typename T::LayoutB{});  // (N, K, stage)
  typename T::TiledMma mma;
  // Descriptors are uniform over a warpgroup.
  const int group = __shfl_sync(~0u, thread / kWarpgroup, 0);
  auto slice = mma.get_slice(group * kWarpgroup);
  Tensor tA = slice.make_fragment_A(slice.partition_A(sA));  // (mma, m, k, stage)
  Tensor tB = slice.make_fragment_B(slice.partition_B(sB));  // (mma, n, k, stage)

  LineFactors<Config> factors(scale, tile, thread);
  mma.accumulate_ = GMMA::ScaleOut::Zero;
  PipelineState<Config> done = read;
#pragma unroll 1
  for (int kt = 0; kt < tile.k_tiles; ++kt) {
    const int s = read.index();
    smem.full[s].wait(read.phase());
    factors.multiply(smem.b + s * T::kN * T::kK, barrier);  // its fence is for A, too
    warpgroup_fence_operand(acc);
    warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < size<2>(tA); ++k) {
      gemm(mma, tA(_, _, k, s), tB(_, _, k, s), acc);
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
    factors.next(kt + 1);
    warpgroup_wait<1>();
    warpgroup_fence_operand(acc);
    if (kt > 0) {
      release<Config>(smem, done.index());
      ++done;
    }
    ++read;
  }
  issued();
  warpgroup_wait<0>();
  warpgroup_fence_operand(acc);
  release<Config>(smem, done.index());
}

template <class Config>
__global__ void __launch_bounds__(Traits<Config>::kThreads, 1)
    sm90_scaled_wgrad_kernel(const __grid_constant__ ScaledWgradParams<Config> p) {
  using T = Traits<Config>;
  static_assert(Config::kRaggedK && T::kGatherA && T::kGatherB && T::kPingpong && T::kCluster == 1);
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& smem = *reinterpret_cast<typename T::SharedStorage*>(shared_bytes);

  const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (threadIdx.x == 0) init_barriers<Config>(smem);
  order_experts<Config>(p.problem, smem);
  __syncthreads();
  if (group == 0) {
    cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters>();
    produce_gather_lines<Config>(p, smem, blockIdx.x, gridDim.x, 0);
    return;
  }

  // The registers are those of sm90_grouped_gemm_kernel.
  cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters>();
  const int consumer = group - 1;
  const int thread = static_cast<int>(threadIdx.x) - kWarpgroup * group;
  PipelineState<Config> read;
  Scheduler<Config> scheduler(p.problem, smem);
  Tile tile;
  int count = 0;
  for (int index = blockIdx.x; scheduler.get(index, 0, tile); index += gridDim.x, ++count) {
    if (count % 2 != consumer) {
      read.advance(tile.k_tiles);
      continue;
    }
    auto acc = cute::partition_fragment_C(typename T::TiledMma{},
                                          cute::Shape<cute::Int<T::kM>, cute::Int<T::kN>>{});
    await_mma_order<Config>(smem, consumer, count);
    const auto issued = [&] { pass_mma_order<Config>(smem, consumer); };
    if (tile.k_tiles > 0) {
      multiply_scaled_lines<Config>(smem, p.scale, tile, read, acc, thread, consumer, issued);
    } else {
      cute::clear(acc);
      issued();
    }
    StoreExperts::store<Config>(p.epilogue, p.problem, tile, acc, thread, nullptr);
  }
}

template <DType type>
Status run_scaled_wgrad(const GroupedWgradParams& p, Stream stream) {
  using Config = ConfigOf<type, Product::kGatherTNGather, TileShape::k128x128>;
  using T = Traits<Config>;
  const RowScale& scale = p.a_scale.data != nullptr ? p.a_scale : p.grad_scale;
  ScaledWgradParams<Config> params{};
  params.problem.expert_offsets = p.expert_offsets;
  params.problem.num_experts = static_cast<int>(p.num_experts);
  params.problem.rows = static_cast<int>(p.num_rows);
  params.problem.m = static_cast<int>(p.out_features);
  params.problem.n = static_cast<int>(p.in_features);
  params.gather = gather_rows(p.grad);
  params.gather_b = gather_rows(p.a);
  params.epilogue = {p.out, p.out_type == DType::kFloat32, p.accumulate, false, {}};
  params.scale = {static_cast<const float*>(scale.data), scale.index, scale.limit};
  const unsigned blocks = grid_blocks<Config>(params.problem, usable_sms());
  if (blocks == 0) return cudaSuccess;
  const Launch at{blocks, T::kThreads, stream, T::kSharedBytes};
  return launch_kernel<sm90_scaled_wgrad_kernel<Config>>(at, params);
}

}  // namespace moe_ops::cuda::sm90
