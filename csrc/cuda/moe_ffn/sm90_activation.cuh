// Epilogue of the up projection: bias, activation, and the rows of h and of the pre-activation.
//
// Gate and up of a column of h must meet in one thread. Halves: a tile is kTileN / 2 columns of
// each (kSplitB), so octet j and octet j + kTileN / 16 of the accumulators belong together.
// Interleaved: a thread's two neighbouring columns do. The second kernel serves activations without
// a gate, too.
#pragma once

#include "cuda/grouped_gemm/sm90_epilogue.cuh"
#include "cuda/moe_ffn/fused_act.cuh"

namespace moe_ops::cuda::sm90 {

// 16 bytes of four octets: columns 8 q to 8 q + 7 of `to`, which points to the first of 32 columns.
__device__ inline void store_quad(void* to, uint32_t (&r)[4], bool inside) {
  quad_transpose(r);
  if (inside) *static_cast<uint4*>(to) = make_uint4(r[0], r[1], r[2], r[3]);
}

// The same for values that a quad holds one an octet: r[b] has this thread's value of octet 2b in
// its lower half and of octet 2b + 1 in its upper one; value q of octet j is column 4 j + q.
__device__ inline void store_quad_joint(void* to, uint32_t (&r)[4], bool inside) {
  quad_transpose(r);
  if (!inside) return;
  *static_cast<uint4*>(to) =
      make_uint4(__byte_perm(r[0], r[1], 0x5410), __byte_perm(r[2], r[3], 0x5410),
                 __byte_perm(r[0], r[1], 0x7632), __byte_perm(r[2], r[3], 0x7632));
}

struct ActivateRows {
  struct Params {
    void* h;           // [rows, I]
    void* preact;      // [rows, P], or nullptr
    const void* bias;  // [E, P], or nullptr
    int64_t bias_stride;
    ScaleRows scale;
    FusedAct act;
    int width;  // P
  };

  template <class Config, class Acc>
  __device__ __forceinline__ static void store(const Params& p, const Problem& problem,
                                               const Tile& tile, Acc& acc, int thread) {
    using Element = typename Config::Element;
    // What follows from the thread's number is computed for each tile: kept through the mainloop,
    // it would not leave it enough registers.
    asm volatile("" : "+r"(thread));
    if (tile.k_tiles > 0) {
      if (p.scale.data != nullptr) scale_rows<Config>(p.scale, tile, acc, thread);
      if (p.bias != nullptr)
        add_features<Config>(static_cast<const Element*>(p.bias) + tile.expert * p.bias_stride,
                             tile, problem.n, acc, thread);
    }
    if (p.preact != nullptr) store_preact<Config>(p, problem, tile, acc, thread);
    with_family(p.act.family, [&](auto family) {
      if constexpr (Config::kSplitB) {
        store_h<Config, family.value, true>(p, problem.n, tile, acc, thread);
      } else if (p.act.gated) {
        store_joint_h<Config, family.value>(p, problem.n, tile, acc, thread);
      } else if constexpr (family.value != ActFamily::kSwiglu) {
        store_h<Config, family.value, false>(p, problem.n, tile, acc, thread);
      }
    });
  }

 private:
  // acc += bias. Of halves, column col is feature col and cols + col.
  template <class Config, class Acc>
  __device__ __forceinline__ static void add_features(const typename Config::Element* bias,
                                                      const Tile& tile, int cols, Acc& acc,
                                                      int thread) {
    using T = Traits<Config>;
    constexpr int kHalf = Config::kSplitB ? T::kN / 16 : T::kN / 8;  // octets
#pragma unroll
    for (int j = 0; j < T::kN / 8; ++j) {
      // All loads at once would take registers that the accumulators need.
      if (j % 8 == 0) asm volatile("" ::: "memory");
      const int col = tile.col0 + j % kHalf * 8 + 2 * (thread % 4);
      const auto* at = bias + (j < kHalf ? col : cols + col);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float v = col < cols ? static_cast<float>(at[c]) : 0.f;
#pragma unroll
        for (int m = 0; m < T::kRowsM; ++m) {
          acc(cute::make_coord(c, 0, j), m, 0) += v;
          acc(cute::make_coord(c, 1, j), m, 0) += v;
        }
      }
    }
  }

