// The four lanes of a quad, which hold neighboring columns of a tensor core's sums.
#pragma once

#include <cstdint>

namespace moe_ops::cuda {

// Moves r[b] of lane q to r[q] of lane b (within each quad); it is its own inverse. All lanes of
// the warp take part.
__device__ inline void quad_transpose(uint32_t (&r)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
  for (int p = 0; p < 4; p += 2) {
    const uint32_t got = __shfl_xor_sync(~0u, odd ? r[p] : r[p + 1], 1);
    (odd ? r[p] : r[p + 1]) = got;
  }
#pragma unroll
  for (int p = 0; p < 2; ++p) {
    const uint32_t got = __shfl_xor_sync(~0u, high ? r[p] : r[p + 2], 2);
    (high ? r[p] : r[p + 2]) = got;
  }
}

}  // namespace moe_ops::cuda
