#include "cpu/buffer_cache.h"

#include <cstdlib>
#include <list>
#include <mutex>
#include <unordered_map>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "cpu/huge_pages.h"
#include "moe_ops/common.h"

namespace moe_ops::cpu {

#if defined(__linux__) && defined(MADV_HUGEPAGE) && defined(MADV_FREE)

namespace {

size_t read_limit() {
  if (const char* text = std::getenv("MOE_OPS_CACHE_MB")) {
    char* end = nullptr;
    const unsigned long long mb = std::strtoull(text, &end, 10);
    if (end != text && *end == '\0') return static_cast<size_t>(mb) << 20;
  }
  const long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGE_SIZE);
  return pages > 0 && size > 0 ? static_cast<size_t>(pages) / 4 * static_cast<size_t>(size) : 0;
}

// 2 MiB aligned: one huge page more is mapped and the ends are cut off.
void* map_aligned(size_t size) {
  void* raw =
      mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  const auto begin = reinterpret_cast<uintptr_t>(raw);
  const uintptr_t first = round_up<uintptr_t>(begin, kHugePage);
  if (first > begin) munmap(raw, first - begin);
  const uintptr_t tail = begin + kHugePage - first;
  if (tail > 0) munmap(reinterpret_cast<void*>(first + size), tail);
  advise_huge_pages(reinterpret_cast<void*>(first), size);
  return reinterpret_cast<void*>(first);
}

struct Block {
  void* data;
  size_t size;
};

class Cache {
 public:
  void* acquire(size_t bytes) {
    const size_t size = round_up(bytes, kHugePage);
    std::lock_guard<std::mutex> lock(mutex_);
    // The smallest kept block that fits and wastes at most a quarter.
    auto best = kept_.end();
    for (auto it = kept_.begin(); it != kept_.end(); ++it) {
      if (it->size < size || it->size > size + size / 4) continue;
      if (best == kept_.end() || it->size < best->size) best = it;
    }
    Block block{nullptr, size};
    if (best != kept_.end()) {
      block = *best;
      kept_bytes_ -= block.size;
      kept_.erase(best);
    } else {
      block.data = map_aligned(size);
      if (block.data == nullptr) return nullptr;
    }
    in_use_[block.data] = block.size;
    return block.data;
  }

  void release(void* data) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto it = in_use_.find(data);
    const Block block{data, it->second};
    in_use_.erase(it);
    madvise(block.data, block.size, MADV_FREE);
    kept_.push_back(block);
    kept_bytes_ += block.size;
    shrink(limit_);
  }

  void release_all() {
    std::lock_guard<std::mutex> lock(mutex_);
    shrink(0);
  }

  size_t kept_bytes() {
    std::lock_guard<std::mutex> lock(mutex_);
    return kept_bytes_;
  }

  size_t limit() const { return limit_; }

 private:
  // Drops the blocks that were given back first.
  void shrink(size_t limit) {
    while (kept_bytes_ > limit) {
      const Block block = kept_.front();
      kept_.pop_front();
      kept_bytes_ -= block.size;
      munmap(block.data, block.size);
    }
  }

  const size_t limit_ = read_limit();
  std::mutex mutex_;
  std::list<Block> kept_;
  size_t kept_bytes_ = 0;
  std::unordered_map<void*, size_t> in_use_;
};

// Never destroyed: tensors may outlive every static object.
Cache& cache() {
  static Cache& c = *new Cache;
  return c;
}

}  // namespace

void* acquire_buffer(size_t bytes) {
  return cache().limit() == 0 ? nullptr : cache().acquire(bytes);
}
void release_buffer(void* block) { cache().release(block); }
size_t cached_bytes() { return cache().kept_bytes(); }
size_t cache_limit() { return cache().limit(); }
void release_cached() { cache().release_all(); }

#else

void* acquire_buffer(size_t) { return nullptr; }
void release_buffer(void*) {}
size_t cached_bytes() { return 0; }
size_t cache_limit() { return 0; }
void release_cached() {}

#endif

}  // namespace moe_ops::cpu
