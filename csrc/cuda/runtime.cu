#include <cuda_runtime_api.h>
#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string_view>

#include "cuda/device_info.h"
#include "cuda/runtime.h"

namespace moe_ops::cuda {

namespace {

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

namespace {

std::atomic<int>& margin() {
  static std::atomic<int> sms = [] {
    const char* value = std::getenv("MOE_OPS_SM_MARGIN");
    return value == nullptr ? 0 : std::max(0, std::atoi(value));
  }();
  return sms;
}

}  // namespace

int sm_margin() { return margin().load(std::memory_order_relaxed); }

void set_sm_margin(int sms) { margin().store(sms, std::memory_order_relaxed); }

int usable_sms() { return std::max(1, device_info().num_sms - sm_margin()); }

void forget_device_info() {
  for (std::atomic<bool>& k : known) k.store(false, std::memory_order_relaxed);
}

const char* error_string(Status status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

Status bind_device(int device) {
  const cudaError_t error = cudaSetDevice(device);
  cudaGetLastError();
  return static_cast<Status>(error);
}

namespace {

constexpr const char* kTorchLibrary = "libtorch_cuda.so";
constexpr const char* kCurrentStream = "aoti_torch_get_current_cuda_stream";

StreamSource find_stream_source() {
  StreamSource source{};
  // Python loads torch's libraries with RTLD_LOCAL, so that no symbol of them is global.
  void* library = dlopen(kTorchLibrary, RTLD_NOLOAD | RTLD_NOW);
  if (library == nullptr) return source;
  source.library = kTorchLibrary;
  void* symbol = dlsym(library, kCurrentStream);
  source.current = reinterpret_cast<int (*)(int32_t, void**)>(symbol);
  Dl_info info{};
  if (symbol != nullptr && dladdr(symbol, &info) != 0) source.library = info.dli_fname;
  return source;
}

}  // namespace

const StreamSource& stream_source() {
  static const StreamSource source = find_stream_source();
  return source;
}

namespace {

// Returns the list of kernels. The initializers of static variables add to it in unspecified order.
std::vector<const void*>& kernels() {
  static std::vector<const void*> all;
  return all;
}

std::string name_of(const void* kernel) {
  const char* mangled = nullptr;
  if (cudaFuncGetName(&mangled, kernel) != cudaSuccess) {
    cudaGetLastError();
    return "unknown";
  }
  int failed = 0;
  const std::unique_ptr<char, void (*)(void*)> demangled(
      abi::__cxa_demangle(mangled, nullptr, nullptr, &failed), std::free);
  std::string name = failed == 0 ? demangled.get() : mangled;
  constexpr std::string_view kUnnamed = "(anonymous namespace)::";
  if (const size_t at = name.find(kUnnamed); at != std::string::npos)
    name.erase(at, kUnnamed.size());
  name = name.substr(0, name.find_first_of("<("));
  return name.substr(name.find_last_of(": ") + 1);
}

}  // namespace

bool add_kernel(const void* kernel) {
  kernels().push_back(kernel);
  return true;
}

std::vector<KernelInfo> kernel_infos() {
  std::vector<KernelInfo> infos;
  for (const void* kernel : kernels()) {
    cudaFuncAttributes a{};
    const cudaError_t error = cudaFuncGetAttributes(&a, kernel);
    if (error != cudaSuccess) cudaGetLastError();
    infos.push_back({name_of(kernel), static_cast<Status>(error), a.binaryVersion, a.ptxVersion,
                     a.numRegs, static_cast<int64_t>(a.localSizeBytes)});
  }
  return infos;
}

void load_kernels(int device) {
  static std::array<std::once_flag, kMaxDevices> loaded;
  if (device < 0 || device >= kMaxDevices) return;
  std::call_once(loaded[static_cast<size_t>(device)], [] {
    for (const void* kernel : kernels()) {
      cudaFuncAttributes attributes;
      // A kernel for other cards has no code for this one.
      if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) cudaGetLastError();
    }
  });
}

int runtime_version() { return CUDART_VERSION; }

void register_host(void* p, size_t bytes) { cudaHostRegister(p, bytes, 0); }

void unregister_host(void* p) { cudaHostUnregister(p); }

}  // namespace moe_ops::cuda
