// The few calls of the CUDA runtime that launchers and adapters share. No CUDA header is needed to
// include this one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "moe_ops/common.h"

namespace moe_ops::cuda {

inline bool aligned_to(const void* p, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0;
}

// Devices that are told apart; facts about one past them are asked for at each call.
constexpr int kMaxDevices = 64;

// Facts about the current device, asked once a device.
struct DeviceInfo {
  int num_sms;
  int capability;        // 10 * major + minor
  int max_shared_bytes;  // a block may have, with opt-in
};
const DeviceInfo& device_info();

// SMs that persistent kernels of the current device may take: all but the margin, which is left to
// kernels of others that run at the same time, of a collective for example. Tiles of a block that
// has to wait for such an SM would run after all the others.
int usable_sms();

// Returns the process-wide margin: 0, unless the environment variable MOE_OPS_SM_MARGIN is a number
// or set_sm_margin was called.
int sm_margin();
void set_sm_margin(int sms);

const char* error_string(Status status);

// Makes a device current in the calling thread, and its context bound to the thread: a thread that
// has not used CUDA yet has none. Forgets an error that another caller of the runtime left behind.
Status bind_device(int device);

// Where the current stream of torch is found: a function of libtorch_cuda.so, which a torch with
// CUDA has loaded.
struct StreamSource {
  // Writes torch's current stream on a device; 0: success. Null if there is none.
  int (*current)(int32_t device, void** stream);
  const char* library;  // the file that it is in; null if torch has loaded no such library
};
const StreamSource& stream_source();

// Notes a kernel of the library; called while the library is loaded.
bool add_kernel(const void* kernel);

// Loads every kernel on the current device, whose number the caller knows, the first time that it
// is called there: CUDA would load each at its first launch, which may be inside of a capture.
void load_kernels(int device);

// A kernel on the current device, which loads it.
struct KernelInfo {
  std::string name;  // without namespace and template arguments
  Status status;     // 0: it can run
  int compiled_for;  // compute capability that its machine code was made for, 10 * major + minor
  int from_ptx;      // that of the PTX it was made of
  int registers;     // of a thread
  int64_t spilled_bytes;  // of a thread, in local memory
};
std::vector<KernelInfo> kernel_infos();

// Returns the version of the runtime this was compiled with, 13000 for 13.0.
int runtime_version();

// Makes [p, p + bytes) device memory (simulator only).
void register_host(void* p, size_t bytes);
void unregister_host(void* p);

}  // namespace moe_ops::cuda
