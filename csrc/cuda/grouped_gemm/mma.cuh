// Products of two tiles in shared memory, one struct an element type. A block's warps form a grid
// of kWarpsM x kWarpsN; each owns (kTileM / kWarpsM) x (kTileN / kWarpsN) sums in registers.
//
// A tile lies [m][k] (kKMajor) or [k][m]; B [n][k] or [k][n].
#pragma once

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <type_traits>

#include "cuda/grouped_gemm/tile.cuh"
#include "cuda/vec.cuh"

namespace moe_ops::cuda::generic {

// Tile sizes and operand layouts of one kernel.
template <class S, int kM, int kN, int kK, int kWM, int kWN, int kStageCount, bool kAKMajorT,
          bool kBKMajorT, bool kAlignedT = false>
struct TileConfig {
  using Element = S;
  using Acc = Accumulate<S>;
  static constexpr int kTileM = kM, kTileN = kN, kTileK = kK;
  static constexpr int kWarpsM = kWM, kWarpsN = kWN, kStages = kStageCount;
  static constexpr int kThreads = 32 * kWM * kWN;
  static constexpr bool kAKMajor = kAKMajorT, kBKMajor = kBKMajorT;
  static constexpr bool kAligned = kAlignedT;  // all rows start on 16 bytes
  static constexpr bool kByElement = std::is_same_v<S, float>;
  using TileA = std::conditional_t<kAKMajor, Tile<S, kM, kK>, Tile<S, kK, kM, kByElement>>;
  using TileB = std::conditional_t<kBKMajor, Tile<S, kN, kK>, Tile<S, kK, kN, kByElement>>;
};

__device__ inline void load_matrices(const void* address, uint32_t (&r)[4], bool transposed) {
  const auto& row = *static_cast<const cute::uint128_t*>(address);
  if (transposed) {
    cute::SM75_U16x8_LDSM_T::copy(row, r[0], r[1], r[2], r[3]);
  } else {
    cute::SM75_U32x4_LDSM_N::copy(row, r[0], r[1], r[2], r[3]);
  }
}

// Parts that the two tensor-core GEMMs share: a warp's place, and ldmatrix of 16 x 32 bytes of A
// and of 16 x 32 bytes of B (two n-tiles). In lane terms: g = lane / 4, t = lane % 4.
template <class Config>
struct WarpTile {
  static constexpr int kMTiles = Config::kTileM / Config::kWarpsM / 16;
  static constexpr int kNTiles = Config::kTileN / Config::kWarpsN / 8;
  static_assert(kNTiles % 2 == 0);
  using S = typename Config::Element;

  int lane = static_cast<int>(threadIdx.x) % 32;
  int warp_m = static_cast<int>(threadIdx.x) / 32 / Config::kWarpsN * (16 * kMTiles);
  int warp_n = static_cast<int>(threadIdx.x) / 32 % Config::kWarpsN * (8 * kNTiles);

  // Rows i < kRows and column pairs j < kPairs of the sums that this thread owns.
  static constexpr int kRows = 2 * kMTiles, kPairs = kNTiles;
  __device__ int row(int i) const { return warp_m + i / 2 * 16 + i % 2 * 8 + lane / 4; }
  __device__ int col(int j) const { return warp_n + j * 8 + lane % 4 * 2; }

