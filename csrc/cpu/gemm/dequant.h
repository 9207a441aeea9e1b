// Products of weights of few bits that are decoded to float32: those of formats without kernels of
// integers, and those with transposed matrices, as in a backward pass. Memory delivers the bits
// that are stored and no others, and tokens are not rounded.
#pragma once

#include <functional>

#include "cpu/gemm/heuristics.h"

namespace moe_ops::cpu {

// Returns the stored rows of expert e's weights, k per row.
inline CodeRows code_rows(const ExpertMatrices& m, int64_t e, int64_t k) {
  const QuantFormat& q = m.quant;
  const int64_t scale = e * q.scale_stride_e, size = scale_size(q.scale_type);
  return {.codes = q.codes,
          .k = k,
          .scale_type = q.scale_type,
          .group = q.group,
          .w = static_cast<const char*>(m.data) + e * m.stride_e * q.bits / 8,
          .ldw = (q.transposed ? m.stride_k : m.stride_o) * q.bits / 8,
          .scale = static_cast<const char*>(q.scales) + scale * size,
          .ld_scale = q.scale_stride_o * size,
          .scale_rows = q.scale_rows,
          .zero = q.zero == nullptr ? nullptr : q.zero + scale,
          .ld_zero = q.scale_stride_o};
}

// Type-erased epilogue, with the arguments of all algorithms' epilogues (zero_item). One type
// suffices, so that the algorithms are compiled once more and not once per epilogue.
using DequantEpilogue =
    std::function<void(int64_t expert, int64_t row, int64_t feature, int64_t n, float*, float*)>;

// Computes an item by dequantizing some weight rows at a time in cache: to float32 for the
// algorithms of that type, or to bfloat16 where that is the operand.
void dequant_item(const GemmDesc<float>& d, const GemmKernels<float>& k, const GemmItem& it,
                  const DequantEpilogue& fn);

// Computes an item whose weights are decoded in registers: to float32, or to bfloat16 where that is
// the operand. Every byte of them is read once by max_tokens tokens.
void decoded_gemv_item(const GemmDesc<float>& d, const GemmKernels<float>& k, const GemmItem& it,
                       const DequantEpilogue& fn);

}  // namespace moe_ops::cpu
