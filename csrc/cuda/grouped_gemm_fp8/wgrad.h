// The weight gradient of e4m3 columns: what serves it. Torch and CuTe stay out of this header.
#pragma once

#include "moe_ops/grouped_gemm_fp8.h"

namespace moe_ops::cuda {

// TMA and wgmma. A call needs an sm_90 card, K a multiple of 8, and codes, scales and results that
// start on 16, 8 and 16 bytes (those of an allocator do).
namespace sm90::fp8 {
bool supports(const GroupedGemmFp8WgradParams& p);
Status grouped_gemm_fp8_wgrad(const GroupedGemmFp8WgradParams& p, Stream stream);
}  // namespace sm90::fp8

// Any card from sm_80 on, any size.
namespace generic {
Status grouped_gemm_fp8_wgrad(const GroupedGemmFp8WgradParams& p, Stream stream);
}  // namespace generic

}  // namespace moe_ops::cuda
