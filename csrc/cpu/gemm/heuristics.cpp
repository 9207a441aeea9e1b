#include "cpu/gemm/heuristics.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <limits>

#include "cpu/isa/isa.h"
#include "cpu/isa/tuning.h"
#include "cpu/kernels/kernels.h"

namespace moe_ops::cpu {

namespace {

using B = GemmShape::B;

struct Choice {
  Algorithm algorithm;
  Operand operand;
};

// Returns whether bfloat16 weights are multiplied without widening. Tokens are rounded to bfloat16,
// which is exact unless they were scaled before.
template <class T>
bool can_multiply_bf16(const GemmShape& s, const GemmKernels<T>& k) {
  return k.has_bf16 && s.type == DType::kBFloat16 && !s.scaled;
}

// Chooses an algorithm if a row's result must not depend bitwise on the number of rows
// (batch_invariant.h). GEMV and its blocked form add in the same order, and so do the outer product
// and row-major B, which then have blocks of one depth. bfloat16 is multiplied as such by all rows
// or by none, and AMX, which adds in an order of its own, by none. One chain of sums is an outer
// product of one block, whatever the number of rows. Tokens become integers of 16 bits for weights
// of 8 bits, which costs less accuracy than 8 bits do, and of 8 for weights of 4.
template <class T>
Choice choose_invariant(const GemmShape& s, const GemmKernels<T>& k, int64_t rows) {
  const bool bf16 =
      can_multiply_bf16(s, k) && k.bf16_max_rows == std::numeric_limits<int64_t>::max();
  const auto operand = [&](bool pairs) { return pairs ? Operand::kBf16 : Operand::kWide; };
  switch (s.b) {
    case B::kBits8:
      if (!s.float_scales) return {Algorithm::kDequant, Operand::kWide};
      return {Algorithm::kGemv, Operand::kInt16};
    case B::kBits4:
      if (!s.float_scales) return {Algorithm::kDequant, Operand::kWide};
      return {Algorithm::kGemv, Operand::kInt8};
    case B::kFp8:
      return {rows <= kFp8GemvRows ? Algorithm::kGemv : Algorithm::kGemvBlocked, Operand::kFp8};
    case B::kMxfp4:
    case B::kNvfp4:
    case B::kCodes:
    case B::kTurnedCodes:
      return {Algorithm::kDequant, Operand::kWide};
    case B::kPacked:
      return {Algorithm::kPackedB, operand(bf16)};
    case B::kDenseFeatures: {
      const bool few =
          s.one_chain || rows <= (k.outer.one_pass ? k.gemv.max_tokens : kOuterMaxRows);
      return {few ? Algorithm::kOuter : Algorithm::kRowMajorB, operand(bf16)};
    }
    case B::kDenseK:
      return {rows <= k.gemv.max_rows ? Algorithm::kGemv : Algorithm::kGemvBlocked,
              operand(bf16 && s.even)};
  }
  return {Algorithm::kZero, Operand::kWide};
}

// Chooses for weights of 8 and 4 bits. Tiles multiply integers of 8 bits only if the layer's tokens
// have a half type, and for weights of 4 bits sums of two.
Choice choose_quantized(const GemmShape& s, const QuantKernels& q, int64_t rows) {
  const bool four = s.b != B::kBits8, half = s.type != DType::kFloat32;
  const bool int8 = half && q.int8_tile[four][0] != nullptr;
  const bool int16 = half && !four && q.quantize_int16 != nullptr;
  int64_t gemv_rows = kQuantMaxRows;
  if (four && int8) gemv_rows = q.w4_max_rows;
  if (!four && (int8 || int16)) {
    gemv_rows =
        std::clamp<int64_t>(s.in_features / q.w8_min_depth_per_row, kMinW8Rows, q.w8_max_rows);
  }
  if (rows <= gemv_rows) return {Algorithm::kGemv, four ? Operand::kInt8 : Operand::kInt16};
  if (four && q.int8_tile[1][0] == nullptr && (!s.float_scales || s.b != B::kBits4)) {
    return {Algorithm::kDequant, Operand::kWide};
  }
  if (four && !half && q.int8_tile[1][0] != nullptr) {
    return {Algorithm::kRepackB, Operand::kTwoInt8};
  }
  if (int8 || int16) return {Algorithm::kRepackB, int8 ? Operand::kInt8 : Operand::kInt16};
  // Weights of 8 bits with a scale per group have tiles of integers only.
  return {s.float_scales ? Algorithm::kRepackB : Algorithm::kDequant, Operand::kWide};
}

// Chooses for weights that are dense along k.
template <class T>
Choice choose_dense_k(const GemmShape& s, const GemmKernels<T>& k, int64_t rows, bool bf16) {
  const bool half = sizeof(T) == 4 && s.type != DType::kFloat32, pairs = bf16 && s.even;
  // Every max_tokens rows widen half types again; bfloat16 at full speed beats that.
  const bool fast_pairs = pairs && k.bf16_max_rows > k.blocked_gemv.max_rows;
  const int64_t half_rows = fast_pairs ? k.gemv.max_tokens : 2 * k.gemv.max_tokens;
  // Where GEMV would take two passes; from twice that depth on also where it takes four rows in
  // one.
  const int64_t deep = rows > k.gemv.max_tokens ? s.in_features : rows == 4 ? s.in_features / 2 : 0;
  const bool one_pass =
      !half && rows <= k.blocked_gemv.max_tokens && deep >= k.blocked_gemv.one_pass_min_depth;
  if (!one_pass && rows <= (half ? half_rows : k.gemv.max_rows)) {
    return {Algorithm::kGemv, Operand::kWide};
  }
  const auto& depth = k.blocked_gemv.min_depth_per_row;
  const int64_t blocked_rows = s.in_features / (pairs  ? depth.bf16
                                                : half ? depth.widened
                                                       : depth.same);
  const bool blocked = rows <= std::min(k.blocked_gemv.max_rows, blocked_rows);
  return {blocked ? Algorithm::kGemvBlocked : Algorithm::kPackBt,
          pairs ? Operand::kBf16 : Operand::kWide};
}

template <class T>
Choice choose(const GemmShape& s, const GemmKernels<T>& k, const QuantKernels& q, int64_t rows) {
  if (s.in_features == 0) return {Algorithm::kZero, Operand::kWide};
  if (s.invariant) return choose_invariant(s, k, rows);
  const bool can = can_multiply_bf16(s, k);
  const bool amx = can && k.amx.panel != nullptr && rows >= kAmxMinRows;
  const bool bf16 = can && rows <= k.bf16_max_rows;
  const Operand operand = amx ? Operand::kAmx : bf16 ? Operand::kBf16 : Operand::kWide;
  switch (s.b) {
    case B::kBits8:
    case B::kBits4:
    case B::kMxfp4:
      return choose_quantized(s, q, rows);
    case B::kFp8:
      if (rows <= kFp8GemvRows) {
        return {Algorithm::kGemv, k.has_bf16 ? Operand::kFp8Bf16 : Operand::kFp8};
      }
      return {Algorithm::kPackTokens,
              k.has_bf16 && rows <= k.bf16_max_rows ? Operand::kFp8Bf16 : Operand::kFp8};
    case B::kNvfp4:
      if (rows <= kQuantMaxRows) return {Algorithm::kGemv, Operand::kInt8};
      return {Algorithm::kDequant, operand};
    case B::kCodes:
      // AMX beats the second pass of a GEMV, and that beats weights decoded in cache.
      if (s.bf16_codes && can &&
          rows <= (k.amx.panel != nullptr ? k.gemv.max_tokens : kQuantMaxRows)) {
        return {Algorithm::kGemv, Operand::kFp8Bf16};
      }
      if (rows <= k.gemv.max_tokens) return {Algorithm::kGemv, Operand::kDecoded};
      return {Algorithm::kDequant,
              s.bf16_codes && (amx || rows > kQuantMaxRows) ? operand : Operand::kWide};
    case B::kTurnedCodes:
      return {Algorithm::kDequant, Operand::kWide};
    case B::kPacked:
      return {Algorithm::kPackedB, operand};
    case B::kDenseFeatures: {
      const bool half = sizeof(T) == 4 && s.type != DType::kFloat32;
      const bool one_pass = k.outer.one_pass && (!half || bf16);
      if (rows <= (one_pass ? k.gemv.max_tokens : kOuterMaxRows)) {
        return {Algorithm::kOuter, Operand::kWide};
      }
      return {Algorithm::kRowMajorB, operand};
    }
    case B::kDenseK:
      if (amx && s.in_features % 32 == 0) return {Algorithm::kPackTokens, Operand::kAmx};
      return choose_dense_k(s, k, rows, bf16);
  }
  return {Algorithm::kZero, Operand::kWide};
}

// Return the width of an item of row-major B, and the depth of its blocks in elements of `steps` k.
// The depth follows from the width of an item with one thread: blocks are summed separately, so
// results depend on the depth bitwise.
int64_t row_major_features(const GemmShape& s, int64_t rows) {
  return s.invariant || rows >= kRowMajorNarrowRows ? kRowMajorFeatures / 2 : kRowMajorFeatures;
}
template <class T>
int64_t row_major_depth(const GemmShape& s, const GemmKernels<T>& k, int64_t steps, int64_t rows) {
  const int64_t width = steps * k.lanes;
  const int64_t cuts = ceil_div(s.features * s.segments, row_major_features(s, rows));
  const int64_t widest = balanced(s.features, ceil_div(s.features, cuts),
                                  std::max<int64_t>(s.feature_unit, 2 * k.lanes));
  return std::clamp<int64_t>(
      kRowMajorBlockBytes / (round_up(widest, width) * static_cast<int64_t>(sizeof(T))), 16, kKc);
}

constexpr std::array kAlgorithmNames = {"zero",     "gemv",        "gemv_blocked", "outer",
                                        "pack_bt",  "row_major_b", "packed_b",     "pack_tokens",
                                        "repack_b", "dequant"};
constexpr std::array kOperandNames = {"wide",     "bf16", "amx",      "int16",  "int8",
                                      "two_int8", "fp8",  "fp8_bf16", "decoded"};

}  // namespace

template <class T>
GemmConfig choose_config(const GemmShape& s, const GemmKernels<T>& k, const QuantKernels& q,
                         int64_t rows) {
  const auto [algorithm, operand] = choose(s, k, q, rows);
  GemmConfig c{algorithm, operand, kRowBlock, kFeatureBlock, 1, 2 * k.lanes, 0};
  const bool amx = operand == Operand::kAmx && algorithm != Algorithm::kDequant;
  if (amx) {
    c.rows = algorithm == Algorithm::kPackTokens ? 16 * kAmxTokenTiles : kPanelRowBlock;
    c.features = algorithm == Algorithm::kRowMajorB ? kAmxRowMajorFeatures : kAmxFeatureBlock;
    c.row_unit = 16;
    return c;
  }
  if (s.b == B::kFp8) {
    c.features = rows <= kFp8GemvRows ? kFp8GemvFeatures : kPanelFeatureBlock;
    c.row_unit = k.lanes;
    c.feature_unit = 4;
    return c;
  }
  switch (algorithm) {
    case Algorithm::kPackedB:
      // Few rows are read in streams, of a quarter of an item each: the longer the better. More are
      // copied once for all parts of an item.
      c.features = rows <= k.packed.stream_rows ? kStreamFeatureBlock : kPackedFeatures;
      c.rows = k.packed.max_rows;
      break;
    case Algorithm::kRepackB:
      c.features = operand == Operand::kWide ? kPanelFeatureBlock : kQuantFeatures;
      c.rows = kPanelRowBlock;
      break;
    case Algorithm::kGemv:
      c.feature_unit = kGemvFeatures;
      if (operand == Operand::kInt8 || operand == Operand::kDecoded ||
          operand == Operand::kFp8Bf16 || (operand == Operand::kInt16 && !s.float_scales)) {
        c.features = kQuantFeatures;
      } else if (operand == Operand::kInt16) {
        c.feature_unit = 2 * q.w8_features;
        c.features = rows <= kQuantMaxRows ? kQuantFeatures : kQuantNarrowFeatures;
        c.rows = kPanelRowBlock;
        c.row_unit = k.gemv.max_tokens;
      } else if (rows <= k.gemv.max_tokens) {
        // Read once, in streams of a quarter of an item each.
        c.features = kStreamFeatureBlock;
      }
      break;
    case Algorithm::kGemvBlocked:
      c.features = kStreamFeatureBlock;
      c.feature_unit = kGemvFeatures;
      break;
    case Algorithm::kPackBt:
      c.features = kStreamFeatureBlock;
      if (std::min(s.range, c.features) * s.segments * s.in_features <= kKeptElements) {
        c.rows = kKeptRows;
      }
      break;
    case Algorithm::kOuter:
    case Algorithm::kRowMajorB: {
      const int64_t steps = operand == Operand::kBf16 ? 2 : 1,
                    k_elements = ceil_div(s.in_features, steps);
      c.features = row_major_features(s, rows);
      const int64_t depth = row_major_depth(s, k, steps, rows);
      if (algorithm == Algorithm::kOuter) {
        const auto size = static_cast<int64_t>(sizeof(T));
        const int64_t width = s.features * s.segments;
        // Vectors of 16 bytes load and store sums for longer than memory takes for the weights.
        c.one_run = steps == 1 && k.lanes * size > 16 && rows <= kOneRunRows &&
                    s.range == s.features && rows * width * size <= kOneRunSumBytes;
        if (c.one_run) c.features = std::max(c.features, width);
      }
      const bool one_block = algorithm == Algorithm::kOuter && (!s.invariant || s.one_chain);
      c.depth = one_block ? k_elements : depth;
      break;
    }
    case Algorithm::kDequant:
      c.features = kDequantFeatures;
      c.feature_unit = kQuantBlock;
      break;
    case Algorithm::kZero:
    case Algorithm::kPackTokens:
      break;
  }
  return c;
}

template GemmConfig choose_config<float>(const GemmShape&, const GemmKernels<float>&,
                                         const QuantKernels&, int64_t);
template GemmConfig choose_config<double>(const GemmShape&, const GemmKernels<double>&,
                                          const QuantKernels&, int64_t);

std::string gemm_config(const GemmShape& s, DType accumulate, int64_t rows, Isa isa, bool intel) {
  const auto [f32, f64] = tables_for(isa, tuning_of(intel));
  if (accumulate == DType::kFloat32) return to_string(choose_config(s, f32.gemm, f32.quant, rows));
  return to_string(choose_config(s, f64.gemm, f32.quant, rows));
}

std::string to_string(const GemmConfig& c) {
  char text[96];
  std::snprintf(text, sizeof(text), "%s %s, items of %lld x %lld",
                kAlgorithmNames[static_cast<size_t>(c.algorithm)],
                kOperandNames[static_cast<size_t>(c.operand)], static_cast<long long>(c.rows),
                static_cast<long long>(c.features));
  return text;
}

}  // namespace moe_ops::cpu
