// Preloaded into a process (LD_PRELOAD): while it is armed, the n-th allocation fails of those that
// moe_ops makes (operator new, aligned memory, mmap) or that torch makes for tensors on the CPU.
// Python and the rest of torch always get their memory.

#include <dlfcn.h>
#include <errno.h>
#include <link.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <atomic>
#include <new>

namespace {

struct Range {
  std::atomic<uintptr_t> begin{0}, end{0};
  bool has(const void* p) const {
    const auto at = reinterpret_cast<uintptr_t>(p);
    return at >= begin && at < end;
  }
};
Range ours, allocator;

std::atomic<bool> armed{false};
std::atomic<long> fail_at{0}, seen{0}, mapped{0};

bool fails(bool counts) {
  if (!counts || !armed.load()) return false;
  return seen.fetch_add(1) + 1 == fail_at.load();
}

int find(dl_phdr_info* info, size_t, void*) {
  Range* range = strstr(info->dlpi_name, "libmoe_ops.so") ? &ours
                 : strstr(info->dlpi_name, "libc10.so")   ? &allocator
                                                          : nullptr;
  if (range == nullptr) return 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type != PT_LOAD || (header.p_flags & PF_X) == 0) continue;
    range->begin = info->dlpi_addr + header.p_vaddr;
    range->end = range->begin + header.p_memsz;
  }
  return 0;
}

void* take(size_t size) {
  void* p = malloc(size == 0 ? 1 : size);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}

template <class Fn>
Fn* next(const char* name) {
  return reinterpret_cast<Fn*>(dlsym(RTLD_NEXT, name));
}

}  // namespace

#define CALLER __builtin_return_address(0)

void* operator new(size_t size) {
  if (fails(ours.has(CALLER))) throw std::bad_alloc();
  return take(size);
}

void* operator new[](size_t size) {
  if (fails(ours.has(CALLER))) throw std::bad_alloc();
  return take(size);
}

extern "C" {

int posix_memalign(void** out, size_t alignment, size_t size) {
  if (fails(ours.has(CALLER) || allocator.has(CALLER))) return ENOMEM;
  static auto* real = next<int(void**, size_t, size_t)>("posix_memalign");
  return real(out, alignment, size);
}

void* aligned_alloc(size_t alignment, size_t size) {
  if (fails(ours.has(CALLER))) return nullptr;
  static auto* real = next<void*(size_t, size_t)>("aligned_alloc");
  return real(alignment, size);
}

void* mmap(void* at, size_t size, int protection, int flags, int file, off_t offset) {
  const bool is_ours = ours.has(CALLER);
  if (fails(is_ours)) {
    errno = ENOMEM;
    return MAP_FAILED;
  }
  static auto* real = next<void*(void*, size_t, int, int, int, off_t)>("mmap");
  void* p = real(at, size, protection, flags, file, offset);
  if (is_ours && p != MAP_FAILED) mapped += static_cast<long>(size);
  return p;
}

int munmap(void* at, size_t size) {
  static auto* real = next<int(void*, size_t)>("munmap");
  const int error = real(at, size);
  if (error == 0 && ours.has(CALLER)) mapped -= static_cast<long>(size);
  return error;
}

// Finds the libraries; 1 if both are there.
int failing_find() {
  dl_iterate_phdr(find, nullptr);
  return ours.end != 0 && allocator.end != 0;
}

void failing_arm(long nth) {
  seen = 0;
  fail_at = nth;
  armed = true;
}

// The number of allocations since it was armed.
long failing_disarm() {
  armed = false;
  return seen;
}

// Bytes that moe_ops has mapped and not given back.
long failing_mapped() { return mapped; }
}
