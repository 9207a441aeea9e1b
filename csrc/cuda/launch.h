// How every kernel of the library is launched, so that all of them are known: runtime.h loads them
// on a device and lists them.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <mutex>

#include "cuda/check.h"
#include "cuda/runtime.h"

namespace moe_ops::cuda {

// Dynamic shared memory that a kernel has without asking, whatever it has of static one.
constexpr size_t kFreeSharedBytes = 40 * 1024;

// One kernel, per instantiation: known from when the library is loaded.
template <auto kernel>
class Kernel {
 public:
  // Raises the kernel's limit of dynamic shared memory on the current device, where it is lower.
  static Status allow_shared_bytes(size_t bytes) {
    if (bytes <= kFreeSharedBytes) return 0;
    int device = 0;
    MOE_CUDA_TRY(cudaGetDevice(&device));
    std::atomic<size_t>& allowed = allowed_[static_cast<size_t>(device % kMaxDevices)];
    if (device < kMaxDevices && allowed.load(std::memory_order_acquire) >= bytes) return 0;
    const std::lock_guard lock(raising_);
    if (device < kMaxDevices && allowed.load(std::memory_order_relaxed) >= bytes) return 0;
    MOE_CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(bytes)));
    if (device < kMaxDevices) allowed.store(bytes, std::memory_order_release);
    return 0;
  }

  static inline const bool known = add_kernel(reinterpret_cast<const void*>(kernel));

 private:
  static inline std::array<std::atomic<size_t>, kMaxDevices> allowed_;
  static inline std::mutex raising_;
};

struct Launch {
  dim3 grid;
  dim3 block;
  Stream stream;
  size_t shared_bytes = 0;  // dynamic
  unsigned cluster = 1;     // blocks in x
};

template <auto kernel, class... Args>
Status launch_kernel(const Launch& at, const Args&... args) {
  static_cast<void>(Kernel<kernel>::known);
  MOE_TRY(Kernel<kernel>::allow_shared_bytes(at.shared_bytes));
  cudaLaunchConfig_t config{};
  config.gridDim = at.grid;
  config.blockDim = at.block;
  config.dynamicSmemBytes = at.shared_bytes;
  config.stream = at.stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = at.cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = at.cluster > 1 ? 1 : 0;
  MOE_CUDA_TRY(cudaLaunchKernelEx(&config, kernel, args...));
  return 0;
}

}  // namespace moe_ops::cuda
