// Products of weights that become float32 in cache, some rows at a time: those of formats without
// kernels of their own, and those with transposed matrices, as in a backward pass. The algorithms
// of float32 weights do the rest, so memory delivers the bits that are stored and no others.
#pragma once

#include <functional>

#include "cpu/gemm/heuristics.h"

namespace moe_ops::cpu {

// As the epilogues of all algorithms (zero_item); one type, so that the algorithms are compiled
// once more and not once for each epilogue.
using DequantEpilogue =
    std::function<void(int64_t expert, int64_t row, int64_t feature, int64_t n, float*, float*)>;

void dequant_item(const GemmDesc<float>& d, const GemmKernels<float>& k, const GemmItem& it,
                  const DequantEpilogue& fn);

}  // namespace moe_ops::cpu
