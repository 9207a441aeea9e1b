// Outer products: few rows of an expert, weights dense along the features. Four weight rows at a
// time are added to the sums, with vectors along the features; nothing is copied. With a token or
// two and items as wide as a row, one weight row at a time: memory is read as one run, and the
// loads and stores of the sums in L1 take less time than that.
#pragma once

#include "cpu/gemm/heuristics.h"

namespace moe_ops::cpu {

// Distance, in bytes, at which a run is prefetched.
constexpr int64_t kOneRunPrefetch = 8192;

template <class Op, class T, class Epilogue>
void outer_item(const GemmDesc<T>& d, const GemmKernels<T>& k, const GemmItem& it,
                const Epilogue& fn) {
  const int64_t m = it.row_end - it.row_begin;
  const int64_t n = it.feature_end - it.feature_begin;
  const int64_t K = ceil_div(d.in_features, Op::kSteps), lda = K + 16;
  // One block, or in the batch-invariant mode those of row_major_item, whose sums are added up.
  const int64_t depth = it.config.depth, ldc = n * d.segments;
  ScratchScope scratch;
  T* a = scratch.take<T>(Scratch::kTokens, m * lda);
  T* tile = scratch.take<T>(Scratch::kTile, m * ldc);
  // Segments that are wanted whole lie side by side, as their sums do.
  const int64_t segments = n == d.features ? 1 : d.segments, width = ldc / segments;
  const bool one_run = it.config.one_run && width == d.b.stride_k;
  const int64_t ahead =
      one_run ? kOneRunPrefetch / dtype_size(d.b.type) : kOuterRows * d.b.stride_k;
  T* block = depth < K ? scratch.take<T>(Scratch::kPackA, m * ldc) : nullptr;
  for (int64_t t = 0; t < m; ++t) {
    Op::load(d, it.row_begin + t, 0, K, a + t * lda);
  }
  for (int64_t b = 0; b < K; b += depth) {
    const int64_t first_row = b * Op::kSteps,
                  end = std::min(d.in_features, (b + depth) * Op::kSteps);
    T* sums = b == 0 ? tile : block;
    for (int64_t s = 0; s < segments; ++s) {
      const int64_t first = it.expert * d.b.stride_e + s * d.features + it.feature_begin;
      const int64_t step = one_run ? end - first_row : kOuterRows;
      for (int64_t row = first_row; row < end; row += step) {
        const int64_t rows = std::min(step, end - row);
        const char* w = element(d.b.data, d.b.type, first + row * d.b.stride_k);
        const T* x = a + row / Op::kSteps;
        const bool add = row > first_row;
        (Op::kBf16 ? k.outer.run_bf16 : k.outer.run)({.w_type = d.b.type,
                                                      .rows = rows,
                                                      .tokens = m,
                                                      .w = w,
                                                      .ldw = d.b.stride_k,
                                                      .ahead = ahead,
                                                      .a = x,
                                                      .lda = lda,
                                                      .c = sums + s * width,
                                                      .ldc = ldc,
                                                      .n = width,
                                                      .accumulate = add});
      }
    }
    if (b > 0) row_kernels<T>().axpy(kAccumulate<T>, block, T(1), tile, m * ldc);
  }
  for (int64_t t = 0; t < m; ++t) {
    T* row = tile + t * n * d.segments;
    fn(it.expert, it.row_begin + t, it.feature_begin, n, row, row + n);
  }
}

}  // namespace moe_ops::cpu
