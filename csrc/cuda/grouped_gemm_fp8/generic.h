// The kernel that takes any card from sm_80 on, any size and any alignment.
#pragma once

#include "moe_ops/grouped_gemm_fp8.h"

namespace moe_ops::cuda::generic {

Status grouped_gemm_fp8(const GroupedGemmFp8Params& p, Stream stream);

}  // namespace moe_ops::cuda::generic
