#include "cpu/gemm/blocking.h"

#include <limits>

#include "cpu/gemm/fp8.h"
#include "cpu/gemm/plan.h"
#include "cpu/gemm/slot_blocks.h"
#include "cpu/gemm/wgrad.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/router_row.h"
#include "cpu/moa_attention/blocks.h"

namespace moe_ops::cpu {

namespace {

constexpr int64_t kFloat = sizeof(float), kDouble = sizeof(double);

// An entry that is one constant.
#define MOE_SIZE(family, axis, constant) {family, axis, #constant, constant}

// Those of the table of a level's kernels, which are the same for both accumulate types or follow
// from the number of lanes.
template <class T>
void add_level(std::vector<BlockSize>& sizes) {
  const Kernels<T>& k = kernels<T>();
  const int64_t W = k.lanes;
  sizes.insert(
      sizes.end(),
      {
          {"gemm", "features", "lanes", W},
          {"gemm", "features", "2 lanes", 2 * W},
          {"gemm", "depth", "lanes", W},
          {"gemm", "rows", "mr1", k.mr1},
          {"gemm", "rows", "mr2", k.mr2},
          {"gemm", "rows", "dot_tokens", k.dot_tokens},
          {"gemm", "rows", "2 dot_tokens", 2 * k.dot_tokens},
          {"gemm", "rows", "dot_max_rows", k.dot_max_rows},
          {"gemm", "rows", "strip_tokens", k.strip_tokens},
          {"gemm", "rows", "strip_max_rows", k.strip_max_rows},
          {"gemm", "rows", "panel_rows", k.panel_rows},
          {"gemm", "rows", "stream_rows", k.stream_rows},
          {"gemm", "rows", "pairs_max_rows", k.pairs_max_rows},
          {"gemm", "depth", "strip_block", k.strip_block},
          {"gemm", "depth", "strip_one_pass_depth", k.strip_one_pass_depth},
          {"gemm", "depth_a_row", "strip_depth_of_row.same", k.strip_depth_of_row.same},
          {"gemm", "depth_a_row", "strip_depth_of_row.widened", k.strip_depth_of_row.widened},
          {"gemm", "depth_a_row", "strip_depth_of_row.pairs", k.strip_depth_of_row.pairs},
          {"wgrad", "features", "mr2", k.mr2},
          {"wgrad", "depth", "2 lanes", 2 * W},
          {"slots", "width", "lanes", W},
          {"slots", "width", "2 lanes", 2 * W},
          {"dense", "width", "lanes", W},
          {"dense", "width", "2 lanes", 2 * W},
          {"mix", "size", "lanes", W},
          {"mix", "size", "4 lanes", 4 * W},
          {"attention", "size", "lanes", W},
          {"attention", "size", "2 lanes", 2 * W},
          {"attention", "keys", "mr2", k.mr2},
          {"router", "hidden", "lanes", W},
          {"router", "experts", "kFlatVectors lanes", kFlatVectors * W},
          {"rows", "hidden", "lanes", W},
          {"rows", "hidden", "2 lanes", 2 * W},
          {"rows", "hidden", "4 lanes", 4 * W},
      });
  for (const int tiles : k.widen_tiles) {
    if (tiles > 0) sizes.push_back({"gemm", "rows", "widen_tiles", (tiles - 1) * k.mr2});
  }
}

}  // namespace

std::vector<BlockSize> block_sizes() {
  std::vector<BlockSize> sizes = {
      // Products (gemm/). Depth is what is summed over; pairs of bfloat16 hold two steps.
      MOE_SIZE("gemm", "rows", kRowBlock),
      MOE_SIZE("gemm", "rows", kKeptRows),
      MOE_SIZE("gemm", "rows", kPanelRowBlock),
      MOE_SIZE("gemm", "rows", kNnNarrowRows),
      MOE_SIZE("gemm", "rows", kAmxMinRows),
      MOE_SIZE("gemm", "rows", kRankMaxRows),
      MOE_SIZE("gemm", "rows", kStreamAheadRows),
      MOE_SIZE("gemm", "rows", kMaxStreamRows),
      MOE_SIZE("gemm", "rows", kMaxMr),
      {"gemm", "rows", "16 kAmxTokenTiles", 16 * kAmxTokenTiles},
      MOE_SIZE("gemm", "features", kFeatureBlock),
      {"gemm", "features", "2 kFeatureBlock", 2 * kFeatureBlock},
      MOE_SIZE("gemm", "features", kPanelFeatureBlock),
      MOE_SIZE("gemm", "features", kStreamFeatureBlock),
      MOE_SIZE("gemm", "features", kAmxFeatureBlock),
      MOE_SIZE("gemm", "features", kPanelFeatures),
      MOE_SIZE("gemm", "features", kNnFeatures),
      {"gemm", "features", "kNnFeatures / 2", kNnFeatures / 2},
      MOE_SIZE("gemm", "features", kAmxNnFeatures),
      MOE_SIZE("gemm", "features", kDotFeatures),
      {"gemm", "features", "kPageBytes, float32", kPageBytes / kFloat},
      {"gemm", "features", "kPageBytes, float64", kPageBytes / kDouble},
      MOE_SIZE("gemm", "depth", kKc),
      {"gemm", "depth", "kKc pairs", 2 * kKc},
      MOE_SIZE("gemm", "depth", kPanelDepth),
      {"gemm", "depth", "kPanelDepth pairs", 2 * kPanelDepth},
      MOE_SIZE("gemm", "depth", kAmxKc),
      MOE_SIZE("gemm", "depth", kPrefetchStep),
      MOE_SIZE("gemm", "depth", kRankRows),
      MOE_SIZE("gemm", "depth", kPackDepth),
      {"gemm", "depth", "kWholeDepthBytes, float32",
       kWholeDepthBytes / (kRowBlock * kLda * kFloat) * kKc},
      {"gemm", "depth", "kWholeDepthBytes, float64",
       kWholeDepthBytes / (kRowBlock * kLda * kDouble) * kKc},
      {"gemm", "depth", "kDotKeptBytes, float32", kDotKeptBytes / (kDotFeatures * kFloat)},
      {"gemm", "depth", "kNnBlockBytes, widest", kNnBlockBytes / (kNnFeatures * kFloat)},
      {"gemm", "depth", "kNnBlockBytes, narrow", kNnBlockBytes / (kNnFeatures / 2 * kFloat)},
      MOE_SIZE("gemm", "weights", kKeptElements),
      // Gradients of weights: rows are summed over, depth is the length of a row of the result.
      MOE_SIZE("wgrad", "rows", kKc),
      {"wgrad", "rows", "kKc pairs", 2 * kKc},
      MOE_SIZE("wgrad", "rows", kFewWgradRows),
      MOE_SIZE("wgrad", "rows", kAddLowDepth),
      {"wgrad", "features", "kFeatureBlock / 2", kFeatureBlock / 2},
      MOE_SIZE("wgrad", "features", kSumFeatures),
      MOE_SIZE("wgrad", "features", kLdm),
      {"wgrad", "depth", "kLineBytes, float32", kLineBytes / kFloat},
      {"wgrad", "depth", "kAddBytes, few rows", kAddBytes / (kAddLowDepth * kFloat)},
      MOE_SIZE("wgrad", "result_bytes", kStreamBytes),
      // Weights of 8 and 4 bits.
      MOE_SIZE("quant", "rows", kQuantMaxRows),
      MOE_SIZE("quant", "rows", kMinDot8Rows),
      MOE_SIZE("quant", "features", kQuantFeatures),
      MOE_SIZE("quant", "features", kQuantNarrowFeatures),
      MOE_SIZE("quant", "features", kQuantPartFeatures),
      MOE_SIZE("quant", "depth", kQuantBlock),
      MOE_SIZE("quant", "depth", kByteDepth),
      {"quant", "depth", "kKc pairs", 2 * kKc},
      // e4m3.
      MOE_SIZE("fp8", "rows", kFp8DotRows),
      MOE_SIZE("fp8", "rows", kFp8DotTokens),
      MOE_SIZE("fp8", "rows", kRowBlock),
      MOE_SIZE("fp8", "features", kFp8DotFeatures),
      MOE_SIZE("fp8", "features", kPanelFeatureBlock),
      MOE_SIZE("fp8", "features", kFp8Block),
      MOE_SIZE("fp8", "depth", kFp8Block),
      {"fp8", "depth", "kWholeDepthBytes", kWholeDepthBytes / (kRowBlock * kFloat)},
      // Narrow experts by blocks of tokens (slot_blocks.h, moe_ffn/blocks.cpp), and by stages.
      MOE_SIZE("slots", "tokens", kBlockTokens),
      MOE_SIZE("slots", "tokens", kChunkTokens),
      {"slots", "tokens", "kChunkTokens kMostChunks", kChunkTokens * kMostChunks},
      MOE_SIZE("slots", "width", kMostWidth),
      MOE_SIZE("slots", "rows", kMinBlockRows),
      MOE_SIZE("slots", "rows", kMinChunkRows),
      MOE_SIZE("slots", "rows", kKc),
      MOE_SIZE("slots", "weights", kMostBlockWeights),
      {"ffn", "rows", "kRangeBytes", kRangeBytes / (kNnFeatures / 2 * kFloat)},
      MOE_SIZE("dense", "tokens", kDenseTokens),
      {"dense", "tokens", "kDensePartBlocks", 2 * kDensePartBlocks * kDenseTokens},
      {"dense", "tokens", "kDenseMostParts", kDenseMostParts * kDensePartBlocks * kDenseTokens},
      MOE_SIZE("dense", "width", kKc),
      MOE_SIZE("dense", "width", kLdm),
      MOE_SIZE("mix", "tokens", kMixTokens),
      {"mix", "tokens", "kMixPartBlocks", 2 * kMixPartBlocks * kMixTokens},
      {"mix", "tokens", "kMixMostParts", kMixMostParts * kMixPartBlocks * kMixTokens},
      // Attention.
      {"attention", "rows", "kRows", attention::kRows},
      {"attention", "keys", "kKeys", attention::kKeys},
      {"attention", "keys", "kKeptKeyBytes, 128 features",
       attention::kKeptKeyBytes / (2 * 128 * kFloat)},
      MOE_SIZE("attention", "keys", kNarrowKeys),
      MOE_SIZE("attention", "keys", kAttentionReduceKeys),
      {"attention", "rows", "kAttentionLeastItems", kAttentionLeastItems * attention::kRows},
      MOE_SIZE("attention", "size", kNarrowSize),
      {"attention", "size", "kNarrowSize / 2", kNarrowSize / 2},
      MOE_SIZE("attention", "size", kKc),
      MOE_SIZE("attention", "size", kLdm),
      // Routers.
      MOE_SIZE("router", "experts", kRowUnit),
      MOE_SIZE("router", "experts", kLaneExperts),
      MOE_SIZE("router", "experts", kRouterExperts),
      MOE_SIZE("router", "experts", kChoiceColumns),
      MOE_SIZE("router", "pairs", kFewRouterPairs),
      MOE_SIZE("router", "tokens", kLaneTokens),
      MOE_SIZE("router", "tokens", kRouterRows),
      MOE_SIZE("router", "tokens", kRouterLinearRows),
      // Operations on whole rows.
      MOE_SIZE("rows", "tokens", kNormPartRows),
      MOE_SIZE("rows", "hidden", kRotaryWide),
      MOE_SIZE("rows", "hidden", kFp8Block),
  };
  add_level<float>(sizes);
  add_level<double>(sizes);
  const Kernels<float>& k = kernels<float>();
  const QuantKernels& q = k.quant;
  sizes.insert(sizes.end(), {
                                {"quant", "rows", "dot_tokens", k.dot_tokens},
                                {"quant", "rows", "mr2", k.mr2},
                                {"quant", "rows", "dot8_rows", q.dot8_rows},
                                {"quant", "rows", "dot4_rows", q.dot4_rows},
                                {"quant", "rows", "code_rows", q.code_rows},
                                {"quant", "rows", "byte_rows", q.byte_rows},
                                {"quant", "depth_a_row", "dot8_depth_of_row", q.dot8_depth_of_row},
                                {"quant", "features", "dot8_features", q.dot8_features},
                                {"quant", "features", "2 lanes", 2 * k.lanes},
                                {"quant", "depth", "bytes of a vector", 4 * k.lanes},
                                {"quant", "depth", "4 bits of a vector", 8 * k.lanes},
                                {"fp8", "rows", "lanes", k.lanes},
                                {"fp8", "rows", "2 lanes", 2 * k.lanes},
                                {"fp8", "features", "mr2", k.mr2},
                            });
  // "No limit", and what a level lacks, are no sizes.
  std::erase_if(sizes,
                [](const BlockSize& s) { return s.value <= 0 || s.value > (int64_t{1} << 30); });
  return sizes;
}

#undef MOE_SIZE

}  // namespace moe_ops::cpu
