// The driver of products whose operands a caller has packed into cache: few rows, or few columns,
// of which the caller makes many. One function for each layout of A, over the register tiles.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/kernels/gemm.h"

namespace moe_ops::cpu {

// Cuts m rows into as few tiles as can be, of heights that are equal or differ by one. A tile of a
// short product is a few hundred cycles, so divisions are of 32 bits, and none where one tile will
// do.
struct RowTiles {
  uint32_t begin = 0, height = 0;

  RowTiles(int64_t m, int max_rows) : rows_(static_cast<uint32_t>(m)), least_(rows_) {
    const uint32_t most = static_cast<uint32_t>(max_rows);
    if (rows_ <= most) return;
    const uint32_t tiles = (rows_ + most - 1) / most;
    least_ = rows_ / tiles;
    higher_ = rows_ - least_ * tiles;
  }
  bool next() {
    begin += height;
    height = least_ + (higher_ > 0);
    higher_ -= higher_ > 0;
    return begin < rows_;
  }

 private:
  uint32_t rows_, least_, higher_ = 0;
};

// Returns the columns rounded up to whole vectors, whose lanes are a power of two: the width of B's
// panels and of rows of C.
template <class T>
int64_t padded(const GemmKernels<T>& k, int64_t n) {
  return (n + k.lanes - 1) & -int64_t{k.lanes};
}

// C [m, n] (+)= A [m, depth] B [depth, n]. B lies in panels of 2 * lanes columns, each [depth][2 *
// lanes], the last one perhaps [depth][lanes]; or, with ldb, row-major with that leading dimension,
// readable up to whole vectors. Rows of C have room for whole vectors.
template <class T>
struct SmallGemm {
  const GemmKernels<T>& k;
  int64_t m, n, depth;
  const T* a;
  const T* b;
  T* c;
  int64_t ldc;
  bool accumulate = false;
  // Elements from one block of A to the next: of kKc columns in row-major, of kLdm rows in
  // column-major form. Not used where A is one block.
  int64_t a_block = 0;
  int64_t lda = kLdm;  // of column-major A
  int64_t ldb = TileOptions::kPacked;

  const T* panel(int64_t j, int64_t k0, int64_t width) const {
    if (ldb != TileOptions::kPacked) return b + j + k0 * ldb;
    return b + j * depth + k0 * width;
  }
};

// Multiplies with a row-major A: blocks of kKc columns, each [m][kLda].
template <class T>
inline void small_gemm_row_major(const SmallGemm<T>& g) {
  const int64_t W = g.k.lanes, n = padded(g.k, g.n);
  TileOptions options;
  options.ldb = g.ldb;
  const T* a = g.a;
  int64_t k0 = 0;
  do {  // Once for a depth of 0, of which the sums are zero.
    for (int64_t j = 0; j < n; j += 2 * W) {
      const int64_t width = std::min(2 * W, n - j);
      const auto* tiles = g.k.row_a[width > W];
      for (RowTiles t(g.m, width > W ? g.k.mr2 : g.k.mr1); t.next();) {
        tiles[t.height - 1](std::min(kKc, g.depth - k0), a + t.begin * kLda, g.panel(j, k0, width),
                            {g.c + t.begin * g.ldc + j, g.ldc, g.accumulate || k0 > 0}, options);
      }
    }
    k0 += kKc;
    a += g.a_block;
  } while (k0 < g.depth);
}

// Multiplies with a column-major A: blocks of kLdm rows, each [depth][lda].
template <class T>
void small_gemm_column_major(const SmallGemm<T>& g) {
  const int64_t W = g.k.lanes, n = padded(g.k, g.n);
  TileOptions options;
  options.lda = g.lda;
  options.ldb = g.ldb;
  const T* a = g.a;
  for (int64_t m0 = 0; m0 < g.m; m0 += kLdm, a += g.a_block) {
    for (int64_t j = 0; j < n; j += 2 * W) {
      const int64_t width = std::min(2 * W, n - j);
      const auto* tiles = g.k.col_a[width > W];
      for (RowTiles t(std::min(kLdm, g.m - m0), width > W ? g.k.mr2 : g.k.mr1); t.next();) {
        tiles[t.height - 1](g.depth, a + t.begin, g.panel(j, 0, width),
                            {g.c + (m0 + t.begin) * g.ldc + j, g.ldc, g.accumulate}, options);
      }
    }
  }
}

}  // namespace moe_ops::cpu
