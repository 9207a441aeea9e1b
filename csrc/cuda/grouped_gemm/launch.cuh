// Launching a kernel with more than 48 KiB of shared memory on as many blocks as the card runs at
// once.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <limits>

#include "cuda/check.h"
#include "cuda/runtime.h"

namespace moe_ops::cuda::generic {

// Raises the kernel's limit of shared memory, once a device.
template <auto kernel>
cudaError_t allow_shared_bytes(int bytes) {
  static std::array<std::atomic<bool>, 64> done;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const bool known = device < static_cast<int>(done.size());
  if (known && done[static_cast<size_t>(device)].load(std::memory_order_acquire)) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (known && error == cudaSuccess) {
    done[static_cast<size_t>(device)].store(true, std::memory_order_release);
  }
  return error;
}

// tiles: an upper bound; blocks that find none leave at once.
template <auto kernel, class Params>
Status launch_tiles(const Params& params, int64_t tiles, int threads, int shared_bytes,
                    int blocks_per_sm, Stream stream) {
  if (tiles <= 0) return 0;
  MOE_CUDA_TRY(allow_shared_bytes<kernel>(shared_bytes));
  const int64_t resident = int64_t{device_info().num_sms} * blocks_per_sm;
  const auto grid = static_cast<unsigned>(std::min(tiles, std::max<int64_t>(1, resident)));
  kernel<<<grid, static_cast<unsigned>(threads), static_cast<size_t>(shared_bytes), stream>>>(
      params);
  return launched();
}

inline bool aligned_to(const void* p, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0;
}

}  // namespace moe_ops::cuda::generic
