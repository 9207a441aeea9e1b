// Epilogue of the up projection: bias, activation, and the rows of h and of the pre-activation.
//
// Gate and up of a column of h must meet in one thread. Halves: a tile is kTileN / 2 columns of
// each (kSplitB), so octet j and octet j + kTileN / 16 of the accumulators belong together.
// Interleaved: a thread's two neighboring columns do. The second kernel serves activations without
// a gate, too.
#pragma once

#include "cuda/grouped_gemm/sm90_epilogue.cuh"
#include "cuda/moe_ffn/fused_act.cuh"

namespace moe_ops::cuda::sm90 {

struct ActivateRows {
  struct Params {
    CUtensorMap map_h;          // [rows, I]
    CUtensorMap map_preact[2];  // [rows, P]; of halves its first and its last I columns
    bool preact;                // whether it is stored
    const void* bias;           // [E, P], or nullptr
    int64_t bias_stride;
    ScaleRows scale;
    FusedAct act;
  };

  template <class Config, class Acc>
  __device__ __forceinline__ static void store(const Params& p, const Problem& problem,
                                               const Tile& tile, Acc& acc, int thread,
                                               unsigned char* boxes) {
    using Element = typename Config::Element;
    // Values that depend on the thread index are recomputed for each tile: kept through the
    // mainloop, they would leave it too few registers.
    asm volatile("" : "+r"(thread));
    if (tile.k_tiles > 0) {
      if (p.scale.data != nullptr) scale_rows<Config>(p.scale, tile, acc, thread);
      if (p.bias != nullptr)
        add_features<Config>(static_cast<const Element*>(p.bias) + tile.expert * p.bias_stride,
                             tile, problem.n, acc, thread);
    }
    with_family(p.act.family, [&](auto family) {
      if (p.act.gated) {
        store_rows<Config, family.value, true>(p, problem.n, tile, acc, thread, boxes);
      } else if constexpr (!Config::kSplitB && family.value != ActFamily::kSwiglu) {
        store_rows<Config, family.value, false>(p, problem.n, tile, acc, thread, boxes);
      }
    });
  }

 private:
  // Computes acc += bias. With gate and up in halves, column col is features col and cols + col.
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

  // Stores the warp's 16 rows of the pre-activation, from the accumulators, and of h; cols:
  // problem.n, I for halves, else P. 64 columns of h are 64 of gate and of up, or 128 interleaved
  // ones.
  template <class Config, ActFamily family, bool gated, class Acc>
  __device__ __forceinline__ static void store_rows(const Params& p, int cols, const Tile& tile,
                                                    const Acc& acc, int thread,
                                                    unsigned char* boxes) {
    using T = Traits<Config>;
    constexpr bool kJoint = gated && !Config::kSplitB;
    constexpr int kGroups = T::kN / 64 / (gated ? 2 : 1);  // of 64 columns of h
    constexpr int kUp = Config::kSplitB ? T::kN / 16 : 8;  // octets from a group's first box
#pragma unroll
    for (int m = 0; m < T::kRowsM; ++m) {
      StoreBoxes box(boxes, tile.row0 + box_row<Config>(thread, m), tile.row_end);
      if (box.empty()) break;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const int first = g * (kJoint ? 16 : 8);  // octet
        const int col = tile.col0 + 8 * first;
        if (col >= cols) break;
        if (p.preact) {
          store_octets<Config>(box, p.map_preact[0], col, cols, acc, m, first);
          if (Config::kSplitB) {
            store_octets<Config>(box, p.map_preact[1], col, cols, acc, m, first + kUp);
          } else if (kJoint && col + 64 < cols) {
            store_octets<Config>(box, p.map_preact[0], col + 64, cols, acc, m, first + kUp);
          }
        }
        constexpr int kJoined = kJoint ? 2 : 1;  // accumulators of a column
        box.store<kJoint ? Halves::kApart : Halves::kPairs>(
            p.map_h, col / kJoined, (cols - col) / kJoined, [&](int i, int j) {
              return activate<Config, family, gated>(p.act, acc, m, i, first + kJoined * j);
            });
      }
    }
  }

  // Octets `first` to `first` + 7 of the accumulators.
  template <class Config, class Acc>
  __device__ __forceinline__ static void store_octets(StoreBoxes& box, const CUtensorMap& map,
                                                      int col, int cols, const Acc& acc, int m,
                                                      int first) {
    box.store<Halves::kPairs>(map, col, cols - col, [&](int i, int j) {
      return pack<typename Config::Element>(acc(cute::make_coord(0, i, first + j), m, 0),
                                            acc(cute::make_coord(1, i, first + j), m, 0));
    });
  }

  // Returns two columns of h in one word. With halves, or without a gate, they come from octet j
  // and, with a gate, its up; interleaved, one column each from octets j and j + 1.
  template <class Config, ActFamily family, bool gated, class Acc>
  __device__ __forceinline__ static uint32_t activate(const FusedAct& act, const Acc& acc, int m,
                                                      int i, int j) {
    using cute::make_coord;
    constexpr int kUp = Traits<Config>::kN / 16;  // octets from a gate to its up
    float gate[2], up[2] = {0.f, 0.f};
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      if constexpr (!gated || Config::kSplitB) {
        gate[c] = acc(make_coord(c, i, j), m, 0);
        if constexpr (gated) up[c] = acc(make_coord(c, i, j + kUp), m, 0);
      } else {
        gate[c] = acc(make_coord(0, i, j + c), m, 0);
        up[c] = acc(make_coord(1, i, j + c), m, 0);
      }
    }
    return pack<typename Config::Element>(fused_forward<family, true>(act, gate[0], up[0]),
                                          fused_forward<family, true>(act, gate[1], up[1]));
  }
};

}  // namespace moe_ops::cuda::sm90
