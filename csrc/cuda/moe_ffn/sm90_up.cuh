// The up projection of moe_ffn for sm_90a: rows of x gathered by the producer, w_gate_up read as it
// lies (dense along H, or along its features), the activation in the epilogue.
#pragma once

#include "cuda/grouped_gemm/sm90_launch.cuh"
#include "cuda/moe_ffn/sm90_activation.cuh"
#include "cuda/moe_ffn/sm90_stages.h"

namespace moe_ops::cuda::sm90 {

template <DType type, GateUp layout, FfnTile tile>
struct UpConfig : GemmDefaults {
  static constexpr GemmConfig kChoice = kFfnUpConfigs[static_cast<int>(tile)];
  using Element = ElementOf<type>;
  using Output = Element;
  static constexpr int kTileM = kChoice.m, kTileN = kChoice.n, kTileK = kChoice.k;
  static constexpr Schedule kSchedule =
      kChoice.pingpong ? Schedule::kPingpong : Schedule::kCooperative;
  static constexpr int kCluster = kChoice.cluster;
  static constexpr Source kSourceA = Source::kGather;
  static constexpr Major kMajorB = Major::kEither;
  static constexpr bool kSplitB = layout == GateUp::kHalves;
  static constexpr bool kStoreBoxes = true;
};

template <DType type, GateUp layout, FfnTile tile>
Status run_up(const FfnUpParams& p, Stream stream) {
  using Config = UpConfig<type, layout, tile>;
  const int64_t width = p.intermediate_size * (is_gated(p.act.kind) ? 2 : 1);
  KernelParams<Config, ActivateRows> params{};
  params.b_along_n = !dense_along_k(p.w);
  if (const Status s = encode_maps<Config>(params, {}, ffn_weights(p)); s != cudaSuccess) return s;
  params.problem.expert_offsets = p.expert_offsets;
  params.problem.num_experts = static_cast<int>(p.num_experts);
  params.problem.rows = static_cast<int>(p.num_rows);
  params.problem.n = static_cast<int>(Config::kSplitB ? p.intermediate_size : width);
  params.problem.k = static_cast<int>(p.hidden_size);
  params.problem.zero_tail = p.preact != nullptr;
  params.split_offset = static_cast<int>(p.intermediate_size);
  params.gather = gather_rows(p.x);
  auto& epilogue = params.epilogue;
  const auto encode = [&](CUtensorMap& map, void* data, int64_t first, int64_t cols,
                          int64_t stride) {
    auto* from = static_cast<typename Config::Element*>(data) + first;
    const TensorMapDesc rows = matrix(from, type, cols, p.num_rows, stride);
    return encode_tensor_map(&map, rows_to_store(rows));
  };
  MOE_TRY(encode(epilogue.map_h, p.h, 0, p.intermediate_size, p.intermediate_size));
  epilogue.preact = p.preact != nullptr;
  for (int half = 0; epilogue.preact && half < (Config::kSplitB ? 2 : 1); ++half)
    MOE_TRY(encode(epilogue.map_preact[half], p.preact, half * p.intermediate_size,
                   params.problem.n, width));
  epilogue.bias = p.bias.data;
  epilogue.bias_stride = p.bias.stride_e;
  epilogue.scale = {static_cast<const float*>(p.x_scale.data), p.x_scale.index, p.x_scale.limit};
  epilogue.act = fused_act(p.act);
  return launch(params, stream);
}

}  // namespace moe_ops::cuda::sm90
