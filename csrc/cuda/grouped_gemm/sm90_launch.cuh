// From the parameters of the op to those of a kernel. Included by the files in instantiations/.
#pragma once

#include "cuda/grouped_gemm/sm90.h"
#include "cuda/grouped_gemm/sm90_kernel.cuh"
#include "cuda/grouped_gemm/sm90_operands.h"

namespace moe_ops::cuda::sm90 {

template <DType type>
using ElementOf =
    cute::conditional_t<type == DType::kBFloat16, cutlass::bfloat16_t, cutlass::half_t>;

template <DType type, Product product, TileShape shape>
struct ConfigOf : GemmDefaults {
  static constexpr GemmConfig kChoice = config_of(product, shape);
  static_assert(kChoice.shape == shape && has_kernel(product, shape));
  using Element = ElementOf<type>;
  using Output = Element;
  static constexpr int kTileM = kChoice.m, kTileN = kChoice.n, kTileK = kChoice.k;
  static constexpr int kConsumers = shape == TileShape::k64x64 ? 1 : 2;
  static constexpr Schedule kSchedule =
      kChoice.pingpong ? Schedule::kPingpong : Schedule::kCooperative;
  static constexpr int kCluster = kChoice.cluster;
  static constexpr bool kStoreBoxes = !kChoice.pingpong && kConsumers == 2;
  static constexpr int kBoxM = kChoice.m == 64 ? 16 : 64;
  static constexpr bool kRaggedK = is_wgrad(product);
  static constexpr Source kSourceA =
      gathers(product) && product != Product::kTNGather ? Source::kGather : Source::kTma;
  static constexpr Source kSourceB = gathers_b(product) ? Source::kGather : Source::kTma;
  static constexpr Major kMajorA = kRaggedK ? Major::kMN : Major::kK;
  static constexpr Major kMajorB =
      kRaggedK || product == Product::kNN || product == Product::kGatherNN ? Major::kMN : Major::kK;
};

template <class Config, class Params>
Status encode_maps(Params& params, TensorMapDesc a, TensorMapDesc b) {
  if constexpr (Config::kSourceA == Source::kTma) {
    std::copy_n(Boxes<Config>::kA, 2, a.box);
    if (const Status s = encode_tensor_map(&params.map_a, a); s != cudaSuccess) return s;
  }
  if constexpr (Config::kSourceB == Source::kTma) {
    if constexpr (Config::kMajorB == Major::kEither) {
      std::copy_n(params.b_along_n ? Boxes<Config, Major::kMN>::kB : Boxes<Config, Major::kK>::kB,
                  3, b.box);
    } else {
      std::copy_n(Boxes<Config>::kB, 3, b.box);
    }
    if (const Status s = encode_tensor_map(&params.map_b, b); s != cudaSuccess) return s;
  }
  return cudaSuccess;
}

// Encodes the map through which boxes of a 16-bit result are stored, if TMA can write it.
template <class Config>
Status encode_store_map(bool& boxed, CUtensorMap& map, const TensorMapDesc& matrix) {
  const TensorMapDesc d = rows_to_store(matrix);
  boxed = Config::kStoreBoxes && tensor_map_possible(d);
  return boxed ? encode_tensor_map(&map, d) : cudaSuccess;
}

inline GatherRows gather_rows(const DeviceRows& rows) {
  return {rows.data, rows.stride, static_cast<int>(rows.limit), rows.index, rows.index_divisor};
}

template <DType type, Product product, TileShape shape>
Status run(const GroupedGemmParams& p, Stream stream) {
  using Config = ConfigOf<type, product, shape>;
  KernelParams<Config, StoreRows> params{};
  if (const Status s = encode_maps<Config>(params, operand_a(p), operand_b(p)); s != cudaSuccess)
    return s;
  params.problem.expert_offsets = p.expert_offsets;
  params.problem.num_experts = static_cast<int>(p.num_experts);
  params.problem.rows = static_cast<int>(p.num_rows);
  params.problem.n = static_cast<int>(p.out_features);
  params.problem.k = static_cast<int>(p.in_features);
  params.problem.zero_tail = p.zero_tail;
  params.gather = gather_rows(p.a);
  params.epilogue.out = {p.out.data,  p.out.stride,        p.out.type == DType::kFloat32,
                         p.out.index, p.out.index_divisor, p.out.limit};
  params.epilogue.bias = p.bias.data;
  params.epilogue.bias_stride = p.bias.stride_e;
  params.epilogue.scale = {static_cast<const float*>(p.a_scale.data), p.a_scale.index,
                           p.a_scale.limit};
  if (p.out.type == type && p.out.index == nullptr) {
    const TensorMapDesc out = matrix(p.out.data, type, p.out_features, p.out.limit, p.out.stride);
    MOE_TRY(encode_store_map<Config>(params.epilogue.boxed, params.epilogue.map_out, out));
  }
  return launch(params, stream);
}

template <DType type, Product product, TileShape shape>
Status run_wgrad(const GroupedWgradParams& p, Stream stream) {
  using Config = ConfigOf<type, product, shape>;
  KernelParams<Config, StoreExperts> params{};
  if (const Status s = encode_maps<Config>(params, operand_a(p), operand_b(p)); s != cudaSuccess)
    return s;
  params.problem.expert_offsets = p.expert_offsets;
  params.problem.num_experts = static_cast<int>(p.num_experts);
  params.problem.rows = static_cast<int>(p.num_rows);
  params.problem.m = static_cast<int>(p.out_features);
  params.problem.n = static_cast<int>(p.in_features);
  params.gather = gather_rows(p.grad);
  params.gather_b = gather_rows(p.a);
  params.epilogue = {p.out, p.out_type == DType::kFloat32, p.accumulate, false, {}};
  if (p.out_type == type) {
    const TensorMapDesc out =
        matrix(p.out, type, p.in_features, p.num_experts * p.out_features, p.in_features);
    MOE_TRY(encode_store_map<Config>(params.epilogue.boxed, params.epilogue.map_out, out));
  }
  return launch(params, stream);
}

}  // namespace moe_ops::cuda::sm90
