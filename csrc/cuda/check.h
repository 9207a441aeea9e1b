// Errors of the CUDA runtime inside launchers: returned, never printed, never thrown.
#pragma once

#include <cuda_runtime.h>

#include "moe_ops/common.h"

// Leaves the launcher with the error of a runtime call, which the runtime does not keep: it would
// be taken for one of the next call.
#define MOE_CUDA_TRY(call)                                         \
  do {                                                             \
    const cudaError_t moe_cuda_error = (call);                     \
    if (moe_cuda_error != cudaSuccess) {                           \
      cudaGetLastError();                                          \
      return static_cast<::moe_ops::cuda::Status>(moe_cuda_error); \
    }                                                              \
  } while (false)

// Like the check above, for a launcher that another one calls: returns its status if it failed.
#define MOE_TRY(call)                                  \
  do {                                                 \
    const ::moe_ops::cuda::Status moe_status = (call); \
    if (moe_status != 0) return moe_status;            \
  } while (false)
