// Tiles of rows in shared memory and the products of a warp, for every element type. The 16-bit
// types multiply on tensor cores (mma.sync m16n8k16, fp32 sums); fp32 and fp64 by fused
// multiply-adds that leave sums in the same places, so that what follows is one text.
#pragma once

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <type_traits>

#include "cuda/grouped_gemm/tile.cuh"
#include "cuda/moa_attention/not_finite.cuh"
#include "cuda/moa_attention/scores.cuh"
#include "cuda/vec.cuh"

namespace moe_ops::cuda::attention {

using generic::commit_copies;
using generic::wait_copies;

// Depth of an mma: head sizes are padded to it with zeros.
constexpr int kStep = 16;

// Returns the pitch of a tile's rows, in elements: 16 bytes more than a multiple of 32, so that
// eight rows at one column lie in different banks.
template <class S>
__host__ __device__ constexpr int pitch_of(int columns) {
  return (columns + kStep - 1) / kStep * kStep + kVector<S>;
}

// Loads rows 0 to kRows - 1 of a tile; source(r) returns the first element of row r, or nullptr for
// zeros. `columns` (of `valid`, zero from there on) are padded to kStep. Aligned rows come by
// cp.async, which the caller commits and waits for.
template <class S, int kRows, int kThreads, class Source>
__device__ void load_tile(S* tile, int pitch, int columns, int valid, bool aligned,
                          const Source& source, const S* base) {
  constexpr int kVec = kVector<S>;
  const int chunks = (columns + kStep - 1) / kStep * (kStep / kVec);
  for (int i = static_cast<int>(threadIdx.x); i < kRows * chunks; i += kThreads) {
    const int r = i / chunks, column = i % chunks * kVec;
    const S* src = source(r);
    S* dst = tile + r * pitch + column;
    const int n = src == nullptr ? 0 : min(max(valid - column, 0), kVec);
    if (aligned) {
      generic::copy_async(dst, n > 0 ? src + column : base, n * static_cast<int>(sizeof(S)));
    } else {
      union {
        S element[kVec];
        uint4 all;
      } v;
      v.all = make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        if (e < n) v.element[e] = src[column + e];
      }
      *reinterpret_cast<uint4*>(dst) = v.all;
    }
  }
}

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }

// ---- 16-bit types ----

template <class S>
using HalfMma = std::conditional_t<std::is_same_v<S, bf16>, cute::SM80_16x8x16_F32BF16BF16F32_TN,
                                   cute::SM80_16x8x16_F32F16F16F32_TN>;

template <class S>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  HalfMma<S>::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2], c[3]);
}

template <bool kTransposed, class S>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const S* row) {
  const auto& p = *reinterpret_cast<const cute::uint128_t*>(row);
  if constexpr (kTransposed) {
    cute::SM75_U16x8_LDSM_T::copy(p, r[0], r[1], r[2], r[3]);
  } else {
    cute::SM75_U32x4_LDSM_N::copy(p, r[0], r[1], r[2], r[3]);
  }
}

template <class S>
__device__ __forceinline__ uint32_t pack_pair(float lo, float hi) {
  S pair[2] = {narrow<S>(lo), narrow<S>(hi)};
  uint32_t out;
  memcpy(&out, pair, 4);
  return out;
}

// Computes c += a b with 16 columns of b in tiles j and j + 1 for each pair, b [k][n] from `row`
// on.
template <class S, int kTiles>
__device__ __forceinline__ void multiply_columns(Fragment<float, kTiles>& c, const uint32_t (&a)[4],
                                                 const S* b, int pitch) {
  const int lane = lane_id();
  const S* row = b + lane % 16 * pitch + lane / 16 * 8;
#pragma unroll
  for (int j = 0; j < kTiles; j += 2) {
    uint32_t f[4];
    load_matrices<true>(f, row + 8 * j);
    mma<S>(c.v[j], a, f[0], f[1]);
    mma<S>(c.v[j + 1], a, f[2], f[3]);
  }
}

template <class S, int kTiles>
struct Products {
  static constexpr bool kHalf = sizeof(S) == 2;
  using T = Accumulate<S>;

