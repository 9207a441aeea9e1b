// The kernels that take any card from sm_80 on, any strides and any alignment, one file a type.
#pragma once

#include "moe_ops/grouped_gemm.h"

namespace moe_ops::cuda::generic {

Status grouped_gemm_bf16(const GroupedGemmParams& p, Stream stream);
Status grouped_gemm_fp16(const GroupedGemmParams& p, Stream stream);
Status grouped_gemm_fp32(const GroupedGemmParams& p, Stream stream);
Status grouped_gemm_fp64(const GroupedGemmParams& p, Stream stream);

Status grouped_wgrad_bf16(const GroupedWgradParams& p, Stream stream);
Status grouped_wgrad_fp16(const GroupedWgradParams& p, Stream stream);
Status grouped_wgrad_fp32(const GroupedWgradParams& p, Stream stream);
Status grouped_wgrad_fp64(const GroupedWgradParams& p, Stream stream);

}  // namespace moe_ops::cuda::generic
