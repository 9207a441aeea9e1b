// Kernels of low-rank factors.
#pragma once

#include "cpu/kernels/rows.h"

namespace moe_ops::cpu {

template <class T>
struct LowRankKernels {
  // out[r*rank + j] = the sum over i of rows[r][i] * factor[j*n + i], of each row in one order.
  void (*product)(const RowPointers& rows, const T* factor, int64_t rank, T* out);
  // out[j*n + i] = the sum over r of low[r*rank + j] * rows[r][i], in the order of r.
  void (*gradient)(const RowPointers& rows, const T* low, int64_t rank, T* out);
  // dst[c*ld_dst + r] = src[r*ld_src + c] for r < rows, c < cols.
  void (*transpose)(const T* src, int64_t ld_src, int64_t rows, int64_t cols, T* dst,
                    int64_t ld_dst);
};

template <class T>
const LowRankKernels<T>& low_rank_kernels();

}  // namespace moe_ops::cpu
