#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <mutex>

#include "cuda/device_info.h"
#include "cuda/runtime.h"

namespace moe_ops::cuda {

namespace {

constexpr int kMaxDevices = 64;

DeviceInfo ask(int device) {
  DeviceInfo info{};
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&info.num_sms, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaDeviceGetAttribute(&info.max_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  info.capability = 10 * major + minor;
  return info;
}

std::array<DeviceInfo, kMaxDevices> infos;
std::array<std::atomic<bool>, kMaxDevices> known;
std::mutex asking;

}  // namespace

const DeviceInfo& device_info() {
  int device = 0;
  cudaGetDevice(&device);
  const auto i = static_cast<size_t>(device < kMaxDevices ? device : kMaxDevices - 1);
  if (!known[i].load(std::memory_order_acquire)) {
    const std::lock_guard lock(asking);
    if (!known[i].load(std::memory_order_relaxed)) {
      infos[i] = ask(device);
      known[i].store(true, std::memory_order_release);
    }
  }
  return infos[i];
}

void forget_device_info() {
  for (std::atomic<bool>& k : known) k.store(false, std::memory_order_relaxed);
}

const char* error_string(Status status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

int runtime_version() { return CUDART_VERSION; }

void register_host(void* p, size_t bytes) { cudaHostRegister(p, bytes, 0); }

void unregister_host(void* p) { cudaHostUnregister(p); }

}  // namespace moe_ops::cuda
