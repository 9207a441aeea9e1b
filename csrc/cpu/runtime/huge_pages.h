// Memory in pages of 2 MiB. A table of pages of 4 KiB for weights of some 100 MB is larger than
// what a core remembers of it, and prefetchers stop at the end of a page.
#pragma once

#include <cstddef>

#include "cpu/isa/isa.h"

namespace moe_ops::cpu {

constexpr size_t kHugePage = size_t{2} << 20;

// Asks for huge pages for memory that nobody has written yet. Both are multiples of kHugePage.
void advise_huge_pages(void* data, size_t bytes);

// Moves what lies in [data, data + bytes) to huge pages, as far as the system can do it now; where
// it cannot, it is asked to do so when it gets to it. Contents and addresses stay. Returns the
// bytes moved: 0 without Linux 6.1, or where the memory is that of a file.
size_t use_huge_pages(void* data, size_t bytes);

}  // namespace moe_ops::cpu