  // Computes c = a b^T: a [16][depth], b [8 kTiles][depth].
  static __device__ void rows_by_rows(Fragment<T, kTiles>& c, const S* a, int pitch_a, const S* b,
                                      int pitch_b, int depth) {
    c.clear();
    const int lane = lane_id();
    if constexpr (kHalf) {
      const S* row_a = a + lane % 16 * pitch_a + lane / 16 * 8;
      const S* row_b = b + (lane % 8 + lane / 16 * 8) * pitch_b + lane / 8 % 2 * 8;
#pragma unroll 2
      for (int k = 0; k < depth; k += kStep) {
        uint32_t fa[4], fb[4];
        load_matrices<false>(fa, row_a + k);
#pragma unroll
        for (int j = 0; j < kTiles; j += 2) {
          load_matrices<false>(fb, row_b + 8 * j * pitch_b + k);
          mma<S>(c.v[j], fa, fb[0], fb[1]);
          mma<S>(c.v[j + 1], fa, fb[2], fb[3]);
        }
      }
    } else {
      constexpr int kVec = kVector<S>;
      const S* row_a = a + lane / 4 * pitch_a;
      const S* row_b = b + lane % 4 * 2 * pitch_b;
#pragma unroll 1
      for (int k = 0; k < depth; k += kVec) {
        const Wide<S, kVec> a0 = load_wide<kVec>(row_a + k);
        const Wide<S, kVec> a1 = load_wide<kVec>(row_a + 8 * pitch_a + k);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const Wide<S, kVec> f = load_wide<kVec>(row_b + (8 * j + h) * pitch_b + k);
#pragma unroll
            for (int e = 0; e < kVec; ++e) {
              c.v[j][h] = fma(a0.v[e], f.v[e], c.v[j][h]);
              c.v[j][2 + h] = fma(a1.v[e], f.v[e], c.v[j][2 + h]);
            }
          }
        }
      }
    }
  }

  // Computes c += a b with `a` a fragment of kDepth octets, b [8 kDepth][8 kTiles].
  template <int kDepth>
  static __device__ void fragment_by_columns(Fragment<T, kTiles>& c, const Fragment<T, kDepth>& a,
                                             const S* b, int pitch) {
    if constexpr (kHalf) {
#pragma unroll
      for (int k = 0; k < kDepth; k += 2) {
        const uint32_t fa[4] = {
            pack_pair<S>(a.v[k][0], a.v[k][1]), pack_pair<S>(a.v[k][2], a.v[k][3]),
            pack_pair<S>(a.v[k + 1][0], a.v[k + 1][1]), pack_pair<S>(a.v[k + 1][2], a.v[k + 1][3])};
        multiply_columns<S>(c, fa, b + 8 * k * pitch, pitch);
      }
    } else {
      const S* row = b + lane_id() % 4 * 2;
#pragma unroll
      for (int k = 0; k < 8 * kDepth; ++k) {
        const T a0 = __shfl_sync(kAllLanes, a.v[k / 8][k % 2], k % 8 / 2, 4);
        const T a1 = __shfl_sync(kAllLanes, a.v[k / 8][2 + k % 2], k % 8 / 2, 4);
        add_outer(c, a0, a1, row + k * pitch);
      }
    }
  }

  // Computes c += a^T b: a [depth][16], b [depth][8 kTiles].
  static __device__ void columns_by_columns(Fragment<T, kTiles>& c, const S* a, int pitch_a,
                                            const S* b, int pitch_b, int depth) {
    const int lane = lane_id();
    if constexpr (kHalf) {
      const S* row_a = a + (lane % 8 + lane / 16 * 8) * pitch_a + lane / 8 % 2 * 8;
#pragma unroll 1
      for (int k = 0; k < depth; k += kStep) {
        uint32_t fa[4];
        load_matrices<true>(fa, row_a + k * pitch_a);
        multiply_columns<S>(c, fa, b + k * pitch_b, pitch_b);
      }
    } else {
      const S* row_a = a + lane / 4;
      const S* row_b = b + lane % 4 * 2;
#pragma unroll 1
      for (int k = 0; k < depth; ++k) {
        add_outer(c, row_a[k * pitch_a], row_a[k * pitch_a + 8], row_b + k * pitch_b);
      }
    }
  }

 private:
  static __device__ void add_outer(Fragment<T, kTiles>& c, T a0, T a1, const S* row) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const T f = row[8 * j + h];
        c.v[j][h] = fma(a0, f, c.v[j][h]);
        c.v[j][2 + h] = fma(a1, f, c.v[j][2 + h]);
      }
    }
  }
};

// Returns whether this thread's part of a tile, rows of kColumns elements, has a non-finite
// element.
template <class S, int kRows, int kColumns, int kThreads>
__device__ bool has_not_finite(const S* tile, int pitch) {
  constexpr int kVec = kVector<S>, kChunks = kColumns / kVec;
  bool any = false;
#pragma unroll 2
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kChunks; i += kThreads) {
    const S* from = tile + i / kChunks * pitch + i % kChunks * kVec;
    if constexpr (sizeof(S) == 2) {
      constexpr uint32_t kExponents = std::is_same_v<S, bf16> ? 0x7f807f80u : 0x7c007c00u;
      any |= any_not_finite<kExponents>(*reinterpret_cast<const uint4*>(from));
    } else {
#pragma unroll
      for (int e = 0; e < kVec; ++e) any |= not_finite(from[e]);
    }
  }
  return any;
}
// Calls note(row, column, number) for these numbers, which become zero.
template <class S, int kRows, int kColumns, int kThreads, class Note>
__device__ void set_apart(S* tile, int pitch, const Note& note) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kColumns; i += kThreads) {
    S& at = tile[i / kColumns * pitch + i % kColumns];
    const Accumulate<S> x = widen(at);
    if (!not_finite(x)) continue;
    note(i / kColumns, i % kColumns, x);
    at = narrow<S>(Accumulate<S>(0));
  }
}

// Stores columns `column` + 2 q and the next of a row of `columns` elements.
template <class S, class T>
__device__ __forceinline__ void store_two(S* row, int column, int columns, T v0, T v1) {
  if (columns % 2 == 0 && column + 1 < columns) {
    store_wide(row + column, Wide<S, 2>{{v0, v1}});
  } else {
    if (column < columns) row[column] = narrow<S>(v0);
    if (column + 1 < columns) row[column + 1] = narrow<S>(v1);
  }
}

}  // namespace moe_ops::cuda::attention
