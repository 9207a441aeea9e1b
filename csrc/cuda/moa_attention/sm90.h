// Attention by TMA and wgmma, for compute capability 9.0.
#pragma once

#include "cuda/grouped_gemm/tensor_map_4d.h"
#include "cuda/moa_attention/backward.h"
#include "moe_ops/moa_attention.h"

namespace moe_ops::cuda::attention::sm90 {

// Returns whether the kernels support a call: bfloat16 or float16, d 64 or 128, more than 16 rows
// per head, 16-byte strides, rows of q evenly spaced, a softcap of at most 1024 in forward and none
// in backward, and with softmax a positive scale. With MOE_OPS_ATTENTION=generic they support none.
bool supports(const MoaAttentionParams& p);
Status forward(const MoaAttentionParams& p, Stream stream);
bool supports(const MoaAttentionBwdParams& b);
// Returns the bytes of workspace; 0 if no call of these sizes is served.
int64_t backward_workspace(const MoaAttentionParams& p);
Status backward(const MoaAttentionBwdParams& b, Stream stream);

// Rows of an operand as [d, rows, n, B]; rows of q are tokens times slots. Rows of one stride.
struct Rows {
  TensorMap4dDesc desc;
  bool possible;
};
inline Rows rows_of_queries(const MoaAttentionParams& p, const AttentionOperand& x) {
  Rows out{};
  const bool by_slot = p.num_slots > 1;
  TensorMap4dDesc& d = out.desc;
  d.data = x.data;
  d.type = p.type == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                      : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  d.size[0] = p.head_size;
  d.size[1] = p.num_tokens * p.num_slots;
  d.size[2] = p.num_heads;
  d.size[3] = p.batch;
  d.stride[0] = by_slot ? x.stride_slot : x.stride_token;
  d.stride[1] = x.stride_head;
  d.stride[2] = x.stride_batch;
  out.possible = tensor_map_possible(d) &&
                 (!by_slot || p.num_tokens == 1 || x.stride_token == p.num_slots * x.stride_slot);
  return out;
}
inline Rows rows_of_keys(const MoaAttentionParams& p, const AttentionOperand& x) {
  Rows out{};
  TensorMap4dDesc& d = out.desc;
  d = rows_of_queries(p, x).desc;
  d.size[1] = p.num_keys;
  d.stride[0] = x.stride_token;
  out.possible = tensor_map_possible(d);
  return out;
}

Status softmax_bf16(const MoaAttentionParams& p, Stream stream);
Status softmax_fp16(const MoaAttentionParams& p, Stream stream);
Status stick_bf16(const MoaAttentionParams& p, Stream stream);
Status stick_fp16(const MoaAttentionParams& p, Stream stream);
// Compute the gradients for the rows of a band.
Status softmax_bwd_bf16(const BackwardLaunch& launch, const Chain& chain, Stream stream);
Status softmax_bwd_fp16(const BackwardLaunch& launch, const Chain& chain, Stream stream);
Status stick_bwd_bf16(const BackwardLaunch& launch, const Chain& chain, Stream stream);
Status stick_bwd_fp16(const BackwardLaunch& launch, const Chain& chain, Stream stream);

}  // namespace moe_ops::cuda::attention::sm90
