#include "cpu/workspace.h"

#include <cstdlib>
#include <new>

#include "cpu/huge_pages.h"

namespace moe_ops::cpu {

namespace {

constexpr size_t kAlignment = 64;
// Smaller blocks would waste up to half of their last page.
constexpr size_t kHugeFrom = size_t{8} << 20;
constexpr size_t kKeepBytes = size_t{256} << 20;

struct Block {
  void* data = nullptr;
  size_t size = 0;
  void reset() {
    std::free(data);
    data = nullptr;
    size = 0;
  }
};

struct Blocks {
  Block slots[static_cast<int>(Scratch::kCount)];
  ~Blocks() {
    for (Block& b : slots) b.reset();
  }
};

thread_local Blocks tls_blocks;

}  // namespace

void* scratch_bytes(Scratch slot, size_t bytes) {
  Block& block = tls_blocks.slots[static_cast<int>(slot)];
  if (bytes <= block.size && block.data != nullptr) return block.data;
  // Grow by half again, so that a slowly rising T does not reallocate on every call.
  size_t size = bytes + bytes / 2 + kAlignment;
  const size_t alignment = size >= kHugeFrom ? kHugePage : kAlignment;
  size = round_up(size, alignment);
  block.reset();
  block.data = std::aligned_alloc(alignment, size);
  if (block.data == nullptr) throw std::bad_alloc();
  block.size = size;
  if (alignment == kHugePage) advise_huge_pages(block.data, size);
  return block.data;
}

void release_large_scratch() {
  for (Block& b : tls_blocks.slots) {
    if (b.size > kKeepBytes) b.reset();
  }
}

}  // namespace moe_ops::cpu
