#include "cpu/runtime/buffer_cache.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <list>
#include <mutex>
#include <optional>

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>
#endif

#include "cpu/runtime/huge_pages.h"
#include "moe_ops/common.h"

namespace moe_ops::cpu {

#if defined(__linux__) && defined(MADV_HUGEPAGE) && defined(MADV_FREE)

namespace {

// Returns MOE_OPS_CACHE_MB in bytes. Values that are not whole numbers are ignored here;
// moe_ops.memory warns of them.
std::optional<size_t> limit_from_environment() {
  const char* text = std::getenv("MOE_OPS_CACHE_MB");
  if (text == nullptr) return std::nullopt;
  const char* end = text + std::strlen(text);
  uint64_t mb = 0;
  const auto [stop, error] = std::from_chars(text, end, mb);
  if (stop != end || stop == text) return std::nullopt;
  if (error == std::errc::result_out_of_range || mb > (SIZE_MAX >> 20)) return SIZE_MAX;
  return static_cast<size_t>(mb) << 20;
}

size_t quarter_of_memory() {
  const long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGE_SIZE);
  return pages > 0 && size > 0 ? static_cast<size_t>(pages) / 4 * static_cast<size_t>(size) : 0;
}

// Returns whether the address space is limited (ulimit -v). Kept blocks use address space but no
// memory; with a limit, they would make other allocations fail.
bool address_space_is_limited() {
  rlimit limit;
  return getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY;
}

// Maps memory aligned to 2 MiB: one more huge page is mapped, and the ends are unmapped.
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
    if (bytes > SIZE_MAX - 2 * kHugePage) return nullptr;
    const size_t size = round_up(bytes, kHugePage);
    // The only allocation for the lists of blocks: a block that is given back cannot fail.
    std::list<Block> taken(1, Block{nullptr, size});
    std::lock_guard<std::mutex> lock(mutex_);
    // The smallest kept block that fits and wastes at most a quarter.
    auto best = kept_.end();
    for (auto it = kept_.begin(); it != kept_.end(); ++it) {
      if (it->size < size || it->size > size + size / 4) continue;
      if (best == kept_.end() || it->size < best->size) best = it;
    }
    if (best != kept_.end()) {
      kept_bytes_ -= best->size;
      in_use_.splice(in_use_.begin(), kept_, best);
    } else {
      Block& block = taken.front();
      block.data = map_aligned(size);
      if (block.data == nullptr && kept_bytes_ > 0) {
        shrink(0);
        block.data = map_aligned(size);
      }
      if (block.data == nullptr) return nullptr;
      in_use_.splice(in_use_.begin(), taken);
    }
    return in_use_.front().data;
  }

  void release(void* data) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto it = std::find_if(in_use_.begin(), in_use_.end(),
                                 [data](const Block& block) { return block.data == data; });
    madvise(it->data, it->size, MADV_FREE);
    kept_bytes_ += it->size;
    kept_.splice(kept_.end(), in_use_, it);
    shrink(limit());
  }

  void release_all() {
    std::lock_guard<std::mutex> lock(mutex_);
    shrink(0);
  }

  size_t kept_bytes() {
    std::lock_guard<std::mutex> lock(mutex_);
    return kept_bytes_;
  }

  size_t limit() const {
    if (wanted_.has_value()) return *wanted_;
    return address_space_is_limited() ? 0 : default_;
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

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

  const std::optional<size_t> wanted_ = limit_from_environment();
  const size_t default_ = quarter_of_memory();
  std::mutex mutex_;
  std::list<Block> kept_, in_use_;  // in use: the newest first
  size_t kept_bytes_ = 0;
};

// Returns the cache, which is never destroyed: tensors may outlive every static object.
Cache& cache() {
  static Cache& c = *new Cache;
  return c;
}

}  // namespace

void* acquire_buffer(size_t bytes) {
  if (cache().limit() > 0) return cache().acquire(bytes);
  cache().release_all();  // kept before the limit was there
  return nullptr;
}
void release_buffer(void* block) { cache().release(block); }
size_t cached_bytes() { return cache().kept_bytes(); }
size_t cache_limit() { return cache().limit(); }
void release_cached() { cache().release_all(); }
void lock_cache() { cache().lock(); }
void unlock_cache() { cache().unlock(); }

#else

void* acquire_buffer(size_t) { return nullptr; }
void release_buffer(void*) {}
size_t cached_bytes() { return 0; }
size_t cache_limit() { return 0; }
void release_cached() {}
void lock_cache() {}
void unlock_cache() {}

#endif

}  // namespace moe_ops::cpu
