// The kernels for any card, one source a type and direction.
#pragma once

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

}  // namespace moe_ops::cuda::attention
