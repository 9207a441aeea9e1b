// The kernels for any card, one source a type and direction.
#pragma once

#include "cuda/moa_attention/backward.h"
#include "moe_ops/moa_attention.h"

namespace moe_ops::cuda::attention {

Status forward_bf16(const MoaAttentionParams& p, Stream stream);
Status forward_fp16(const MoaAttentionParams& p, Stream stream);
Status forward_fp32(const MoaAttentionParams& p, Stream stream);
Status forward_fp64(const MoaAttentionParams& p, Stream stream);
Status softmax_bwd_bf16(const MoaAttentionBwdParams& b, Stream stream);
Status softmax_bwd_fp16(const MoaAttentionBwdParams& b, Stream stream);
Status softmax_bwd_fp32(const MoaAttentionBwdParams& b, Stream stream);
Status softmax_bwd_fp64(const MoaAttentionBwdParams& b, Stream stream);
Status stick_bwd_bf16(const MoaAttentionBwdParams& b, Stream stream);
Status stick_bwd_fp16(const MoaAttentionBwdParams& b, Stream stream);
Status stick_bwd_fp32(const MoaAttentionBwdParams& b, Stream stream);
Status stick_bwd_fp64(const MoaAttentionBwdParams& b, Stream stream);

// Parts of backward that the sm_90a kernels share: the row sums of softmax, and the lengths of the
// sticks of a band, a block for each of `blocks` tiles of 64 rows.
Status delta_bf16(const BackwardLaunch& launch, Stream stream);
Status delta_fp16(const BackwardLaunch& launch, Stream stream);
Status sticks_bf16(const BackwardLaunch& launch, int64_t blocks, Stream stream);
Status sticks_fp16(const BackwardLaunch& launch, int64_t blocks, Stream stream);

}  // namespace moe_ops::cuda::attention
