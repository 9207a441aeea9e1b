#include "cpu/runtime/huge_pages.h"

#include <algorithm>
#include <cerrno>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "moe_ops/common.h"

namespace moe_ops::cpu {

#if defined(__linux__) && defined(MADV_HUGEPAGE)

namespace {

constexpr int kMadvCollapse = 25;  // Linux 6.1; older headers lack MADV_COLLAPSE.
// Bytes per request; requests are short, so that a failing one is noticed soon.
constexpr size_t kPart = 16 * kHugePage;

}  // namespace

void advise_huge_pages(void* data, size_t bytes) { madvise(data, bytes, MADV_HUGEPAGE); }

size_t use_huge_pages(void* data, size_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t end = (address + bytes) & ~(kHugePage - 1);
  size_t moved = 0;
  for (uintptr_t at = round_up<uintptr_t>(address, kHugePage); at < end; at += kPart) {
    const size_t size = std::min<size_t>(kPart, end - at);
    if (madvise(reinterpret_cast<void*>(at), size, kMadvCollapse) == 0) {
      moved += size;
    } else if (errno != EAGAIN) {  // Not just some page that was in use.
      advise_huge_pages(reinterpret_cast<void*>(at), end - at);
      break;
    }
  }
  return moved;
}

#else

void advise_huge_pages(void*, size_t) {}
size_t use_huge_pages(void*, size_t) { return 0; }

#endif

}  // namespace moe_ops::cpu
