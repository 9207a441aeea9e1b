// The device's half of Launch::overlaps (launch.h).
#pragma once

namespace moe_ops::cuda {

// Waits until the kernels ahead in the stream have ended and their writes are seen, and lets the
// next one begin: with all threads, before the kernel reads or writes anything but its parameters
// and its shared memory. All of them, because the next kernel waits for this one only: one that
// ended without waiting would not tell whether those before it have.
__device__ __forceinline__ void await_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  // The next kernel is let in when every block of this one has come here, so it takes no place
  // that a block of this one waits for.
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace moe_ops::cuda