  // Loads four matrices of A, (m 0-7, 8-15) x (first, second half of k). step: in chunks of 32
  // bytes.
  __device__ void load_a(const S* tile, int mt, int step, uint32_t (&r)[4]) const {
    using TileA = typename Config::TileA;
    const int m = warp_m + mt * 16;
    const S* p = Config::kAKMajor ? tile + TileA::chunk(m + lane % 16, 2 * step + lane / 16)
                                  : tile + TileA::chunk(16 * step + lane % 8 + lane / 16 * 8,
                                                        m / 8 + lane / 8 % 2);
    load_matrices(p, r, !Config::kAKMajor);
  }
  // Loads four matrices of B: (n 0-7, 8-15) x (first, second half of k).
  __device__ void load_b(const S* tile, int pair, int step, uint32_t (&r)[4]) const {
    using TileB = typename Config::TileB;
    const int n = warp_n + pair * 16;
    const S* p = Config::kBKMajor
                     ? tile + TileB::chunk(n + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2)
                     : tile + TileB::chunk(16 * step + lane % 16, n / 8 + lane / 16);
    load_matrices(p, r, !Config::kBKMajor);
  }
};

// bfloat16 and float16: mma.sync m16n8k16, fp32 sums.
template <class Config>
struct HalfProduct : WarpTile<Config> {
  using Warp = WarpTile<Config>;
  using S = typename Config::Element;
  using Mma = std::conditional_t<std::is_same_v<S, bf16>, cute::SM80_16x8x16_F32BF16BF16F32_TN,
                                 cute::SM80_16x8x16_F32F16F16F32_TN>;
  using Warp::kMTiles, Warp::kNTiles;
  float acc[kMTiles][kNTiles][4];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kMTiles * kNTiles * 4; ++i) (&acc[0][0][0])[i] = 0;
  }

  // Operands of 16 of k.
  static constexpr int kFragments = Config::kTileK / 16;
  struct Fragments {
    uint32_t a[kMTiles][4], b[kNTiles / 2][4];
  };

  // Reads the fragments of a step. scale: one factor for each k of the tile, or nullptr; factor * b
  // is rounded to the element type.
  __device__ void read(Fragments& f, const S* a, const S* b, int step, const float* scale) const {
#pragma unroll
    for (int i = 0; i < kMTiles; ++i) this->load_a(a, i, step, f.a[i]);
#pragma unroll
    for (int j = 0; j < kNTiles / 2; ++j) this->load_b(b, j, step, f.b[j]);
    if (scale != nullptr) {
      const float* s = scale + 16 * step + 2 * (this->lane % 4);
#pragma unroll
      for (int j = 0; j < kNTiles / 2; ++j) {
#pragma unroll
        for (int h = 0; h < 4; ++h) {
          S pair[2];
          memcpy(pair, &f.b[j][h], 4);
          pair[0] = narrow<S>(widen(pair[0]) * s[h % 2 * 8]);
          pair[1] = narrow<S>(widen(pair[1]) * s[h % 2 * 8 + 1]);
          memcpy(&f.b[j][h], pair, 4);
        }
      }
    }
  }

  __device__ void add(const Fragments& f) {
#pragma unroll
    for (int i = 0; i < kMTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kNTiles; ++j) {
        float (&c)[4] = acc[i][j];
        const uint32_t* b = &f.b[j / 2][j % 2 * 2];
        Mma::fma(c[0], c[1], c[2], c[3], f.a[i][0], f.a[i][1], f.a[i][2], f.a[i][3], b[0], b[1],
                 c[0], c[1], c[2], c[3]);
      }
    }
  }

  __device__ void multiply(const S* a, const S* b, const float* scale) {
#pragma unroll
    for (int step = 0; step < kFragments; ++step) {
      Fragments f;
      read(f, a, b, step, scale);
      add(f);
    }
  }

  __device__ float value(int i, int j, int h) const { return acc[i / 2][j][i % 2 * 2 + h]; }
};

