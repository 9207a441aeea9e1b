// device_info() is asked once a device (runtime.h). The simulator's number of SMs is an option that
// a test may change between two calls.
#pragma once

namespace moe_ops::cuda {

// Makes device_info() query the device again (simulator only: no other call may be running).
void forget_device_info();

}  // namespace moe_ops::cuda
