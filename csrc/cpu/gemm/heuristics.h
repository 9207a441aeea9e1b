// Which algorithm a product takes, on which operands, and in items of what size: one function from
// the shape of the product and the numbers of the target to a configuration that can be printed.
// csrc/cpu/NOTES.md has the table and the arithmetic. At the end, the items.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "cpu/gemm/desc.h"
#include "cpu/isa/isa.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/quant.h"
#include "cpu/runtime/parallel.h"

namespace moe_ops::cpu {

// Every algorithm sums over k in increasing order inside one accumulator.
enum class Algorithm : int {
  kZero,         // nothing is summed over
  kGemv,         // few rows; weight rows are read once, vectors lie along k
  kGemvBlocked,  // the same with the tokens in passes over a block of weights in cache
  kOuter,        // few rows; weight rows of consecutive k are added up, vectors lie along features
  kPackBt,       // weights dense along k are transposed into panels, once for all rows of an item
  kRowMajorB,    // weights dense along features are the vectors, copied block by block
  kPackedB,      // weights packed ahead of time (prepack.h)
  kPackTokens,   // weight rows as they lie are A, and tokens are packed as B
  kRepackB,      // weights of 8 or 4 bits are repacked into panels in cache
  kDequant,      // weights of few bits become float32 in cache, for one of the algorithms above
};
enum class Operand : int {
  kWide,     // numbers of the accumulate type; half types are widened
  kBf16,     // pairs of bfloat16 (vdpbf16ps)
  kAmx,      // bfloat16 in AMX tiles
  kInt16,    // tokens as integers of 16 bits, for weights of 8 bits
  kInt8,     // tokens as integers of 8 bits
  kTwoInt8,  // tokens as sums of two such rows of integers
  kFp8,      // e4m3 codes, decoded to float32
  kFp8Bf16,  // e4m3 codes, decoded to pairs of bfloat16
  kDecoded,  // weights of few bits, decoded to float32 in registers
};

struct GemmConfig {
  Algorithm algorithm = Algorithm::kZero;
  Operand operand = Operand::kWide;
  // Most rows and features (of all segments together) of a work item, and what cuts are multiples
  // of.
  int64_t rows = 0, features = 0;
  int64_t row_unit = 1, feature_unit = 1;
  int64_t depth = 0;  // elements of k in a block, where blocks are summed by themselves
  // If true, weights are read as one run if items are as wide as a row of them (kOuter).
  bool one_run = false;

