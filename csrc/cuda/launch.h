// Launch function of every kernel of the library, so that all of them are known: runtime.h loads
// them on a device and lists them.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <string_view>

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

  // Returns whether the code that the current device runs has griddepcontrol, which exists from
  // compute_90 on; machine code for a newer GPU may come from the PTX of an older one.
  static bool can_overlap() {
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device >= kMaxDevices) return false;
    std::atomic<signed char>& known = overlaps_[static_cast<size_t>(device)];
    signed char can = known.load(std::memory_order_relaxed);
    if (can == 0) {
      cudaFuncAttributes attributes;
      const bool found = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess;
      can = found && attributes.ptxVersion >= 90 ? 1 : -1;
      known.store(can, std::memory_order_relaxed);
    }
    return can > 0;
  }

  static inline const bool known = add_kernel(reinterpret_cast<const void*>(kernel));

 private:
  static inline std::array<std::atomic<size_t>, kMaxDevices> allowed_;
  static inline std::array<std::atomic<signed char>, kMaxDevices> overlaps_;  // 0: not asked yet
  static inline std::mutex raising_;
};

struct Launch {
  dim3 grid;
  dim3 block;
  Stream stream;
  size_t shared_bytes = 0;  // dynamic
  unsigned cluster = 1;     // blocks in x
  // The kernel may begin before the one ahead of it in the stream has ended (programmatic dependent
  // launch): it calls await_previous_kernel (overlap.cuh) before it touches memory of the device.
  // For kernels of a few microseconds, a good part of which is their start.
  bool overlaps = false;
};

// Returns whether kernels may overlap; MOE_OPS_OVERLAP=off starts every kernel after the end of the
// previous one, for benchmarks.
inline bool overlap_allowed() {
  const char* const value = std::getenv("MOE_OPS_OVERLAP");
  return value == nullptr || std::string_view(value) != "off";
}

template <auto kernel, class... Args>
Status launch_kernel(const Launch& at, const Args&... args) {
  static_cast<void>(Kernel<kernel>::known);
  MOE_TRY(Kernel<kernel>::allow_shared_bytes(at.shared_bytes));
  cudaLaunchConfig_t config{};
  config.gridDim = at.grid;
  config.blockDim = at.block;
  config.dynamicSmemBytes = at.shared_bytes;
  config.stream = at.stream;
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (at.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = at.cluster;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  }
  if (at.overlaps && overlap_allowed() && Kernel<kernel>::can_overlap()) {
    cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
  }
  MOE_CUDA_TRY(cudaLaunchKernelEx(&config, kernel, args...));
  return 0;
}

}  // namespace moe_ops::cuda
