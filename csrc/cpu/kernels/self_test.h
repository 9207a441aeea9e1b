// Runs the kernels of a level on small operands and compares them with the portable ones. A level
// that fails here, because of a compiler, an emulator or a processor with a fault, is not used.
#pragma once

#include "cpu/kernels/kernels.h"

namespace moe_ops::cpu {

// nullptr, or the name of the first kernel whose results are wrong. Takes well under a millisecond.
template <class T>
const char* failing_kernel(const Kernels<T>& k, const Kernels<T>& portable);

}  // namespace moe_ops::cpu
