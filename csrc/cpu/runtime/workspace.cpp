#include "cpu/runtime/workspace.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>

#include "cpu/runtime/huge_pages.h"
#include "moe_ops/platform.h"

namespace moe_ops::cpu {

namespace {

constexpr size_t kAlignment = 64;
constexpr int kCount = static_cast<int>(Scratch::kCount);

struct Block {
  void* data = nullptr;
  size_t size = 0;

  void reset() {
    free_aligned(data);
    data = nullptr;
    size = 0;
  }

  void allocate(size_t alignment, size_t bytes) {
    reset();
    data = allocate_aligned(alignment, bytes);
    if (data == nullptr) throw std::bad_alloc();
    size = bytes;
  }
};

}  // namespace

struct ScratchBlocks {
  Block blocks[kCount];
  uint32_t in_use = 0;  // a bit for each block
  ~ScratchBlocks() {
    for (Block& b : blocks) b.reset();
  }
};

namespace {

thread_local ScratchBlocks tls_blocks;

#if defined(MOE_OPS_FRESH_SCRATCH)

void reserve(Block& block, size_t bytes) {
  block.allocate(kAlignment, bytes);
  std::memset(block.data, 0xff, bytes);
}

constexpr size_t kept_bytes(ScratchScope::Keep) { return 0; }

#else

// Smaller blocks would waste up to half of their last page.
constexpr size_t kHugeFrom = size_t{8} << 20;

void reserve(Block& block, size_t bytes) {
  if (bytes <= block.size && block.data != nullptr) return;
  // Grow by half again, so that a slowly rising T does not reallocate on every call.
  size_t size = bytes + bytes / 2 + kAlignment;
  if (size < bytes) throw std::bad_alloc();
  const size_t alignment = size >= kHugeFrom ? kHugePage : kAlignment;
  size = round_up(size, alignment);
  block.allocate(alignment, size);
  if (alignment == kHugePage) advise_huge_pages(block.data, size);
}

// Returns the largest block, in bytes, kept when a scope ends; larger ones are freed.
constexpr size_t kept_bytes(ScratchScope::Keep keep) {
  return keep == ScratchScope::Keep::kAll ? SIZE_MAX : size_t{256} << 20;
}

#endif

}  // namespace

void poison_scratch(size_t bytes) {
  for (Block& b : tls_blocks.blocks) {
    if (b.data != nullptr) std::memset(b.data, 0xff, std::min(bytes, b.size));
  }
}

ScratchScope::ScratchScope(Keep keep) : blocks_(&tls_blocks), keep_(keep) {}

ScratchScope::~ScratchScope() {
  blocks_->in_use &= ~own_;
  const size_t kept = kept_bytes(keep_);
  if (kept == SIZE_MAX) return;
  for (int i = 0; i < kCount; ++i) {
    Block& block = blocks_->blocks[i];
    if ((own_ >> i & 1) != 0 && block.size > kept) block.reset();
  }
}

void* ScratchScope::take_bytes(Scratch block, size_t bytes) {
  const uint32_t bit = uint32_t{1} << static_cast<int>(block);
  if (blocks_ != &tls_blocks) throw std::logic_error("moe_ops: scratch of another thread");
  if (blocks_->in_use & bit) throw std::logic_error("moe_ops: a block of scratch is in use twice");
  Block& b = blocks_->blocks[static_cast<int>(block)];
  reserve(b, bytes);
  blocks_->in_use |= bit;
  own_ |= bit;
  return b.data;
}

}  // namespace moe_ops::cpu