  // The accumulators as they are. problem.n: I for halves, else P.
  template <class Config, class Acc>
  __device__ __forceinline__ static void store_preact(const Params& p, const Problem& problem,
                                                      const Tile& tile, const Acc& acc,
                                                      int thread) {
    using T = Traits<Config>;
    using Element = typename Config::Element;
    using cute::make_coord;
    constexpr int kParts = Config::kSplitB ? 2 : 1, kGroups = T::kN / 32 / kParts;
#pragma unroll
    for (int m = 0; m < T::kRowsM; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = tile.row0 + output_row<Config>(thread, m) + 8 * i;
        const int col = tile.col0 + 8 * (thread % 4);
        auto* to = static_cast<Element*>(p.preact) + static_cast<int64_t>(row) * p.width + col;
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
#pragma unroll
          for (int g = 0; g < kGroups; ++g) {
            if (tile.col0 + 32 * g >= problem.n) break;
            uint32_t r[4];
#pragma unroll
            for (int b = 0; b < 4; ++b) {
              const int j = (part * kGroups + g) * 4 + b;
              r[b] = pack<Element>(acc(make_coord(0, i, j), m, 0), acc(make_coord(1, i, j), m, 0));
            }
            store_quad(to + part * problem.n + 32 * g, r,
                       row < tile.row_end && col + 32 * g < problem.n);
          }
        }
      }
    }
  }

  // Halves, or no gate: columns of h lie like those of the accumulators.
  template <class Config, ActFamily family, bool gated, class Acc>
  __device__ __forceinline__ static void store_h(const Params& p, int cols, const Tile& tile,
                                                 const Acc& acc, int thread) {
    using T = Traits<Config>;
    using Element = typename Config::Element;
    using cute::make_coord;
    constexpr int kUp = gated ? T::kN / 16 : 0;  // octets from a gate to its up
    constexpr int kGroups = T::kN / 32 / (gated ? 2 : 1);
#pragma unroll
    for (int m = 0; m < T::kRowsM; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = tile.row0 + output_row<Config>(thread, m) + 8 * i;
        const int col = tile.col0 + 8 * (thread % 4);
        auto* to = static_cast<Element*>(p.h) + static_cast<int64_t>(row) * cols + col;
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          if (tile.col0 + 32 * g >= cols) break;
          uint32_t r[4];
#pragma unroll
          for (int b = 0; b < 4; ++b) {
            const int j = 4 * g + b;
            float v[2];
#pragma unroll
            for (int c = 0; c < 2; ++c)
              v[c] = fused_forward<family>(p.act, acc(make_coord(c, i, j), m, 0),
                                           gated ? acc(make_coord(c, i, j + kUp), m, 0) : 0.f);
            r[b] = pack<Element>(v[0], v[1]);
          }
          store_quad(to + 32 * g, r, row < tile.row_end && col + 32 * g < cols);
        }
      }
    }
  }

  // Interleaved: columns 2 f and 2 f + 1 of the accumulators make column f of h.
  template <class Config, ActFamily family, class Acc>
  __device__ __forceinline__ static void store_joint_h(const Params& p, int cols, const Tile& tile,
                                                       const Acc& acc, int thread) {
    using T = Traits<Config>;
    using Element = typename Config::Element;
    using cute::make_coord;
    const int half = cols / 2;
#pragma unroll
    for (int m = 0; m < T::kRowsM; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = tile.row0 + output_row<Config>(thread, m) + 8 * i;
        const int col = tile.col0 / 2 + 8 * (thread % 4);
        auto* to = static_cast<Element*>(p.h) + static_cast<int64_t>(row) * half + col;
#pragma unroll
        for (int g = 0; g < T::kN / 64; ++g) {
          if (tile.col0 + 64 * g >= cols) break;
          uint32_t r[4];
#pragma unroll
          for (int b = 0; b < 4; ++b) {
            float v[2];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              const int j = 8 * g + 2 * b + c;
              v[c] = fused_forward<family>(p.act, acc(make_coord(0, i, j), m, 0),
                                           acc(make_coord(1, i, j), m, 0));
            }
            r[b] = pack<Element>(v[0], v[1]);
          }
          store_quad_joint(to + 32 * g, r, row < tile.row_end && col + 32 * g < half);
        }
      }
    }
  }
};

}  // namespace moe_ops::cuda::sm90
