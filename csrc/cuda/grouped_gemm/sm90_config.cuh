// Configuration of one grouped GEMM kernel for sm_90a, and the traits derived from it.
//
// A config is a struct that inherits GemmDefaults and overrides what differs. Letters as in BLAS:
// every tile is M x N with a sum over K.
//   ragged M (kRaggedK = false): out[rows of expert e, N] = A[rows of expert e, K] * B[e][N, K]^T
//   ragged K (kRaggedK = true):  out[e][M, N] = A[rows of expert e, M]^T * B[rows of expert e, N]
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/numeric_types.h>

#include <cute/tensor.hpp>

#include "cuda/grouped_gemm/tensor_map.h"

namespace moe_ops::cuda::sm90 {

enum class Source { kTma, kGather };
enum class Schedule { kCooperative, kPingpong };
enum class Major { kK, kMN, kEither };

struct GemmDefaults {
  using Element = cutlass::bfloat16_t;  // of A and B
  using Output = cutlass::bfloat16_t;   // of out, unless it is fp32, and of the bias
  static constexpr int kTileM = 128;
  static constexpr int kTileN = 128;
  static constexpr int kTileK = 64;
  // Consumer warpgroups. Cooperative: they share a tile, 64 rows each at a time. Ping-pong: each
  // takes every second tile, so that one stores while the other multiplies.
  static constexpr int kConsumers = 2;
  static constexpr Schedule kSchedule = Schedule::kCooperative;
  // Blocks of a cluster: row tiles of one expert, side by side, that share every tile of B. The
  // last row tile of an odd number is both blocks', which take other columns of it.
  static constexpr int kCluster = 1;
  // kGather: row r of the operand is row index[r] of the source, copied by the producer's four
  // warps. B only with kRaggedK.
  static constexpr Source kSourceA = Source::kTma;
  static constexpr Source kSourceB = Source::kTma;
  // kMN: the tensor is dense along M (or N), as in dgrad (B) and wgrad (A and B). kEither, of B
  // alone: KernelParams says which. The kernel then has two mainloops and one epilogue, which is
  // most of its code.
  static constexpr Major kMajorA = Major::kK;
  static constexpr Major kMajorB = Major::kK;
  // The N of a tile is two boxes of kTileN / 2 rows of B, the second `split_offset` rows further
  // on: columns j and j + kTileN / 2 of the tile lie in the same thread's accumulators.
  static constexpr bool kSplitB = false;
  static constexpr bool kRaggedK = false;
  // With kRaggedK: the sum runs over the columns of an expert's groups (moe_ops/quantize_fp8.h).
  static constexpr bool kFp8Groups = false;
  // Rows of a box of A, kMajorA = kK. Only boxes with rows of the group are loaded: with one row of
  // 64, a tile would otherwise read as many bytes of A as of B.
  static constexpr int kBoxM = 64;
  // 0: as many as fit.
  static constexpr int kStages = 0;
  // Row tiles walked before the next column tile: with 128 x 256 tiles a wave of 132 blocks covers
  // about 16 x 8 tiles, which reads the fewest bytes of A and B together.
  static constexpr int kRasterM = 16;
  // The epilogue stores through shared memory (sm90_store_boxes.cuh): where it is not hidden behind
  // the products of another warpgroup. Takes 16 or 32 KiB from the stages.
  static constexpr bool kStoreBoxes = false;
};

constexpr int kWarpgroup = 128;
constexpr int kWarp = 32;
constexpr int kSwizzleBytes = 128;    // every operand tile is stored in lines of 128 swizzled bytes
constexpr int kOrderedExperts = 512;  // ragged K: with more, they are taken as they come

template <class Config>
struct Traits {
  using Element = typename Config::Element;
  using Output = typename Config::Output;
  static constexpr int kM = Config::kTileM, kN = Config::kTileN, kK = Config::kTileK;
  static constexpr int kConsumers = Config::kConsumers;
  static constexpr int kCluster = Config::kCluster;
  static constexpr bool kPingpong = Config::kSchedule == Schedule::kPingpong;
  static constexpr bool kGatherA = Config::kSourceA == Source::kGather;
  static constexpr bool kGatherB = Config::kSourceB == Source::kGather;
  static constexpr bool kGather = kGatherA || kGatherB;
  static constexpr int kThreads = kWarpgroup * (1 + kConsumers);
  // Warpgroups that work on one tile.
  static constexpr int kTileGroups = kPingpong ? 1 : kConsumers;

  static constexpr int kSpan =
      kSwizzleBytes / static_cast<int>(sizeof(Element));  // elements a line
  static constexpr int kStageBytesA = kM * kK * sizeof(Element);
  static constexpr int kStageBytesB = kN * kK * sizeof(Element);
  static constexpr int kStageBytes = kStageBytesA + kStageBytesB;
  // Two boxes for each of the consumers' warps.
  static constexpr int kBoxBytes =
      Config::kStoreBoxes ? kConsumers * (kWarpgroup / kWarp) * 2 * kStoreBoxBytes : 0;
  // 227 KiB a block, less room for barriers.
  static constexpr int kMaxStages = (227 * 1024 - 1024 - kBoxBytes) / kStageBytes;
  static constexpr int kStages =
      Config::kStages > 0 ? Config::kStages : (kMaxStages < 8 ? kMaxStages : 8);

