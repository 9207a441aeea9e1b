// Memory of large outputs, kept for the next call when a tensor is freed.
//
// A training step frees the weight gradients of a layer and asks for the same amount again. From
// the system it gets zeroed pages, and zeroing them takes as long as a third of the layer's
// backward. Kept blocks are marked MADV_FREE: the system may take their pages back at any time when
// it is short of memory, so keeping them costs nobody anything but address space.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/isa/isa.h"

namespace moe_ops::cpu {

// Elsewhere nothing is kept, and acquire_buffer has no block.
#if defined(__linux__)
constexpr bool kHasBufferCache = true;
#else
constexpr bool kHasBufferCache = false;
#endif

// Outputs from this size on go through the cache.
constexpr size_t kLargeBuffer = size_t{8} << 20;

// Returns an uninitialized block of at least `bytes`, aligned to 2 MiB; nullptr if the cache is off
// (MOE_OPS_CACHE_MB=0, or a system without madvise) or no memory is left even after all kept blocks
// were released.
void* acquire_buffer(size_t bytes);
// Gives a block of acquire_buffer back. Any thread may call it, also while the process ends.
void release_buffer(void* block);

// Returns the bytes of kept blocks that no tensor uses.
size_t cached_bytes();
// Returns the largest number of bytes that is kept: MOE_OPS_CACHE_MB, or else a quarter of the
// machine's memory, or zero while the address space of the process is limited (RLIMIT_AS).
size_t cache_limit();
// Returns all kept blocks to the system.
void release_cached();

// Lock and unlock the cache around a fork: no other thread is inside the cache meanwhile, so the
// child's copy is consistent.
void lock_cache();
void unlock_cache();

}  // namespace moe_ops::cpu
