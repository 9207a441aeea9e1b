// Differences between operating systems and compilers. Calls that exist on one system only are in
// cpu/runtime/, beside their replacements for the others.
#pragma once

#include <cstddef>
#include <cstdlib>

#if defined(_WIN32)
#include <malloc.h>
#endif

// Marks exported symbols: the functions of python/library.cpp and those that moe_ops_dev calls.
#if defined(_WIN32)
#define MOE_OPS_API __declspec(dllexport)
#else
#define MOE_OPS_API __attribute__((visibility("default")))
#endif

namespace moe_ops {

// Returns memory that free_aligned releases, or null. `alignment` is a power of two, at least 8.
inline void* allocate_aligned(size_t alignment, size_t bytes) {
#if defined(_WIN32)
  return _aligned_malloc(bytes, alignment);
#else
  void* data = nullptr;
  return posix_memalign(&data, alignment, bytes) == 0 ? data : nullptr;
#endif
}

inline void free_aligned(void* data) {
#if defined(_WIN32)
  _aligned_free(data);
#else
  std::free(data);
#endif
}

}  // namespace moe_ops
