// Scratch memory that a thread keeps between calls. Fresh memory costs a page fault per 4 KiB
// (2-3 us on a virtual machine), which would be half of a layer's time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/isa/isa.h"
#include "moe_ops/common.h"

namespace moe_ops::cpu {

// Blocks of scratch that one thread may have in use at the same time.
enum class Scratch : int {
  kPackA,
  kPackB,
  kTile,
  kRows,
  kHidden,
  kIndex,
  kTokens,
  kRowAsFloat,
  kRouting,
  kDequant,
  kLowRank,
  kCount
};

struct ScratchBlocks;

// Owns the blocks that it takes until it ends. A block has one owner and one use at a time: to take
// one that is in use, in this scope or in one around it, or from another thread than the one that
// made the scope, throws std::logic_error.
//
// Contents are undefined. With MOE_OPS_FRESH_SCRATCH, for memory checkers, each take is a new
// allocation of the exact size, full of 0xff bytes (NaN), that ends with the scope.
class ScratchScope {
 public:
  enum class Keep { kAll, kUpTo256MiB };

  // kUpTo256MiB: larger blocks are freed when the scope ends, for what grows with the tokens.
  explicit ScratchScope(Keep keep = Keep::kAll);
  ~ScratchScope();
  ScratchScope(const ScratchScope&) = delete;
  ScratchScope& operator=(const ScratchScope&) = delete;

  // Returns at least `bytes` bytes, aligned to 64; throws std::bad_alloc.
  void* take_bytes(Scratch block, size_t bytes);

  template <class T>
  T* take(Scratch block, int64_t count) {
    return static_cast<T*>(take_bytes(block, static_cast<size_t>(count) * sizeof(T)));
  }

 private:
  ScratchBlocks* blocks_;
  uint32_t own_ = 0;  // a bit for each block
  Keep keep_;
};

// Fills the first `bytes` of each block that the calling thread keeps with 0xff, which is NaN in
// every type, so that an op which reads uninitialized scratch memory returns NaN and not results of
// an earlier call. For tests.
void poison_scratch(size_t bytes);

// Hands out parts of one block of scratch, each on a 64-byte boundary.
class Arena {
 public:
  Arena(ScratchScope& scratch, Scratch block, int64_t bytes)
      : next_(scratch.take<char>(block, bytes)) {}
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
