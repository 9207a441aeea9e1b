// Results of 16 bits on their way to memory: through shared memory, by TMA.
//
// A warp writes its 16 rows of a tile, 128 bytes of each at a time, into a box of lines with the
// 128-byte swizzle (no bank conflicts); then one lane has TMA store the box. The warp has two: one
// is filled while the other is read, and the last ones are read during the next tile's products. It
// waits for no other warp.
//
// A box is stored whole but for what lies outside the tensor, and rows past the end of a group are
// the next one's. So the tensor has two coordinates for rows (rows_to_store() in tensor_map.h).
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "cuda/grouped_gemm/sm90_config.cuh"
#include "cuda/grouped_gemm/tensor_map.h"

namespace moe_ops::cuda::sm90 {

// Where the halves of words lie in a group of eight 16-bit columns, those of lane q of a quad.
// kPairs: columns 2 q and 2 q + 1, as in accumulators. kApart: columns q and q + 4.
enum class Halves { kPairs, kApart };

class StoreBoxes {
 public:
  // `boxes`: the warp's own boxes, at a multiple of 1024 bytes. Stores rows `row` to `row` + 15 of
  // the tensor, as far as they are below `end`.
  __device__ StoreBoxes(unsigned char* boxes, int row, int end)
      // The shuffle makes the row uniform, without which ptxas keeps the loop over tiles out of
      // uniform registers.
      : boxes_(boxes), row_(__shfl_sync(~0u, row, 0)), rows_(min(kStoreRows, end - row_)) {
    // The boxes of the last tile have been read by now.
    wait<0>();
  }

  // Returns whether there are no rows to store; uniform over all lanes.
  __device__ bool empty() const { return rows_ <= 0; }

  // Stores columns of 16 bits from `col` on, 64 or the `columns` that there are. word(i, j): this
  // lane's word of group j of eight columns, of row r + 8 i of the box; lanes are 4 r + q.
  template <Halves halves, class Word>
  __device__ __forceinline__ void store(const CUtensorMap& map, int col, int columns,
                                        const Word& word) {
    wait<1>();
    unsigned char* const box = boxes_ + next_;
    write<halves>(box, 0, word);
    // ptxas moves no arithmetic across a branch; that of all words would not fit the registers.
    if (columns > 32) {
      write<halves>(box, 4, word);
    } else {
      write<Halves::kPairs>(box, 4, [](int, int) { return 0u; });
    }
    // Written through the generic proxy, read through the asynchronous one.
    cute::tma_store_fence();
    __syncwarp();
    if (lane() == 0) {
      cute::SM90_TMA_STORE_3D::copy(&map, box, col, kStoreRows - rows_, row_ + rows_);
      cute::tma_store_arrive();
    }
    next_ ^= kStoreBoxBytes;
  }

  // Waits before the block ends, since its shared memory is read until then.
  __device__ static void finish() { wait<0>(); }

 private:
  __device__ static int lane() { return static_cast<int>(threadIdx.x) % kWarp; }

  // Waits until at most `count` of the warp's boxes are still to be read.
  template <int count>
  __device__ static void wait() {
    if (lane() == 0) cute::tma_store_wait<count>();
    __syncwarp();
  }

  // Groups `first` to `first` + 3.
  template <Halves halves, class Word>
  __device__ __forceinline__ static void write(unsigned char* box, int first, const Word& word) {
    if constexpr (halves == Halves::kPairs) {
      // stmatrix: lane l gives the place of row l % 8 of matrix l / 8, of four 8 x 8 matrices: the
      // upper and lower rows of two groups.
      const int row = lane() % 16, group = lane() / 16;
      const uint32_t at =
          cute::cast_smem_ptr_to_uint(box) + row * kSwizzleBytes + (group ^ row % 8) * 16;
#pragma unroll
      for (int j = first; j < first + 4; j += 2) {
        const uint32_t w[4] = {word(0, j), word(1, j), word(0, j + 1), word(1, j + 1)};
        asm volatile(
            "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at ^ j * 16),
            "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])
            : "memory");
      }
    } else {
      // Lanes q and q ^ 1 exchange halves, so that lane q has columns 4 (q % 2) + q / 2 * 2 and
      // the next.
      const int row = lane() / 4, odd = lane() % 2, pair = 2 * odd + lane() % 4 / 2;
#pragma unroll
      for (int j = first; j < first + 4; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t own = word(i, j), other = __shfl_xor_sync(~0u, own, 1);
          const uint32_t w = __byte_perm(own, other, odd ? 0x3276 : 0x5410);
          unsigned char* at = box + (row + 8 * i) * kSwizzleBytes + (j ^ row) * 16 + 4 * pair;
          *reinterpret_cast<uint32_t*>(at) = w;
        }
      }
    }
  }

  unsigned char* boxes_;
  int next_ = 0;  // bytes to the one that is filled next
  int row_, rows_;
};

}  // namespace moe_ops::cuda::sm90
