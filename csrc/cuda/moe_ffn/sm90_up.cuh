// The up projection of moe_ffn for sm_90a: rows of x gathered by the producer, the activation in
// the epilogue. Files sm90_up_*.cu hold one instantiation each.
#pragma once

#include "cuda/grouped_gemm/sm90_kernel.cuh"
#include "cuda/grouped_gemm/tensor_map.h"
#include "cuda/moe_ffn/sm90_activation.cuh"
#include "cuda/moe_ffn/sm90_stages.h"

namespace moe_ops::cuda::sm90 {

struct UpDefaults : GemmDefaults {
  static constexpr Source kSourceA = Source::kGather;
  static constexpr int kTileN = 256;
};

// Two row tiles of an expert share the tiles of B.
struct UpPair : UpDefaults {
  static constexpr int kCluster = 2;
};

struct UpWide : UpDefaults {};

// Few rows an expert.
struct UpLow : UpDefaults {
  static constexpr int kTileM = 64;
  static constexpr Schedule kSchedule = Schedule::kPingpong;
};

template <class Base, class E, bool split>
struct Up : Base {
  using Element = E;
  using Output = E;
  static constexpr bool kSplitB = split;
};

template <class Config>
Status launch_up(const FfnUpParams& p, Stream stream) {
  using Element = typename Config::Element;
  const bool gated = is_gated(p.act.kind);
  const int64_t width = gated ? 2 * p.intermediate_size : p.intermediate_size;
  KernelParams<Config, ActivateRows> k{};
  TensorMapDesc b;
  b.data = p.w.data;
  if (std::is_same_v<Element, cutlass::half_t>) b.type = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  b.rank = 3;
  b.size[0] = p.hidden_size;
  b.size[1] = width;
  b.size[2] = p.num_experts;
  b.stride[0] = p.w.stride_o;
  b.stride[1] = p.num_experts > 1 ? p.w.stride_e : width * p.w.stride_o;
  for (int i = 0; i < 3; ++i) b.box[i] = Boxes<Config>::kB[i];
  const Status status = encode_tensor_map(&k.map_b, b);
  if (status != cudaSuccess) return status;

  k.problem.expert_offsets = p.expert_offsets;
  k.problem.num_experts = static_cast<int>(p.num_experts);
  k.problem.rows = static_cast<int>(p.num_rows);
  k.problem.n = static_cast<int>(Config::kSplitB ? p.intermediate_size : width);
  k.problem.k = static_cast<int>(p.hidden_size);
  k.problem.zero_tail = p.preact != nullptr;
  k.split_offset = static_cast<int>(p.intermediate_size);
  k.gather = {p.x.data, p.x.stride, static_cast<int>(p.x.limit), p.x.index, p.x.index_divisor};
  k.epilogue.h = p.h;
  k.epilogue.preact = p.preact;
  k.epilogue.bias = p.bias.data;
  k.epilogue.bias_stride = p.bias.stride_e;
  k.epilogue.scale = {static_cast<const float*>(p.x_scale.data), p.x_scale.index, p.x_scale.limit};
  k.epilogue.act = fused_act(p.act);
  k.epilogue.width = static_cast<int>(width);
  return launch(k, stream);
}

}  // namespace moe_ops::cuda::sm90
