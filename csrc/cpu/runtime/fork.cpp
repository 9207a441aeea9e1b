// Prepares the process for fork(2), which copies the memory of all threads but only the calling
// thread. A lock held by another thread, or a static variable that it is initializing, would stay
// in that state in the child forever.
#if defined(__linux__)

#include <pthread.h>

#include "cpu/kernels/rows.h"
#include "cpu/runtime/buffer_cache.h"
#include "moe_ops/batch_invariant.h"

namespace moe_ops::cpu {

namespace {

void before_fork() {
  row_kernels<float>();
  row_kernels<double>();
  batch_invariant();
  lock_cache();
}

// When the library is loaded, so that no call can be under way.
[[maybe_unused]] const int registered = pthread_atfork(before_fork, unlock_cache, unlock_cache);

}  // namespace

}  // namespace moe_ops::cpu

#endif
