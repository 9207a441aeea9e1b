// Infinity and NaN in a tile that not all rows see.
//
// A product of tiles multiplies what a row does not see by zero, which infinity and NaN survive. So
// a tile that some row does not see all of is searched for them before it is multiplied. They
// become zero, and the numbers of the result that they are a part of are noted in shared memory and
// made infinite or NaN at the end: no register is kept for a case that hardly comes.
#pragma once

#include <cstdint>

#include "cuda/moa_attention/scores.cuh"

namespace moe_ops::cuda::attention {

template <class T>
__device__ __forceinline__ bool not_finite(T x) {
  return x * T(0) != T(0);
}

// Returns whether any element of 16 bytes is not finite; kExponents: the exponent bits of two
// elements of 16 bits, all ones if not finite.
template <uint32_t kExponents>
__device__ __forceinline__ bool any_not_finite(const uint4& v) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  uint32_t finite = 0x80008000u;  // by halves: a bit of the exponent that is zero carries up here
#pragma unroll
  for (int i = 0; i < 4; ++i) finite &= (~words[i] & kExponents) + 0x7fff7fffu;
  return finite != 0x80008000u;
}

// In shared memory: which numbers of a result [kLines][kColumns] have a part that is no number
// below infinity (`high`), none above minus infinity (`low`), or is NaN (both).
template <int kLines, int kColumns>
struct NotFinite {
  static constexpr int kWords = (kColumns + 31) / 32;
  uint32_t high[kLines * kWords], low[kLines * kWords];
  uint32_t any;

  // Clears the notes; a barrier has to follow.
  __device__ void clear(int thread, int threads) {
    for (int i = thread; i < kLines * kWords; i += threads) high[i] = low[i] = 0;
    if (thread == 0) any = 0;
  }
  template <class T>
  __device__ void note(int line, int column, T x) {
    const int word = line * kWords + column / 32;
    const uint32_t bit = 1u << column % 32;
    if (!(x < T(0))) atomicOr(&high[word], bit);
    if (!(x > T(0))) atomicOr(&low[word], bit);
    atomicOr(&any, 1u);
  }
  // Adds the notes to a fragment. `line`: the thread's first row; the other one is eight lines
  // further.
  template <class T, int kTiles>
  __device__ void add_to(Fragment<T, kTiles>& f, int line) const {
    if (any == 0) return;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int column = 8 * j + static_cast<int>(threadIdx.x) % 4 * 2 + e % 2;
        const int word = (line + e / 2 * 8) * kWords + column / 32;
        if (high[word] >> column % 32 & 1) f.v[j][e] += T(INFINITY);
        if (low[word] >> column % 32 & 1) f.v[j][e] -= T(INFINITY);
      }
    }
  }
};

// In shared memory: the keys of a tile that each of kRows rows sees.
template <int kRows>
struct Sight {
  int first[kRows], last[kRows];

  // Stores the ranges of this thread's rows, the first at `row`; a barrier has to follow.
  __device__ void keep(const Mask& mask, int row) {
    if (threadIdx.x % 4 != 0) return;  // the lane whose columns are those of the tile
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      first[row + 8 * i] = mask.first[i];
      last[row + 8 * i] = mask.last[i];
    }
  }
  // Notes an element of a key for all rows that see the key.
  template <class Notes, class T>
  __device__ void note_key(Notes& notes, int key, int column, T x) const {
#pragma unroll 1
    for (int r = 0; r < kRows; ++r) {
      if (key >= first[r] && key < last[r]) notes.note(r, column, x);
    }
  }
  // Notes an element of a row for all of kKeys keys that the row sees.
  template <int kKeys, class Notes, class T>
  __device__ void note_row(Notes& notes, int row, int column, T x) const {
#pragma unroll 1
    for (int j = max(first[row], 0); j < min(last[row], kKeys); ++j) notes.note(j, column, x);
  }
};

}  // namespace moe_ops::cuda::attention
