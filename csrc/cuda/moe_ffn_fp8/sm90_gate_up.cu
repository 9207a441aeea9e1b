// The kernel of gate_up.h: scheduler, producers and ring of grouped_gemm, scales of
// grouped_gemm_fp8.
//
// A tile is 128 rows by 128 columns of gate and the 128 of up that belong to them (kSplitB), so a
// row of the tile is one block of h. Sums of both halves are 128 registers a thread, and one
// accumulator of 64 serves the halves in turn: a stage is four products with gate, scaled and
// added, then four with up. A stage of A is read twice, one of 48 KiB lasts 1024 cycles of
// products: 48 bytes a cycle from L2, against 64 of two tiles of 128 x 128.
//
// The numbers of a row lie in the four lanes of a quad, 32 in each, so the largest takes two
// shuffles. Codes of neighbouring columns are put together by a transpose within the quad: each
// lane stores 16 bytes of every 64.
#include <string_view>

#include "cuda/activation.cuh"
#include "cuda/fp8.cuh"
#include "cuda/grouped_gemm_fp8/sm90_kernel.cuh"
#include "cuda/moe_ffn_fp8/gate_up.h"
#include "moe_ops/batch_invariant.h"

namespace moe_ops::cuda::sm90::fp8 {

namespace {

struct GateUpConfig : GemmDefaults {
  using Element = cutlass::float_e4m3_t;
  static constexpr int kTileM = 128, kTileN = 256, kTileK = 128;
  static constexpr Source kSourceA = Source::kGather;
  static constexpr bool kSplitB = true;
};
// One half of it, as the epilogue's helpers see the sums.
struct HalfConfig : GateUpConfig {
  static constexpr int kTileN = 128;
  static constexpr bool kSplitB = false;
};

struct GateUpKernelParams {
  CUtensorMap map_b;
  CUtensorMap map_a;  // not used
  Problem problem;    // n: I
  int split_offset;   // I
  GatherRows gather;
  BlockScales scales;
  StoreFp8::Params epilogue;  // bias and factor
  uint8_t* q;
  float* scale;
};

// gate, up = the halves of the tile's products, scaled (multiply_scaled).
template <class Sums>
__device__ inline void multiply_gate_up(Traits<GateUpConfig>::SharedStorage& smem,
                                        const GateUpKernelParams& p, const Tile& tile,
                                        PipelineState<GateUpConfig>& read, Sums& gate, Sums& up,
                                        int thread) {
  using namespace cute;
  using T = Traits<GateUpConfig>;
  using Half = Traits<HalfConfig>;
  static_assert(Half::kK == Half::kSpan, "a half is one column of atoms");
  using LayoutHalf = decltype(tile_to_shape(Half::Atom<Major::kK>{},
                                            Shape<Int<Half::kN>, Int<Half::kK>>{}, Step<_1, _2>{}));
  Tensor sA = make_tensor(make_smem_ptr(smem.a), T::LayoutA{});  // (M, K, stage)
  Half::TiledMma mma;
  // Descriptors are uniform over a warpgroup.
  const int group = __shfl_sync(~0u, thread / kWarpgroup, 0);
  auto slice = mma.get_slice(group * kWarpgroup);
  Tensor tA = slice.make_fragment_A(slice.partition_A(sA));  // (mma, m, k, stage)
  Tensor acc = make_fragment_like(gate);

  const float* a_scale[2];
  float a[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    a_scale[i] = row_scales(p.scales, tile, tile.row0 + output_row<HalfConfig>(thread, 0) + 8 * i);
    a[i] = a_scale[i] != nullptr ? __ldg(a_scale[i]) : 0.f;
  }
  constexpr int kBlock = static_cast<int>(kFp8Block);
  const float* b_scale[2] = {
      p.scales.b + tile.expert * p.scales.b_stride_e + tile.col0 / kBlock * p.scales.b_stride_o,
      p.scales.b + tile.expert * p.scales.b_stride_e +
          (tile.col0 + p.split_offset) / kBlock * p.scales.b_stride_o};
  float b[2] = {__ldg(b_scale[0]), __ldg(b_scale[1])};

  clear(gate);
  clear(up);
#pragma unroll 1
  for (int kt = 0; kt < tile.k_tiles; ++kt) {
    const int s = read.index();
    smem.full[s].wait(read.phase());
    cutlass::arch::fence_view_async_shared();  // A was copied by cp.async
    const float factor[2][2] = {{a[0] * b[0], a[1] * b[0]}, {a[0] * b[1], a[1] * b[1]}};
    const int next = min(kt + 1, tile.k_tiles - 1);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      Tensor sB = make_tensor(make_smem_ptr(smem.b + (s * T::kN + h * Half::kN) * T::kK),
                              LayoutHalf{});                     // (N, K)
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
      if (h == 0) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          a[i] = a_scale[i] != nullptr ? __ldg(a_scale[i] + next) : 0.f;
          b[i] = __ldg(b_scale[i] + next);
        }
      }
      warpgroup_wait<0>();
      warpgroup_fence_operand(acc);
      if (h == 1) release<GateUpConfig>(smem, s);
      Sums& sum = h == 0 ? gate : up;
#pragma unroll
      for (int j = 0; j < Half::kN / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& to = sum(make_coord(c, i, j), 0, 0);
            to = fmaf(acc(make_coord(c, i, j), 0, 0), factor[h][i], to);
          }
        }
      }
    }
    ++read;
  }
}

