// Kernels of the stages, one function a file. Names: tile, element, for the up projection how gate
// and up lie (split: halves; joint: interleaved, or no gate).
#pragma once

#include "cuda/moe_ffn/stages.h"

namespace moe_ops::cuda::sm90 {

#define MOE_FFN_UP(tile)                                         \
  Status up_##tile##_bf16_split(const FfnUpParams& p, Stream s); \
  Status up_##tile##_bf16_joint(const FfnUpParams& p, Stream s); \
  Status up_##tile##_fp16_split(const FfnUpParams& p, Stream s); \
  Status up_##tile##_fp16_joint(const FfnUpParams& p, Stream s);
MOE_FFN_UP(pair)
MOE_FFN_UP(wide)
MOE_FFN_UP(low)
#undef MOE_FFN_UP

Status down_bwd_high_bf16(const FfnDownBwdParams& p, Stream s);
Status down_bwd_high_fp16(const FfnDownBwdParams& p, Stream s);
Status down_bwd_low_bf16(const FfnDownBwdParams& p, Stream s);
Status down_bwd_low_fp16(const FfnDownBwdParams& p, Stream s);

}  // namespace moe_ops::cuda::sm90
