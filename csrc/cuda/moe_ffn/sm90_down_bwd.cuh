// The backward down projection of moe_ffn for sm_90a: rows of grad_y gathered by the producer,
// w_down read as it lies (dense along I), the activation's backward in the epilogue. Files
// sm90_down_bwd_*.cu hold one instantiation each.
#pragma once

#include "cuda/grouped_gemm/sm90_kernel.cuh"
#include "cuda/grouped_gemm/tensor_map.h"
#include "cuda/moe_ffn/sm90_activation_grad.cuh"
#include "cuda/moe_ffn/sm90_stages.h"

namespace moe_ops::cuda::sm90 {

// Ping-pong: the epilogue reads and writes more than the mainloop's stages hold, so one warpgroup
// does that while the other multiplies.
struct DownBwdDefaults : GemmDefaults {
  static constexpr Source kSourceA = Source::kGather;
  static constexpr Major kMajorB = Major::kMN;
  static constexpr Schedule kSchedule = Schedule::kPingpong;
};

struct DownBwdHigh : DownBwdDefaults {};

struct DownBwdLow : DownBwdDefaults {
  static constexpr int kTileM = 64;
};
static_assert(DownBwdHigh::kTileN == kFfnPartialColumns &&
              DownBwdLow::kTileN == kFfnPartialColumns);

template <class Base, class E>
struct DownBwd : Base {
  using Element = E;
  using Output = E;
};

template <class Config>
Status launch_down_bwd(const FfnDownBwdParams& p, Stream stream) {
  using Element = typename Config::Element;
  KernelParams<Config, ActivationGrad> k{};
  TensorMapDesc b;
  b.data = p.w.data;
  if (std::is_same_v<Element, cutlass::half_t>) b.type = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  b.rank = 3;
  b.size[0] = p.intermediate_size;
  b.size[1] = p.hidden_size;
  b.size[2] = p.num_experts;
  b.stride[0] = p.w.stride_o;
  b.stride[1] = p.num_experts > 1 ? p.w.stride_e : p.hidden_size * p.w.stride_o;
  for (int i = 0; i < 3; ++i) b.box[i] = Boxes<Config>::kB[i];
  const Status status = encode_tensor_map(&k.map_b, b);
  if (status != cudaSuccess) return status;

  k.problem.expert_offsets = p.expert_offsets;
  k.problem.num_experts = static_cast<int>(p.num_experts);
  k.problem.rows = static_cast<int>(p.num_rows);
  k.problem.n = static_cast<int>(p.intermediate_size);
  k.problem.k = static_cast<int>(p.hidden_size);
  k.problem.zero_tail = false;
  k.gather = {p.grad_y.data, p.grad_y.stride, static_cast<int>(p.grad_y.limit), p.grad_y.index,
              p.grad_y.index_divisor};
  k.epilogue.preact = p.preact;
  k.epilogue.dpre = p.dpre;
  k.epilogue.dpre_weighted = p.dpre_weighted;
  k.epilogue.h = p.h;
  k.epilogue.partial = p.partial;
  k.epilogue.weight = {static_cast<const float*>(p.weight.data), p.weight.index, p.weight.limit};
  k.epilogue.weight_on_input = p.weight_on_input;
  k.epilogue.interleaved = p.act.interleaved;
  k.epilogue.act = fused_act(p.act);
  return launch(k, stream);
}

}  // namespace moe_ops::cuda::sm90
