#include "cpu/gemm/blocking.h"

#include <limits>

#include "cpu/gemm/fp8.h"
#include "cpu/gemm/gemm.h"
#include "cpu/gemm/heuristics.h"
#include "cpu/gemm/quantize_fp8_row.h"
#include "cpu/gemm/token_blocks.h"
#include "cpu/gemm/wgrad.h"
#include "cpu/kernels/router.h"
#include "cpu/moa_attention/blocks.h"

namespace moe_ops::cpu {

namespace {

constexpr int64_t kFloat = sizeof(float), kDouble = sizeof(double);

// An entry that is one constant.
#define MOE_SIZE(family, axis, constant) {family, axis, #constant, constant}

// Adds the sizes of a target's table of kernels, which are equal for both accumulate types or
// depend on the number of lanes.
template <class T>
void add_level(std::vector<BlockSize>& sizes) {
  const GemmKernels<T>& k = gemm_kernels<T>();
  const int64_t W = k.lanes;
  sizes.insert(
      sizes.end(),
      {
          {"gemm", "features", "lanes", W},
          {"gemm", "features", "2 lanes", 2 * W},
          {"gemm", "depth", "lanes", W},
          {"gemm", "rows", "mr1", k.mr1},
          {"gemm", "rows", "mr2", k.mr2},
          {"gemm", "rows", "gemv.max_tokens", k.gemv.max_tokens},
          {"gemm", "rows", "2 gemv.max_tokens", 2 * k.gemv.max_tokens},
          {"gemm", "rows", "gemv.max_rows", k.gemv.max_rows},
          {"gemm", "rows", "blocked_gemv.max_tokens", k.blocked_gemv.max_tokens},
          {"gemm", "rows", "blocked_gemv.max_rows", k.blocked_gemv.max_rows},
          {"gemm", "rows", "packed.max_rows", k.packed.max_rows},
          {"gemm", "rows", "packed.stream_rows", k.packed.stream_rows},
          {"gemm", "rows", "packed.widen_tiles", (k.packed.widen_tiles - 1) * k.mr2},
          {"gemm", "rows", "bf16_max_rows", k.bf16_max_rows},
          {"gemm", "depth", "blocked_gemv.block_k", k.blocked_gemv.block_k},
          {"gemm", "depth", "blocked_gemv.one_pass_min_depth", k.blocked_gemv.one_pass_min_depth},
          {"gemm", "depth_a_row", "blocked_gemv.min_depth_per_row.same",
           k.blocked_gemv.min_depth_per_row.same},
          {"gemm", "depth_a_row", "blocked_gemv.min_depth_per_row.widened",
           k.blocked_gemv.min_depth_per_row.widened},
          {"gemm", "depth_a_row", "blocked_gemv.min_depth_per_row.bf16",
           k.blocked_gemv.min_depth_per_row.bf16},
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
}

}  // namespace

std::vector<BlockSize> block_sizes() {
  std::vector<BlockSize> sizes = {
      // Products (gemm/). Depth is what is summed over; pairs of bfloat16 hold two steps.
      MOE_SIZE("gemm", "rows", kRowBlock),
      MOE_SIZE("gemm", "rows", kKeptRows),
      MOE_SIZE("gemm", "rows", kPanelRowBlock),
      MOE_SIZE("gemm", "rows", kRowMajorNarrowRows),
      MOE_SIZE("gemm", "rows", kAmxMinRows),
      MOE_SIZE("gemm", "rows", kOuterMaxRows),
      MOE_SIZE("gemm", "rows", kOneRunRows),
      MOE_SIZE("gemm", "rows", kStreamPrefetchRows),
      MOE_SIZE("gemm", "rows", kMaxStreamRows),
      MOE_SIZE("gemm", "rows", kMaxMr),
      {"gemm", "rows", "16 kAmxTokenTiles", 16 * kAmxTokenTiles},
      MOE_SIZE("gemm", "features", kFeatureBlock),
      {"gemm", "features", "2 kFeatureBlock", 2 * kFeatureBlock},
      MOE_SIZE("gemm", "features", kPanelFeatureBlock),
      MOE_SIZE("gemm", "features", kStreamFeatureBlock),
      MOE_SIZE("gemm", "features", kAmxFeatureBlock),
      MOE_SIZE("gemm", "features", kPackedFeatures),
      MOE_SIZE("gemm", "features", kRowMajorFeatures),
      {"gemm", "features", "kRowMajorFeatures / 2", kRowMajorFeatures / 2},
      MOE_SIZE("gemm", "features", kAmxRowMajorFeatures),
      MOE_SIZE("gemm", "features", kGemvFeatures),
      {"gemm", "features", "kOneRunSumBytes, two rows", kOneRunSumBytes / (2 * kFloat)},
      {"gemm", "features", "kPageBytes, float32", kPageBytes / kFloat},
      {"gemm", "features", "kPageBytes, float64", kPageBytes / kDouble},
      MOE_SIZE("gemm", "depth", kKc),
      {"gemm", "depth", "kKc pairs", 2 * kKc},
      MOE_SIZE("gemm", "depth", kPanelDepth),
      {"gemm", "depth", "kPanelDepth pairs", 2 * kPanelDepth},
      MOE_SIZE("gemm", "depth", kAmxKc),
      MOE_SIZE("gemm", "depth", kPrefetchStep),
      MOE_SIZE("gemm", "depth", kOuterRows),
      MOE_SIZE("gemm", "depth", kPackDepth),
      {"gemm", "depth", "kWholeDepthBytes, float32",
       kWholeDepthBytes / (kRowBlock * kLda * kFloat) * kKc},
      {"gemm", "depth", "kWholeDepthBytes, float64",
       kWholeDepthBytes / (kRowBlock * kLda * kDouble) * kKc},
      {"gemm", "depth", "kKeptWeightBytes, float32", kKeptWeightBytes / (kGemvFeatures * kFloat)},
      {"gemm", "depth", "kRowMajorBlockBytes, widest",
       kRowMajorBlockBytes / (kRowMajorFeatures * kFloat)},
      {"gemm", "depth", "kRowMajorBlockBytes, narrow",
       kRowMajorBlockBytes / (kRowMajorFeatures / 2 * kFloat)},
      MOE_SIZE("gemm", "weights", kKeptElements),
      {"gemm", "weights", "kMostUnpackedBytes", kMostUnpackedBytes / kFloat},
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
      MOE_SIZE("quant", "rows", kMinW8Rows),
      MOE_SIZE("quant", "features", kQuantFeatures),
      MOE_SIZE("quant", "features", kQuantNarrowFeatures),
      MOE_SIZE("quant", "features", kQuantPartFeatures),
      MOE_SIZE("quant", "features", kDequantFeatures),
      {"quant", "depth", "kDequantBytes", kDequantBytes / (kDequantFeatures * kFloat)},
      MOE_SIZE("quant", "depth", kQuantBlock),
      MOE_SIZE("quant", "depth", kInt8Depth),
      {"quant", "depth", "kKc pairs", 2 * kKc},
      // e4m3.
      MOE_SIZE("fp8", "rows", kFp8GemvRows),
      MOE_SIZE("fp8", "rows", kFp8DotTokens),
      MOE_SIZE("fp8", "rows", kRowBlock),
      MOE_SIZE("fp8", "features", kFp8GemvFeatures),
      MOE_SIZE("fp8", "features", kPanelFeatureBlock),
      MOE_SIZE("fp8", "features", kFp8Block),
      MOE_SIZE("fp8", "depth", kFp8Block),
      {"fp8", "depth", "kWholeDepthBytes", kWholeDepthBytes / (kRowBlock * kFloat)},
      // Small experts by blocks of tokens (token_blocks.h, moe_ffn/blocks.cpp), and by stages.
      MOE_SIZE("slots", "tokens", kBlockTokens),
      MOE_SIZE("slots", "tokens", kChunkTokens),
      {"slots", "tokens", "kChunkTokens kMostChunks", kChunkTokens * kMostChunks},
      MOE_SIZE("slots", "width", kMostWidth),
      MOE_SIZE("slots", "rows", kMinBlockRows),
      MOE_SIZE("slots", "rows", kMinChunkRows),
      MOE_SIZE("slots", "rows", kKc),
      MOE_SIZE("slots", "weights", kMostBlockWeights),
      {"ffn", "rows", "kRangeBytes", kRangeBytes / (kRowMajorFeatures / 2 * kFloat)},
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
      MOE_SIZE("router", "experts", kSoaExperts),
      MOE_SIZE("router", "experts", kRouterExperts),
      MOE_SIZE("router", "experts", kChoiceColumns),
      MOE_SIZE("router", "pairs", kFewRouterPairs),
      MOE_SIZE("router", "tokens", kSoaTokens),
      MOE_SIZE("router", "tokens", kRouterRows),
      MOE_SIZE("router", "tokens", kRouterLinearRows),
      // Operations on whole rows.
      MOE_SIZE("rows", "tokens", kNormPartRows),
      MOE_SIZE("rows", "hidden", kRotaryWide),
      MOE_SIZE("rows", "hidden", kFp8Block),
      MOE_SIZE("rows", "hidden", kFp8Columns),
  };
  add_level<float>(sizes);
  add_level<double>(sizes);
  const GemmKernels<float>& k = gemm_kernels<float>();
  const QuantKernels& q = quant_kernels();
  sizes.insert(sizes.end(),
               {
                   {"quant", "rows", "gemv.max_tokens", k.gemv.max_tokens},
                   {"quant", "rows", "mr2", k.mr2},
                   {"quant", "rows", "w8_max_rows", q.w8_max_rows},
                   {"quant", "rows", "w4_max_rows", q.w4_max_rows},
                   {"quant", "rows", "int16_rows", q.int16_rows},
                   {"quant", "rows", "int8_rows", q.int8_rows},
                   {"quant", "depth_a_row", "dot8_depth_of_row", q.w8_min_depth_per_row},
                   {"quant", "features", "dot8_features", q.w8_features},
                   {"quant", "features", "2 lanes", 2 * k.lanes},
                   {"quant", "depth", "bytes of a vector", 4 * k.lanes},
                   {"quant", "depth", "4 bits of a vector", 8 * k.lanes},
                   {"fp8", "rows", "lanes", k.lanes},
                   {"fp8", "rows", "2 lanes", 2 * k.lanes},
                   {"fp8", "features", "mr2", k.mr2},
               });
  // "No limit", and what a target lacks, are no sizes.
  std::erase_if(sizes,
                [](const BlockSize& s) { return s.value <= 0 || s.value > (int64_t{1} << 30); });
  return sizes;
}

#undef MOE_SIZE

}  // namespace moe_ops::cpu