// float32 on the tf32 tensor cores. Each operand is split into big + small, 11 bits each, so that
// big * big + (big * small + small * big) misses little more than small * small: 2^-22 of the
// product. The corrections have sums of their own: big * big alone has exactly the infinities and
// NaNs of the product, while inf * small would be NaN where small is zero.
template <class Config>
struct Float32Product : WarpTile<Config> {
  using Warp = WarpTile<Config>;
  using Mma = cute::SM80_16x8x8_F32TF32TF32F32_TN;
  using Warp::kMTiles, Warp::kNTiles;
  float acc[kMTiles][kNTiles][4];
  float corrections[kMTiles][kNTiles][4];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kMTiles * kNTiles * 4; ++i) {
      (&acc[0][0][0])[i] = 0;
      (&corrections[0][0][0])[i] = 0;
    }
  }

  static __device__ uint32_t to_tf32(float v) {
    uint32_t r;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(v));
    return r;
  }
  static __device__ void split(float v, uint32_t& big, uint32_t& small) {
    big = to_tf32(v);
    // Rounding up must not make infinities of the largest numbers.
    const bool round = (big & 0x7fffffffu) != 0x7f800000u;
    if (!round) big = __float_as_uint(v) & 0xffffe000u;
    const float rest = v - __uint_as_float(big);
    small = round ? to_tf32(rest) : __float_as_uint(rest) & 0xffffe000u;
  }

  __device__ void multiply(const float* a, const float* b, const float* scale) {
    const int t = this->lane % 4, g = this->lane / 4;
#pragma unroll
    for (int step = 0; step < Config::kTileK / 8; ++step) {
      uint32_t raw[4], a_big[kMTiles][4], a_small[kMTiles][4];
#pragma unroll
      for (int i = 0; i < kMTiles; ++i) {
        if constexpr (Config::kAKMajor) {
          this->load_a(a, i, step, raw);
        } else {
#pragma unroll
          for (int h = 0; h < 4; ++h) {
            raw[h] = __float_as_uint(a[Config::TileA::at(8 * step + t + h / 2 * 4,
                                                         this->warp_m + i * 16 + g + h % 2 * 8)]);
          }
        }
#pragma unroll
        for (int h = 0; h < 4; ++h) split(__uint_as_float(raw[h]), a_big[i][h], a_small[i][h]);
      }
#pragma unroll
      for (int j = 0; j < kNTiles / 2; ++j) {
        uint32_t b_big[4], b_small[4];
        if constexpr (Config::kBKMajor) {
          this->load_b(b, j, step, raw);
        } else {
#pragma unroll
          for (int h = 0; h < 4; ++h) {
            raw[h] = __float_as_uint(b[Config::TileB::at(8 * step + t + h % 2 * 4,
                                                         this->warp_n + j * 16 + g + h / 2 * 8)]);
          }
        }
#pragma unroll
        for (int h = 0; h < 4; ++h) {
          float v = __uint_as_float(raw[h]);
          if (scale != nullptr) v *= scale[8 * step + t + h % 2 * 4];
          split(v, b_big[h], b_small[h]);
        }
#pragma unroll
        for (int i = 0; i < kMTiles; ++i) {
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            fma(corrections[i][2 * j + n], a_small[i], b_big + 2 * n);
            fma(corrections[i][2 * j + n], a_big[i], b_small + 2 * n);
            fma(acc[i][2 * j + n], a_big[i], b_big + 2 * n);
          }
        }
      }
    }
  }

  static __device__ void fma(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
    Mma::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], c[2], c[3]);
  }

  __device__ float value(int i, int j, int h) const {
    const float v = acc[i / 2][j][i % 2 * 2 + h];
    return isfinite(v) ? v + corrections[i / 2][j][i % 2 * 2 + h] : v;
  }
};

// float64: a 4 x 8 block of sums a thread, fused multiply-adds.
template <class Config>
struct Float64Product {
  static_assert(Config::kTileM == 64 && Config::kTileN == 64 && Config::kThreads == 128);
  static constexpr int kRows = 4, kPairs = 4;
  int tx = static_cast<int>(threadIdx.x) % 8, ty = static_cast<int>(threadIdx.x) / 8;
  double acc[kRows][2 * kPairs];

  __device__ int row(int i) const { return ty + 16 * i; }
  __device__ int col(int j) const { return 2 * tx + 16 * j; }

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kRows * 2 * kPairs; ++i) (&acc[0][0])[i] = 0;
  }

  __device__ void multiply(const double* a, const double* b, const double* scale) {
    using TileA = typename Config::TileA;
    using TileB = typename Config::TileB;
#pragma unroll 2
    for (int k = 0; k < Config::kTileK; ++k) {
      double fa[kRows], fb[2 * kPairs];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        fa[i] = a[Config::kAKMajor ? TileA::at(row(i), k) : TileA::at(k, row(i))];
        if (scale != nullptr) fa[i] *= scale[k];
      }
#pragma unroll
      for (int j = 0; j < 2 * kPairs; ++j) {
        const int n = col(j / 2) + j % 2;
        fb[j] = b[Config::kBKMajor ? TileB::at(n, k) : TileB::at(k, n)];
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < 2 * kPairs; ++j) acc[i][j] = fma(fa[i], fb[j], acc[i][j]);
      }
    }
  }

  __device__ double value(int i, int j, int h) const { return acc[i][2 * j + h]; }
};

template <class Config>
using Product =
    std::conditional_t<std::is_same_v<typename Config::Element, double>, Float64Product<Config>,
                       std::conditional_t<std::is_same_v<typename Config::Element, float>,
                                          Float32Product<Config>, HalfProduct<Config>>>;

}  // namespace moe_ops::cuda::generic
