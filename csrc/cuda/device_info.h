// device_info() is asked once a device (runtime.h). The simulator's number of SMs is an option that
// a test may change between two calls.
#pragma once

namespace moe_ops::cuda {

// device_info() asks again (simulator only: no other call may be under way).
void forget_device_info();

}  // namespace moe_ops::cuda