  bool operator==(const GemmConfig&) const = default;
};
// Returns a description such as "gemv_blocked bf16, items of 128 x 1024".
std::string to_string(const GemmConfig& c);

// Sizes and layout of a GEMM, on which its algorithm depends.
struct GemmShape {
  // kBits4: int4; kCodes: quantized weights without integer kernels; kTurnedCodes: any that are
  // transposed.
  enum class B : int {
    kDenseK,
    kDenseFeatures,
    kPacked,
    kBits8,
    kBits4,
    kMxfp4,
    kNvfp4,
    kFp8,
    kCodes,
    kTurnedCodes
  };
  B b = B::kDenseK;
  DType type = DType::kFloat32;  // of the weights; of the layer's tokens where they have few bits
  bool scaled = false;           // whether rows or columns of tokens have factors
  bool float_scales = true;      // kBits8, kBits4: whether those are float32 of the usual groups
  bool bf16_codes = false;       // kCodes: whether they are e4m3, of blocks or with a scale per row
  bool even = true;              // whether pairs of k lie side by side in every row of weights
  int64_t features = 0, segments = 1, feature_unit = 1, in_features = 0;
  int64_t range = 0;  // of the features of each segment, those that are wanted at once
  bool invariant = false;
  bool one_chain = false;  // GroupedGemmParams::one_chain, which only counts with `invariant`
};

// Chooses the configuration of an expert with `rows` rows. T is the accumulate type; kernels are
// those of the target.
template <class T>
GemmConfig choose_config(const GemmShape& s, const GemmKernels<T>& k, const QuantKernels& q,
                         int64_t rows);

template <class T>
GemmShape shape_of(const GemmDesc<T>& d) {
  GemmShape s;
  const QuantFormat& q = d.b.quant;
  if (q.bits != 0) {
    s.b = q.transposed               ? GemmShape::B::kTurnedCodes
          : q.exact                  ? GemmShape::B::kCodes
          : q.codes == Codes::kInt4  ? GemmShape::B::kBits4
          : q.codes == Codes::kMxfp4 ? GemmShape::B::kMxfp4
          : q.codes == Codes::kNvfp4 ? GemmShape::B::kNvfp4
          : q.codes == Codes::kInt8  ? GemmShape::B::kBits8
                                     : GemmShape::B::kCodes;
    s.float_scales = q.has_kernels;
    const bool row_scale = q.group == d.in_features && q.scale_type == ScaleType::kFloat32;
    s.bf16_codes = q.codes == Codes::kFp8 || (q.codes == Codes::kE4m3 && row_scale);
  } else if (d.b.panels != nullptr) {
    s.b = GemmShape::B::kPacked;
  } else {
    const bool dense_k = d.b.stride_k == 1 && !(d.invariant && d.one_chain);
    s.b = dense_k ? GemmShape::B::kDenseK : GemmShape::B::kDenseFeatures;
  }
  s.type = d.b.type;
  s.scaled = d.a_scale != nullptr || d.k_scale != nullptr;
  s.even = d.in_features % 2 == 0 && d.b.stride_o % 2 == 0;
  s.features = s.range = d.features;
  s.segments = d.segments;
  s.feature_unit = d.feature_unit;
  s.in_features = d.in_features;
  s.invariant = d.invariant;
  s.one_chain = d.one_chain;
  return s;
}

template <class T>
GemmConfig choose_config(const GemmDesc<T>& d, int64_t rows) {
  return choose_config<T>(shape_of(d), gemm_kernels<T>(), quant_kernels(), rows);
}

// Describes the configuration of an expert with `rows` rows, on any target of the build and any
// processor; for tests and developers. accumulate: kFloat32 or kFloat64.
MOE_OPS_API std::string gemm_config(const GemmShape& s, DType accumulate, int64_t rows, Isa isa,
                                    bool intel);

// Sizes of work items.
//
// Rows of an item that copies weights: a 192-deep block of 128 rows is 96 KiB of L2. Where one copy
// of weights serves one block of rows after the other, more, as long as the copy has at most
// kKeptElements: what leaves an L2 is written to L3 and read again, which costs more than another
// copy. Items on packed weights copy tokens only; 128 rows of 2048 features are 1 MiB of fp32.
constexpr int64_t kRowBlock = 128;
constexpr int64_t kKeptRows = 1024;
constexpr int64_t kKeptElements = int64_t{256} << 10;
constexpr int64_t kPanelRowBlock = 128;
// Features (of all segments together). 252 is a multiple of every tile height. Panels come whole at
// every target. Wider items read longer streams; AMX and packed weights rearrange tokens first,
// which more features share.
constexpr int64_t kFeatureBlock = 252;
constexpr int64_t kPanelFeatureBlock = 256;
constexpr int64_t kStreamFeatureBlock = 1024;
constexpr int64_t kAmxFeatureBlock = 2048;
constexpr int64_t kPackedFeatures = 4096;
// Row-major B: rows of 4 KiB are streams for the memory, rows of 1 KiB are not, and blocks of 256
// KiB leave room for the sums in an L2. From kRowMajorNarrowRows rows on an item is half as wide:
// the sums of 128 rows are then 256 KiB, and a block is 128 steps deep instead of 64.
constexpr int64_t kRowMajorFeatures = 1024;
constexpr int64_t kRowMajorBlockBytes = int64_t{256} << 10;
constexpr int64_t kRowMajorNarrowRows = 32;
constexpr int64_t kAmxRowMajorFeatures = 512;  // runs of 1 KiB
// Most rows of an expert for which weights dense along features are not copied. Each row passes its
// sums through registers once in four steps of k.
constexpr int64_t kOuterMaxRows = 8;
// Most rows whose weights are read as one run, a row of them after the other, and the size that
// their sums may have: half of an L1, as each weight row passes all of them.
constexpr int64_t kOneRunRows = 2;
constexpr int64_t kOneRunSumBytes = int64_t{24} << 10;
// Fewest rows that AMX takes. Below, reading the weights is all that counts, and the other kernels
// keep the tokens in fp32.
constexpr int64_t kAmxMinRows = 3;
// Weights of 8 and 4 bits: most rows of a GEMV where tiles have no integers; the width of its
// items, whose tokens are made integers first and whose streams are a quarter of that or less; with
// more rows narrower, for the sums. kMinW8Rows: that the GEMV of 8 bits takes whatever the depth.
constexpr int64_t kQuantMaxRows = 8;
constexpr int64_t kQuantFeatures = 2048;
constexpr int64_t kQuantNarrowFeatures = 1024;
constexpr int64_t kMinW8Rows = 3;
// Width of an item whose weights are dequantized, and bytes of them that are at a time: of an L2.
constexpr int64_t kDequantFeatures = 512;
constexpr int64_t kDequantBytes = int64_t{192} << 10;
// e4m3: most rows for which every weight is decoded anew for each kFp8DotTokens of them, and the
// width of such an item.
constexpr int64_t kFp8GemvRows = 4;
constexpr int64_t kFp8GemvFeatures = 2048;

// Least work of an item that is cut for the sake of several threads, in the units of
// GemmProblem::cost.
constexpr double kLeastItemCost = 1e4;

// A work item: rows of one expert times a range of features.
struct GemmItem {
  GemmConfig config;
  int64_t expert, row_begin, row_end, feature_begin, feature_end;
};

// Returns the items of features [first, last) of each segment; choose(rows) returns the
// configuration of an expert with `rows` rows.
template <class Choose>
std::vector<GemmItem> gemm_items(const GemmProblem& d, int num_threads, int64_t first, int64_t last,
                                 const Choose& choose) {
  const int64_t E = d.num_experts, wide = last - first, total = wide * d.segments;
  int64_t active = 0;
  for (int64_t e = 0; e < E; ++e) active += d.expert_offsets[e + 1] > d.expert_offsets[e];
  std::vector<GemmItem> items;
  if (wide == 0) return items;
  for (int64_t e = 0; e < E; ++e) {
    const int64_t begin = d.expert_offsets[e], end = d.expert_offsets[e + 1];
    if (begin == end) continue;
    const GemmConfig c = choose(end - begin);
    const int64_t row_blocks = ceil_div(end - begin, c.rows);
    const int64_t rows = balanced(end - begin, c.rows, c.row_unit);
    // Enough items that the last ones to finish do not leave the other threads idle for long; few
    // enough that claiming one, which takes a line from another core, is little beside its work.
    int64_t feature_blocks = ceil_div(total, c.features);
    // One run is read so much faster than its parts that a thread may idle for a third of the time.
    const bool one_run = c.one_run && 2 * round_up<int64_t>(active, num_threads) <= 3 * active;
    if (num_threads > 1 && !one_run) {
      const auto worthwhile = static_cast<int64_t>(d.cost() / kLeastItemCost);
      const int64_t rounds = std::clamp<int64_t>(ceil_div<int64_t>(worthwhile, num_threads), 1, 8);
      const int64_t wanted = ceil_div<int64_t>(rounds * num_threads, active * row_blocks);
      feature_blocks = std::max(feature_blocks, std::min(wanted, std::max<int64_t>(1, total / 64)));
    }
    const int64_t features = balanced(wide, std::max<int64_t>(1, ceil_div(wide, feature_blocks)),
                                      std::max(d.feature_unit, c.feature_unit));
    for (int64_t f = first; f < last; f += features) {
      for (int64_t r = begin; r < end; r += rows) {
        items.push_back({c, e, r, std::min(end, r + rows), f, std::min(last, f + features)});
      }
    }
  }
  return items;
}

// Returns the item that a thread is likely to take after item i, since threads claim items
// alternately.
inline const GemmItem* next_item(const std::vector<GemmItem>& items, int64_t i,
                                 const Parallel& par) {
  const size_t next = static_cast<size_t>(i) + static_cast<size_t>(std::max(1, par.num_threads));
  return next < items.size() ? &items[next] : nullptr;
}

// Hands the epilogue zeros, where nothing is summed over. Every algorithm calls its epilogue as
// fn(expert, row, feature_begin, n, T* values0, T* values1), where values1 is the second segment;
// it may overwrite the values.
template <class T, class Epilogue>
void zero_item(const GemmItem& it, const Epilogue& fn) {
  const int64_t n = it.feature_end - it.feature_begin;
  ScratchScope scratch;
  T* zeros = scratch.take<T>(Scratch::kTile, 2 * n);
  for (int64_t r = it.row_begin; r < it.row_end; ++r) {
    std::fill(zeros, zeros + 2 * n, T(0));
    fn(it.expert, r, it.feature_begin, n, zeros, zeros + n);
  }
}

}  // namespace moe_ops::cpu
