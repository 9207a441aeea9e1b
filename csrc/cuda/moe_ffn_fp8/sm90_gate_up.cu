// The kernel of gate_up.h: that of grouped_gemm_fp8 with an epilogue of its own.
//
// A tile is 128 rows by 128 columns of gate and the 128 of up that belong to them (kSplitB): the
// two parts of the tile, and a row of it is one block of h. The numbers of a row lie in the four
// lanes of a quad, 32 in each, so the largest takes two shuffles. The codes of a warp's 16 rows are
// one box (sm90_store_boxes.cuh).
#include <string_view>

#include "cuda/activation.cuh"
#include "cuda/fp8.cuh"
#include "cuda/grouped_gemm_fp8/sm90_kernel.cuh"
#include "cuda/moe_ffn_fp8/gate_up.h"

namespace moe_ops::cuda::sm90::fp8 {

namespace {

template <TileShape shape>
struct GateUpConfig : Fp8Config<shape, true> {
  static constexpr bool kSplitB = true;
};

// Returns two codes of a block, that of `low` in the low byte, bitwise identical to fp8_code but by
// the GPU's conversion instruction.
__device__ __forceinline__ uint32_t fp8_codes(float low, float high, const Fp8Scale& s) {
  uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;"
      : "=h"(codes)
      : "f"(__fmul_rn(high, s.inverse)), "f"(__fmul_rn(low, s.inverse)));
  return codes;
}

// h = swiglu(gate, up) by rows as e4m3.
struct StoreGateUp {
  struct Params {
    CUtensorMap map_q;  // [N, I]
    float* scale;       // [N, I / 128]
    Finish finish;      // bias [E, 2 I]
  };

  template <class Config>
  __device__ static void store(const Params& p, const Problem& problem, const Tile& tile,
                               PartSums<Config> (&sums)[kParts<Config>], int thread,
                               unsigned char* boxes) {
    using cute::make_coord;
    constexpr int kOctets = Traits<PartOf<Config>>::kN / 8;
    asm volatile("" : "+r"(thread));  // as in multiply_scaled
    StoreBoxes box(boxes, tile.row0 + box_row<Config>(thread, 0), tile.row_end);
    if (box.empty()) return;
    auto &gate = sums[0], &up = sums[1];
#pragma unroll
    for (int h = 0; h < 2; ++h)
      p.finish.template apply<PartOf<Config>>(problem, tile, h * problem.n, sums[h], thread);
    const ActLimits<float> limits{};
    const int blocks = problem.n / static_cast<int>(kFp8Block);
    Fp8Scale scale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t most = 0;
#pragma unroll
      for (int j = 0; j < kOctets; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& v = gate(make_coord(c, i, j), 0, 0);
          v = act_forward<Activation::kSwiglu>(v, up(make_coord(c, i, j), 0, 0), limits);
          most = max(most, __float_as_uint(v) & 0x7fffffffu);
        }
      }
      most = max(most, __shfl_xor_sync(~0u, most, 1));
      most = max(most, __shfl_xor_sync(~0u, most, 2));
      scale[i] = fp8_scale(most);
      const int row = tile.row0 + output_row<Config>(thread, 0) + 8 * i;
      if (thread % 4 == 0 && row < tile.row_end)
        p.scale[int64_t{row} * blocks + tile.col0 / static_cast<int>(kFp8Block)] = scale[i].scale;
    }
    // Two codes count as 16 bits: those of octets 2 j and 2 j + 1 are four places apart.
    box.store<Halves::kApart>(p.map_q, tile.col0, 64, [&](int i, int j) {
      const auto codes = [&](int octet) {
        return fp8_codes(gate(make_coord(0, i, octet), 0, 0), gate(make_coord(1, i, octet), 0, 0),
                         scale[i]);
      };
      return codes(2 * j) | codes(2 * j + 1) << 16;
    });
  }
};

template <TileShape shape>
Status run(const GateUpParams& p, Stream stream) {
  const GroupedGemmFp8Params& g = p.product;
  Fp8KernelParams<StoreGateUp> params{};
  TensorMapDesc q;
  q.data = p.q;
  q.type = CU_TENSOR_MAP_DATA_TYPE_UINT8;
  q.element_size = 1;
  q.size[0] = q.stride[0] = g.out_features / 2;
  q.size[1] = g.num_rows;
  MOE_TRY(encode_tensor_map(&params.epilogue.map_q, rows_to_store(q)));
  params.epilogue.scale = p.scale;
  params.epilogue.finish = finish_of(g);
  return launch<GateUpConfig<shape>>(params, g, stream);
}

}  // namespace

bool supports(const GateUpParams& p) {
  const GroupedGemmFp8Params& g = p.product;
  if (device_info().capability != 90 || forced_tile() == "generic") return false;
  if (g.num_experts < 1 || g.in_features < 16 || g.in_features % 16 != 0) return false;
  if (g.a.index == nullptr || g.zero_tail || g.out_features % (2 * kFp8Block) != 0) return false;
  return tile_of(g) != TileShape::k64x128 && aligned_to(p.q, 16) &&
         tensor_map_possible(operand_a(g)) && tensor_map_possible(operand_b(g));
}

Status gate_up_swiglu(const GateUpParams& p, Stream stream) {
  return tile_of(p.product) == TileShape::k128x256 ? run<TileShape::k128x256>(p, stream)
                                                   : run<TileShape::k2x128x256>(p, stream);
}

}  // namespace moe_ops::cuda::sm90::fp8
