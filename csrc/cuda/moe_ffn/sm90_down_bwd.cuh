// The backward down projection of moe_ffn for sm_90a: rows of grad_y gathered by the producer,
// w_down read as it lies (dense along I, or along H), the activation's backward in the epilogue.
// That reads and writes more than the stages of a tile hold, so one warpgroup does it while the
// other one multiplies.
#pragma once

#include "cuda/grouped_gemm/sm90_launch.cuh"
#include "cuda/moe_ffn/sm90_activation_grad.cuh"
#include "cuda/moe_ffn/sm90_stages.h"

namespace moe_ops::cuda::sm90 {

template <DType type, FfnTile tile>
struct DownBwdConfig : GemmDefaults {
  static constexpr GemmConfig kChoice = kFfnDownBwdConfigs[static_cast<int>(tile)];
  static_assert(kChoice.n == kFfnPartialColumns);
  using Element = ElementOf<type>;
  using Output = Element;
  static constexpr int kTileM = kChoice.m, kTileN = kChoice.n, kTileK = kChoice.k;
  static constexpr Schedule kSchedule = Schedule::kPingpong;
  static constexpr int kCluster = kChoice.cluster;
  static constexpr Source kSourceA = Source::kGather;
  static constexpr Major kMajorB = Major::kEither;
};

template <DType type, FfnTile tile>
Status run_down_bwd(const FfnDownBwdParams& p, Stream stream) {
  using Config = DownBwdConfig<type, tile>;
  KernelParams<Config, ActivationGrad> params{};
  params.b_along_n = dense_along_k(p.w);  // N is the K of w_down
  if (const Status s = encode_maps<Config>(params, {}, ffn_weights(p)); s != cudaSuccess) return s;
  params.problem.expert_offsets = p.expert_offsets;
  params.problem.num_experts = static_cast<int>(p.num_experts);
  params.problem.rows = static_cast<int>(p.num_rows);
  params.problem.n = static_cast<int>(p.intermediate_size);
  params.problem.k = static_cast<int>(p.hidden_size);
  params.problem.zero_tail = false;
  params.gather = gather_rows(p.grad_y);
  auto& epilogue = params.epilogue;
  epilogue.preact = p.preact;
  epilogue.dpre = p.dpre;
  epilogue.dpre_weighted = p.dpre_weighted;
  epilogue.h = p.h;
  epilogue.partial = p.partial;
  epilogue.weight = {static_cast<const float*>(p.weight.data), p.weight.index, p.weight.limit};
  epilogue.weight_on_input = p.weight_on_input;
  epilogue.interleaved = p.act.interleaved;
  epilogue.act = fused_act(p.act);
  return launch(params, stream);
}

}  // namespace moe_ops::cuda::sm90
