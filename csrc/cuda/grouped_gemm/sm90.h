// The TMA + wgmma kernels for sm_90a: bfloat16 and float16. Torch and CuTe stay out of this header.
#pragma once

#include "cuda/grouped_gemm/config.h"
#include "moe_ops/grouped_gemm.h"

namespace moe_ops::cuda::sm90 {

// Return the product of a call, and whether these kernels support it: an sm_90 GPU, 16-byte
// alignment of every row (K, N and strides multiples of 8), operands of one type, a row scale in a
// weight gradient only if both operands are gathered. Others go to the generic kernels.
bool supports(const GroupedGemmParams& p);
bool supports(const GroupedWgradParams& p);

Status grouped_gemm(const GroupedGemmParams& p, Stream stream);
Status grouped_gemm_wgrad(const GroupedWgradParams& p, Stream stream);

// Runs one kernel. Kernels of a type and a kind of product share a file in instantiations/: parsing
// CUTLASS takes longer than compiling one.
template <DType type, Product product, TileShape shape>
Status run(const GroupedGemmParams& p, Stream stream);
template <DType type, Product product, TileShape shape>
Status run_wgrad(const GroupedWgradParams& p, Stream stream);

}  // namespace moe_ops::cuda::sm90