template <class Sums>
__device__ inline void add_biases(const GateUpKernelParams& p, const Tile& tile, Sums& gate,
                                  Sums& up, int thread) {
  const auto add = [&]<class Type>(Type) {
    using Config = WithOutput<HalfConfig, Type>;
    const Type* const bias =
        static_cast<const Type*>(p.epilogue.bias) + tile.expert * p.epilogue.bias_stride;
    add_bias<Config>(bias, tile, p.problem.n, gate, thread);
    add_bias<Config>(bias + p.split_offset, tile, p.problem.n, up, thread);
  };
  if (p.epilogue.bias_type == DType::kBFloat16) {
    add(cutlass::bfloat16_t{});
  } else if (p.epilogue.bias_type == DType::kFloat16) {
    add(cutlass::half_t{});
  } else {
    add(float{});
  }
}

// h = swiglu(gate, up) by rows as e4m3.
template <class Sums>
__device__ inline void store_h(const GateUpKernelParams& p, const Tile& tile, const Sums& gate,
                               const Sums& up, int thread) {
  using cute::make_coord;
  constexpr int kOctets = Traits<HalfConfig>::kN / 8;
  const ActLimits<float> limits{};
  const int q = thread % 4, blocks = p.problem.n / static_cast<int>(kFp8Block);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = tile.row0 + output_row<HalfConfig>(thread, 0) + 8 * i;
    float h[2 * kOctets];
    uint32_t most = 0;
#pragma unroll
    for (int j = 0; j < kOctets; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& v = h[2 * j + c];
        v = act_forward<Activation::kSwiglu>(gate(make_coord(c, i, j), 0, 0),
                                             up(make_coord(c, i, j), 0, 0), limits);
        most = max(most, __float_as_uint(v) & 0x7fffffffu);
      }
    }
    most = max(most, __shfl_xor_sync(~0u, most, 1));
    most = max(most, __shfl_xor_sync(~0u, most, 2));
    const Fp8Scale block = fp8_scale(most);
    if (q == 0 && row < tile.row_end) {
      p.scale[int64_t{row} * blocks + tile.col0 / static_cast<int>(kFp8Block)] = block.scale;
    }
    uint8_t* const to = p.q + int64_t{row} * p.problem.n + tile.col0 + 16 * q;