  static_assert(kM % (64 * kTileGroups) == 0, "a warpgroup multiplies 64 rows at a time");
  static_assert(kN % 32 == 0 && kN <= 256, "columns of a wgmma, and four octets a quad");
  static_assert(kM % Config::kBoxM == 0 && Config::kBoxM % 8 == 0, "boxes keep the swizzle");
  static_assert(kK % kSpan == 0, "a stage is whole lines");
  static_assert(!kPingpong || kConsumers == 2, "ping-pong has two consumers");
  static_assert(kStages >= 2 && kStages <= kMaxStages);
  static_assert(kCluster == 1 || kCluster == 2);
  static_assert(!kGatherA || (Config::kMajorA == Major::kMN) == Config::kRaggedK,
                "gathered rows are dense along K, or along M if they are what is summed");
  static_assert(!kGatherB || (Config::kRaggedK && kCluster == 1));
  static_assert(!Config::kStoreBoxes || kN % 64 == 0, "boxes of 64 columns");
  static_assert(!Config::kSplitB || kN % (2 * kSpan) == 0, "halves of B are whole boxes");
  static_assert(Config::kMajorA != Major::kEither);

  // The element of shared memory that holds (row, k) of a stage: lines of 128 bytes along the
  // dense side, line after line along the other, then the next 128 bytes of the dense side. This
  // is what a TMA box of 128 bytes x lines writes.
  template <Major major>
  using Atom = cute::conditional_t<major == Major::kK, cute::GMMA::Layout_K_SW128_Atom<Element>,
                                   cute::GMMA::Layout_MN_SW128_Atom<Element>>;
  template <Major major>
  using Order = cute::conditional_t<major == Major::kK, cute::Step<cute::_1, cute::_2, cute::_3>,
                                    cute::Step<cute::_2, cute::_1, cute::_3>>;
  template <Major major, int lines>
  using Layout = decltype(cute::tile_to_shape(
      Atom<major>{}, cute::Shape<cute::Int<lines>, cute::Int<kK>, cute::Int<kStages>>{},
      Order<major>{}));

  template <Major major>
  static constexpr cute::GMMA::Major kGmma =
      major == Major::kK ? cute::GMMA::Major::K : cute::GMMA::Major::MN;
  template <Major a, Major b>
  using Mma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<
          Element, Element, float,
          cute::Shape<cute::Int<64 * kTileGroups>, cute::Int<kN>, cute::Int<kK>>, kGmma<a>,
          kGmma<b>>(),
      cute::Layout<cute::Shape<cute::Int<kTileGroups>, cute::_1, cute::_1>>{}));

  // Layouts of the config; the accumulators do not depend on the layout of the operands.
  using LayoutA = Layout<Config::kMajorA, kM>;
  using LayoutB = Layout<Config::kMajorB, kN>;
  using TiledMma = Mma<Config::kMajorA, Config::kMajorB>;
  static constexpr int kRowsM = kM / (64 * kTileGroups);  // 64-row blocks of a warpgroup

  // Boxes of TMA: kSpan elements of the dense side times lines of the other.
  static constexpr int kLinesA = Config::kMajorA == Major::kK ? Config::kBoxM : kK;
  static constexpr int lines_b(Major major) {
    return major == Major::kK ? kN / (Config::kSplitB ? 2 : kCluster) : kK;
  }

  struct SharedStorage {
    alignas(1024) Element a[kStages * kM * kK];
    alignas(1024) Element b[kStages * kN * kK];
    alignas(16) unsigned char boxes[kBoxBytes > 0 ? kBoxBytes : 1];  // 1024-byte aligned, as b is
    alignas(8) cutlass::arch::ClusterTransactionBarrier full[kStages];
    cutlass::arch::ClusterBarrier empty[kStages];
    cutlass::arch::ClusterBarrier
        mma_order[2];  // order of the consumers' mainloops in ping-pong kernels
    uint16_t order[Config::kRaggedK ? kOrderedExperts : 1];  // experts, most rows first
  };
  static constexpr int kSharedBytes = sizeof(SharedStorage);
  static_assert(kSharedBytes <= 227 * 1024);
};

// One tile of the output as its block sees it.
struct Tile {
  int expert;         // E: rows past the last expert, which come out zero
  int row0, row_end;  // first row of the tile, and the end of the rows that may be stored
  int col0;           // first column
  int k0, k_size;     // ragged K: first row of the sum and their number; else 0 and K
  int k_tiles;        // stages to consume; 0: the tile is zero
  bool shares_b;      // the blocks of the cluster work on the same columns
};

// Sizes that the host knows and the offsets that it does not.
struct Problem {
  const int32_t* expert_offsets;  // [E+1] on the device
  int num_experts;                // E
  int rows;                       // rows of the ragged side, an upper bound of expert_offsets[E]
  int m;                          // ragged K: rows of out[e]
  int n;                          // columns of out; with kSplitB of each half
  int k;                          // ragged M: length of the sum
  bool zero_tail;                 // ragged M: rows from expert_offsets[E] on become zero, or stay
};

}  // namespace moe_ops::cuda::sm90
