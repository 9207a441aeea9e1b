// Products of weights of few bits that are decoded to float32: those of formats without kernels of
// integers, and those with transposed matrices, as in a backward pass. Memory delivers the bits
// that are stored and no others, and tokens are not rounded.
#pragma once

#include <functional>

#include "cpu/gemm/heuristics.h"

namespace moe_ops::cpu {

// Type-erased epilogue, with the arguments of all algorithms' epilogues (zero_item). One type
// suffices, so that the algorithms are compiled once more and not once per epilogue.
using DequantEpilogue =
    std::function<void(int64_t expert, int64_t row, int64_t feature, int64_t n, float*, float*)>;

// Computes an item by dequantizing some weight rows at a time to float32 in cache, and running the
// float32 algorithms on them.
void dequant_item(const GemmDesc<float>& d, const GemmKernels<float>& k, const GemmItem& it,
                  const DequantEpilogue& fn);

// Computes an item in one pass of tokens: weights are dequantized to float32 in registers, and
// every byte of them is read once.
void decoded_gemv_item(const GemmDesc<float>& d, const GemmItem& it, const DequantEpilogue& fn);

}  // namespace moe_ops::cpu
