// The few calls of the CUDA runtime that launchers and adapters share. No CUDA header is needed to
// include this one.
#pragma once

#include <cstddef>

#include "moe_ops/common.h"

namespace moe_ops::cuda {

// Facts about the current device, asked once a device.
struct DeviceInfo {
  int num_sms;
  int capability;        // 10 * major + minor
  int max_shared_bytes;  // a block may have, with opt-in
};
const DeviceInfo& device_info();

const char* error_string(Status status);

// Version of the runtime this was compiled with, 13000 for 13.0.
int runtime_version();

// Makes [p, p + bytes) device memory (simulator only).
void register_host(void* p, size_t bytes);
void unregister_host(void* p);

}  // namespace moe_ops::cuda
