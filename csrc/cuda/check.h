// Errors of the CUDA runtime inside launchers: returned, never printed, never thrown.
#pragma once

#include <cuda_runtime.h>

#include "moe_ops/common.h"

// Leaves the launcher with the error of a runtime call.
#define MOE_CUDA_TRY(call)                                         \
  do {                                                             \
    const cudaError_t moe_cuda_error = (call);                     \
    if (moe_cuda_error != cudaSuccess)                             \
      return static_cast<::moe_ops::cuda::Status>(moe_cuda_error); \
  } while (false)

// The same for a launcher called by another.
#define MOE_TRY(call)                                  \
  do {                                                 \
    const ::moe_ops::cuda::Status moe_status = (call); \
    if (moe_status != 0) return moe_status;            \
  } while (false)

namespace moe_ops::cuda {

// The result of the launch just made.
inline Status launched() { return static_cast<Status>(cudaGetLastError()); }

}  // namespace moe_ops::cuda
