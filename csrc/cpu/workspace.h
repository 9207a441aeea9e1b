// Scratch memory that a thread keeps between calls. Fresh memory costs a page fault per 4 KiB
// (2-3 us on a virtual machine), which would be half of a layer's time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "moe_ops/common.h"

namespace moe_ops::cpu {

// Slots that may be live in one thread at the same time.
enum class Scratch : int {
  kPackA,
  kPackB,
  kTile,
  kRows,
  kHidden,
  kIndex,
  kTokens,
  kRowAsFloat,
  kCount
};

// At least `bytes` of 64-byte aligned memory, valid until the same thread asks for the same slot
// again. Contents are undefined. Blocks above 256 MiB are given back by release_large_scratch().
void* scratch_bytes(Scratch slot, size_t bytes);

template <class T>
T* scratch(Scratch slot, int64_t count) {
  return static_cast<T*>(scratch_bytes(slot, static_cast<size_t>(count) * sizeof(T)));
}

void release_large_scratch();

// Hands out parts of one block of scratch, each on a 64-byte boundary.
class Carver {
 public:
  Carver(Scratch slot, int64_t bytes)
      : next_(static_cast<char*>(scratch_bytes(slot, static_cast<size_t>(bytes)))) {}
  template <class T>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(next_);
    next_ += round_up<int64_t>(count * static_cast<int64_t>(sizeof(T)), 64);
    return part;
  }

 private:
  char* next_;
};

}  // namespace moe_ops::cpu
