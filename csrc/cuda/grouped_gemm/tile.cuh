// Tiles in shared memory: their layout, and how they are filled from rows of any alignment.
#pragma once

#include <cstdint>

#include "cuda/row_experts.cuh"

namespace moe_ops::cuda::generic {

// A tile of rows of kCols elements, dense in memory, in chunks of 16 bytes. A chunk's place in its
// row is XORed with bits of the row, so that eight rows at one chunk (what ldmatrix reads) lie in
// different banks. kByElement: for reads of one element in four rows at eight columns, the pattern
// of a tf32 fragment taken from a tile whose rows run along k.
template <class T, int kRowCount, int kCols, bool kByElement = false>
struct Tile {
  static constexpr int kRows = kRowCount;
  static constexpr int kVec = 16 / static_cast<int>(sizeof(T));
  static constexpr int kChunks = kCols / kVec;
  static constexpr int kSize = kRows * kCols;
  static_assert(kChunks == 4 || kChunks % 8 == 0);

  static __device__ int swizzle(int row) {
    if (kByElement) return (row & 3) << 1;
    return kChunks == 4 ? (row >> 1) & 3 : row & 7;
  }
  static __device__ int chunk(int row, int c) { return row * kCols + (c ^ swizzle(row)) * kVec; }
  static __device__ int at(int row, int col) { return chunk(row, col / kVec) + col % kVec; }
};

__device__ inline uint32_t smem_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies sixteen bytes, the first `bytes` of them from src, the rest zero. With 0 bytes src is not
// read.
__device__ inline void copy_async(void* dst, const void* src, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_address(dst)), "l"(src),
               "r"(bytes)
               : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Fills a tile with all threads of the block; each takes one chunk of kPasses rows.
template <class T, class Layout, int kThreads>
struct TileCopy {
  static constexpr int kRowsPerPass = kThreads / Layout::kChunks;
  static constexpr int kPasses = Layout::kRows / kRowsPerPass;
  static_assert(kThreads % Layout::kChunks == 0 && Layout::kRows % kRowsPerPass == 0);

  static __device__ int row(int pass) {
    return static_cast<int>(threadIdx.x) / Layout::kChunks + pass * kRowsPerPass;
  }

  // Copies a tile. source(pass) returns the first element of the row that this thread copies in
  // that pass, or nullptr for a row of zeros. Columns [col, col + tile) of `cols`, zero past the
  // end. aligned: rows start on 16 bytes. base: any address that is valid.
  template <bool kAlwaysAligned, class Source>
  static __device__ void run(T* tile, const Source& source, int col, int cols, bool aligned,
                             const T* base) {
    const int c = static_cast<int>(threadIdx.x) % Layout::kChunks;
    col += c * Layout::kVec;
    const int n = min(max(cols - col, 0), Layout::kVec);
    if (kAlwaysAligned || aligned) {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        const T* src = source(pass);
        const bool there = src != nullptr && n > 0;
        copy_async(tile + Layout::chunk(row(pass), c), there ? src + col : base,
                   there ? n * static_cast<int>(sizeof(T)) : 0);
      }
    } else {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        const T* src = source(pass);
        union {
          T element[Layout::kVec];
          uint4 all;
        } v;
        v.all = make_uint4(0, 0, 0, 0);
        if (src != nullptr) {
#pragma unroll
          for (int i = 0; i < Layout::kVec; ++i) {
            if (i < n) v.element[i] = src[col + i];
          }
        }
        *reinterpret_cast<uint4*>(tile + Layout::chunk(row(pass), c)) = v.all;
      }
    }
  }
};

}  // namespace moe_ops::cuda::generic
