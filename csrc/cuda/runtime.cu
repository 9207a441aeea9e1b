#include <cuda_runtime_api.h>

#include <array>
#include <mutex>

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

}  // namespace

const DeviceInfo& device_info() {
  static std::array<DeviceInfo, kMaxDevices> infos;
  static std::array<std::once_flag, kMaxDevices> asked;
  int device = 0;
  cudaGetDevice(&device);
  const auto i = static_cast<size_t>(device < kMaxDevices ? device : kMaxDevices - 1);
  std::call_once(asked[i], [&] { infos[i] = ask(device); });
  return infos[i];
}

const char* error_string(Status status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

int runtime_version() { return CUDART_VERSION; }

void register_host(void* p, size_t bytes) { cudaHostRegister(p, bytes, 0); }

void unregister_host(void* p) { cudaHostUnregister(p); }

}  // namespace moe_ops::cuda