#pragma unroll
    for (int g = 0; g < kOctets / 8; ++g) {
      // Word w: this lane's two columns of octets 2w and 2w + 1.
      uint32_t words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        words[w] = 0;
#pragma unroll
        for (int b = 0; b < 4; ++b) words[w] |= fp8_code(h[16 * g + 4 * w + b], block) << (8 * b);
      }
      quad_transpose(words);  // now word w is that of lane w, of octets 2q and 2q + 1
      const uint4 out = make_uint4(
          __byte_perm(words[0], words[1], 0x5410), __byte_perm(words[2], words[3], 0x5410),
          __byte_perm(words[0], words[1], 0x7632), __byte_perm(words[2], words[3], 0x7632));
      if (row < tile.row_end) *reinterpret_cast<uint4*>(to + 64 * g) = out;
    }
  }
}

__global__ void __launch_bounds__(Traits<GateUpConfig>::kThreads, 1)
    sm90_gate_up_swiglu_kernel(const __grid_constant__ GateUpKernelParams p) {
  using T = Traits<GateUpConfig>;
  using Half = Traits<HalfConfig>;
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& smem = *reinterpret_cast<T::SharedStorage*>(shared_bytes);

  const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(&p.map_b);
    init_barriers<GateUpConfig>(smem);
  }
  __syncthreads();

  if (group == 0) {
    cutlass::arch::warpgroup_reg_dealloc<kFp8ProducerRegisters>();
    produce_gather<GateUpConfig>(p, smem, blockIdx.x, gridDim.x, 0);
    return;
  }

  cutlass::arch::warpgroup_reg_alloc<kFp8ConsumerRegisters>();
  const int thread = static_cast<int>(threadIdx.x) - kWarpgroup;
  PipelineState<GateUpConfig> read;
  Scheduler<GateUpConfig> scheduler(p.problem, smem);
  Tile tile;
  for (int index = blockIdx.x; scheduler.get(index, 0, tile); index += gridDim.x) {
    const auto shape = cute::Shape<cute::Int<Half::kM>, cute::Int<Half::kN>>{};
    auto gate = cute::partition_fragment_C(Half::TiledMma{}, shape);
    auto up = cute::partition_fragment_C(Half::TiledMma{}, shape);
    multiply_gate_up(smem, p, tile, read, gate, up, thread);
    if (p.epilogue.factor.data != nullptr) {
      scale_rows<HalfConfig>(p.epilogue.factor, tile, gate, thread);
      scale_rows<HalfConfig>(p.epilogue.factor, tile, up, thread);
    }
    if (p.epilogue.bias != nullptr) add_biases(p, tile, gate, up, thread);
    store_h(p, tile, gate, up, thread);
  }
}

}  // namespace

bool supports(const GateUpParams& p) {
  const GroupedGemmFp8Params& g = p.product;
  const std::string_view forced = forced_tile();
  if (device_info().capability != 90 || (!forced.empty() && forced != "128x256")) return false;
  if (g.num_experts < 1 || g.in_features < 16 || g.in_features % 16 != 0) return false;
  if (g.a.index == nullptr || g.zero_tail || g.out_features % (2 * kFp8Block) != 0) return false;
  const bool many = batch_invariant() || g.num_rows / std::min(g.num_experts, g.num_rows) > 64;
  if (forced.empty() && !many) return false;
  return reinterpret_cast<uintptr_t>(p.q) % 16 == 0 && tensor_map_possible(operand_a(g)) &&
         tensor_map_possible(operand_b(g));
}

Status gate_up_swiglu(const GateUpParams& p, Stream stream) {
  const GroupedGemmFp8Params& g = p.product;
  GateUpKernelParams params{};
  TensorMapDesc b = operand_b(g);
  std::copy_n(Boxes<GateUpConfig>::kB, 3, b.box);
  if (const Status s = encode_tensor_map(&params.map_b, b); s != cudaSuccess) return s;
  params.problem = problem_of(g);
  params.problem.n = static_cast<int>(g.out_features / 2);
  params.split_offset = params.problem.n;
  params.gather = gather_of(g);
  params.scales = scales_of(g);
  params.epilogue = epilogue_of(g);
  params.q = p.q;
  params.scale = p.scale;
  return launch_on<GateUpConfig, sm90_gate_up_swiglu_kernel>(params, stream);
}

}  // namespace moe_ops::cuda::sm90::fp8
