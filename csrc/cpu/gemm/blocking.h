// Sizes at which kernels change what they do: those of kernels that are one file, and all of them
// as a table. tests/sweep calls every op on both sides of each entry.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/isa/isa.h"

namespace moe_ops::cpu {

// all_experts_ffn: tokens of a block, the depth of the weight gradients' tiles. Whole tiles with
// AVX2.
constexpr int64_t kDenseTokens = 144;
// Parts of the tokens that sum weight gradients by themselves, of at least so many blocks each;
// they are added in order, so that the bits do not depend on threads.
constexpr int64_t kDenseMostParts = 8;
constexpr int64_t kDensePartBlocks = 4;

// mix_expert_outputs: tokens whose sums are made before they are added to those of a part: sums of
// T terms in two levels. Their outputs stay in L2 between the two passes of the variance.
constexpr int64_t kMixTokens = 64;
// Parts of the tokens that sum by themselves, of at least so many blocks, and are added in order,
// so that the bits do not depend on threads.
constexpr int64_t kMixMostParts = 16;
constexpr int64_t kMixPartBlocks = 4;

// router_linear: most tokens that are made float rows, and parts of whole vectors, together; as
// many as fit an L1.
constexpr int64_t kRouterLinearRows = 64;

// expert_choice_router: columns read in one sweep over the scores. A sweep for each would fetch
// every cache line E times, more of them would leave threads idle when there are few experts.
constexpr int64_t kChoiceColumns = 4;

// Backward of the routers in lanes looks for each slot at each expert: up to so many pairs that is
// less than a pass by rows.
constexpr int64_t kFewRouterPairs = 32;

// add_rms_norm: sums over rows are split into parts of so many, by sizes alone, and the parts added
// in order: bits do not depend on threads. Two sums of a part are 2 H numbers against H a row and
// tensor.
constexpr int64_t kNormPartRows = 64;

// rotary: numbers of half types that are widened together, a few kilobytes of an L1.
constexpr int64_t kRotaryWide = 2048;

// moe_ffn: rows of all H features would be the largest block of a call, 32 MiB for 4096 rows of
// 2048. So they are computed and summed by ranges of features, one after the other in the same
// memory.
constexpr int64_t kRangeBytes = int64_t{2} << 20;
// One token reads experts of fp32 up to this size in the weights as they lie, even where a packed
// copy is given.
constexpr int64_t kMostUnpackedBytes = int64_t{2} << 20;
// Backward by blocks of tokens: fewest rows of an expert in a chunk. Fewer do not pay for writing
// its sums, as large as weights, and adding.
constexpr int64_t kMinChunkRows = 48;

// moa_attention: sums of gradients of keys and values are split over at least this many items, by
// sizes alone, so that bits do not depend on threads.
constexpr int64_t kAttentionLeastItems = 16;
// Keys whose gradients are summed over those items together.
constexpr int64_t kAttentionReduceKeys = 256;

// Weight gradients from this size on will not be found in a cache again by whoever reads them.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

// pack_experts: a block of k, so that the lines it touches stay in cache while the features
// alternate.
constexpr int64_t kPackDepth = 64;

// One entry: in `family` of kernels, results are computed differently from `value` on (or beyond
// it) of what `axis` counts. Families and axes are those that tests/sweep knows.
struct BlockSize {
  const char *family, *axis, *name;
  int64_t value;
};
// Returns the block sizes of active_isa().
MOE_OPS_API std::vector<BlockSize> block_sizes();

}  // namespace moe_ops::cpu
