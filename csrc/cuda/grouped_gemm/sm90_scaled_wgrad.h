// The weight gradient with a factor for each row (sm90_scaled_wgrad.cuh).
#pragma once

#include "moe_ops/grouped_gemm.h"

namespace moe_ops::cuda::sm90 {

// Runs a weight gradient with both operands gathered and one of grad_scale and a_scale.
template <DType type>
Status run_scaled_wgrad(const GroupedWgradParams& p, Stream stream);

}  // namespace moe_ops::cuda::sm90
