// Which kernels a stage runs on.
#include "cuda/check.h"
#include "cuda/moe_ffn/sm90_stages.h"
#include "cuda/moe_ffn/stages.h"
#include "cuda/runtime.h"

namespace moe_ops::cuda {

namespace {

bool is_half(DType t) { return t == DType::kBFloat16 || t == DType::kFloat16; }

// 16-byte pieces of rows, as cp.async and TMA need them.
bool aligned(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 8 == 0;
}

// Matrices [E, outer, inner] that TMA reads as they lie, dense along the inner side.
bool aligned(const ExpertMatrices& w, int64_t num_experts, int64_t stride_outer) {
  return aligned(w.data, stride_outer) && (num_experts == 1 || w.stride_e % 8 == 0) &&
         stride_outer >= 0 && w.stride_e >= 0;
}

bool fits_int(int64_t n) { return n >= 1 && n <= INT32_MAX; }

// Rows an expert from which a tile is worth its height: a half-filled one at the end of each expert
// costs half of it.
constexpr int64_t kPairRows = 1024, kWideRows = 160, kHighRows = 160;

}  // namespace

bool ffn_up_possible(const FfnUpParams& p) {
  const int64_t width = (is_gated(p.act.kind) ? 2 : 1) * p.intermediate_size;
  return device_info().capability == 90 && is_half(p.w.type) && p.x.type == p.w.type &&
         p.x.index != nullptr && p.hidden_size % 8 == 0 && p.intermediate_size % 8 == 0 &&
         p.w.stride_k == 1 && aligned(p.w, p.num_experts, p.w.stride_o) &&
         aligned(p.x.data, p.x.stride) && fits_int(p.num_rows) && fits_int(p.hidden_size) &&
         fits_int(width) && fits_int(p.x.limit) && fits_int(p.num_experts);
}

Status ffn_up(const FfnUpParams& p, Stream stream) {
  using Launch = Status (*)(const FfnUpParams&, Stream);
  // [tile][fp16][joint]
  static constexpr Launch kLaunch[3][2][2] = {
      {{sm90::up_low_bf16_split, sm90::up_low_bf16_joint},
       {sm90::up_low_fp16_split, sm90::up_low_fp16_joint}},
      {{sm90::up_wide_bf16_split, sm90::up_wide_bf16_joint},
       {sm90::up_wide_fp16_split, sm90::up_wide_fp16_joint}},
      {{sm90::up_pair_bf16_split, sm90::up_pair_bf16_joint},
       {sm90::up_pair_fp16_split, sm90::up_pair_fp16_joint}},
  };
  const int64_t rows = p.num_rows / p.num_experts;
  const int tile = rows >= kPairRows ? 2 : rows >= kWideRows ? 1 : 0;
  const bool split = is_gated(p.act.kind) && !p.act.interleaved;
  return kLaunch[tile][p.w.type == DType::kFloat16][!split](p, stream);
}

bool ffn_down_bwd_possible(const FfnDownBwdParams& p) {
  return device_info().capability == 90 && is_half(p.w.type) && p.grad_y.type == p.w.type &&
         p.grad_y.index != nullptr && p.hidden_size % 8 == 0 && p.intermediate_size % 8 == 0 &&
         p.w.stride_k == 1 && aligned(p.w, p.num_experts, p.w.stride_o) &&
         aligned(p.grad_y.data, p.grad_y.stride) && aligned(p.preact, 0) && fits_int(p.num_rows) &&
         fits_int(p.hidden_size) && fits_int(2 * p.intermediate_size) && fits_int(p.grad_y.limit) &&
         fits_int(p.num_experts);
}

Status ffn_down_bwd(const FfnDownBwdParams& p, Stream stream) {
  using Launch = Status (*)(const FfnDownBwdParams&, Stream);
  // [tile][fp16]
  static constexpr Launch kLaunch[2][2] = {{sm90::down_bwd_low_bf16, sm90::down_bwd_low_fp16},
                                           {sm90::down_bwd_high_bf16, sm90::down_bwd_high_fp16}};
  const bool high = p.num_rows / p.num_experts >= kHighRows;
  return kLaunch[high][p.w.type == DType::kFloat16](p, stream);
}

}  // namespace moe_ops::cuda
