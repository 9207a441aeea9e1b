// Which rows, features and panels one work item of a grouped product covers, and which way through
// the kernels it takes. NOTES.md in the folder above gives the arithmetic of the block sizes.
//
// The ways through, all with the sum over k in increasing order inside one accumulator:
//   dot         few rows, weights dense along k: stream each weight row once, vectors along k.
//   rank        few rows, weights dense along features: stream weight rows, four steps of k at a
//               time.
//   strip       more rows, weights dense along k: the same with the tokens in passes over a strip
//               of weights in cache.
//   pack        weights dense along k, more rows: transposed into panels of features, once for all
//               rows of an item; token rows are the broadcast side.
//   nn          weights dense along features: token rows are the broadcast side, weight rows the
//               vectors.
//   panels      weights packed ahead of time (pack.h): like nn, without any copying of weights.
//   pair_*      all of these for bfloat16 weights where the level multiplies pairs of bfloat16:
//               tokens are rounded to it, an element is two adjacent k, and K counts pairs.
//   amx_panels  the same for bfloat16 on AMX.
//   amx_rows    bfloat16 weights dense along k on AMX: 16 weight rows are an operand as they lie.
//   amx_nn      bfloat16 weights dense along features on AMX: packed in pairs of rows block by
//               block.
//   quant8      not many rows, weights of 8 bits: tokens become integers of 16 bits.
//   quant4      few rows, weights of 4 bits: tokens become integers of 8 bits.
//   quant_panels, code_panels, byte_panels
//               more rows of such weights: like panels, which are made in cache. Tokens are fp32,
//               or, where those of the layer are of a half type, integers of 16 or 8 bits.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/gemm/pack.h"
#include "cpu/kernels/kernels.h"
#include "cpu/runtime/batch_invariant.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/workspace.h"
#include "moe_ops/grouped_gemm.h"

namespace moe_ops::cpu {

// Most token rows of one item that copies weights: a 192-deep block of them is 96 KiB of L2.
constexpr int64_t kRowBlock = 128;
// The same where a copy of weights serves one block of rows after the other.
constexpr int64_t kKeptRows = 1024;
// ... which has at most so many elements, 1 MiB in fp32: what leaves an L2 is written to L3 and
// read again, which costs more than another copy.
constexpr int64_t kKeptElements = int64_t{256} << 10;
// Copies of tokens that stay for a run of blocks of k, of which the weights are then read in one
// go: longer streams, which the memory delivers twice as fast as pieces of 192.
constexpr int64_t kWholeDepthBytes = int64_t{512} << 10;
// The same where weights are not copied. Their rows are 1 MiB of fp32 at 2048 features.
constexpr int64_t kPanelRowBlock = 128;
// Features (of all segments together) of one item: a multiple of every tile height.
constexpr int64_t kFeatureBlock = 252;
// The same for panels, in whole panels of every level, and for AMX, whose items first rearrange
// their tokens: the more features share that work the better.
constexpr int64_t kPanelFeatureBlock = 256;
constexpr int64_t kStreamFeatureBlock = 1024;
constexpr int64_t kAmxFeatureBlock = 2048;
// The same for panels and more rows than streams take: an item copies its tokens once for all of
// its parts.
constexpr int64_t kPanelFeatures = 4096;
// Elements of the accumulate type between panels packed for one product: two lines, so that what a
// row of weights writes into all panels does not meet in one L1 set.
constexpr int64_t kPanelPad = 32;
// Width of an item of nn, and the size of the blocks that it copies: rows of 4 KiB are streams for
// the memory, rows of 1 KiB are not, and 256 KiB leave room for the sums in an L2.
constexpr int64_t kNnFeatures = 1024;
constexpr int64_t kNnBlockBytes = int64_t{256} << 10;
// From so many rows on an item is half as wide: the sums of 128 rows are then 256 KiB, and a block
// is 128 steps deep instead of 64, between which the sums pass through memory.
constexpr int64_t kNnNarrowRows = 32;
// Depth and width of the blocks of weights that amx_nn packs: 256 x 512 in bfloat16 are 256 KiB of
// L2, 256 steps of k amortise loading and storing the sums, and 512 columns are runs of 1 KiB.
constexpr int64_t kAmxKc = 256;
constexpr int64_t kAmxNnFeatures = 512;
// How far ahead of itself a tile asks for panels at least, from memory into L2. 8 KiB are 200 ns at
// 40 GB/s, twice the latency of a DRAM; the value for AMX was measured on another machine.
constexpr int64_t kBytesAhead = 8192;
constexpr int64_t kAmxBytesAhead = 2048;
// The same for rows as they lie, which tokens meet once.
constexpr int64_t kDotAhead = 2048;
// Bytes of weights that all passes of dot meet before the next ones.
constexpr int64_t kDotKeptBytes = int64_t{16} << 10;
constexpr int64_t kLineBytes = 64;    // of a cache
constexpr int64_t kPageBytes = 4096;  // and of a way of an L1
// Most rows of an expert for which streams of panels ask ahead. With more, sums in two panels at
// once leave the prefetcher time (Zen 4: 4 rows level, 5 rows 0.95 times as fast).
constexpr int64_t kStreamAheadRows = 3;
// Fewest rows of an expert that AMX takes. Below, reading the weights is all that counts, and the
// other kernels keep the tokens in fp32.
constexpr int64_t kAmxMinRows = 3;
// Most rows of an expert for which weights dense along features are not copied. Each row passes its
// sums through registers once in four steps of k.
constexpr int64_t kRankMaxRows = 8;
// The same for products of integers, and the width of such an item: wide, because its tokens are
// made integers first, and because each of its streams of weights is a quarter of it or less.
// With more rows, narrower, for the sums of 128 rows, which panels hand on in parts.
constexpr int64_t kQuantMaxRows = 8;
constexpr int64_t kQuantFeatures = 2048;
constexpr int64_t kQuantNarrowFeatures = 1024;
constexpr int64_t kQuantPartFeatures = 128;
constexpr int64_t kMinDot8Rows = 3;  // that dot8 takes whatever the depth
// How far ahead of itself a stream of 8-bit weights asks for more, in bytes: for one token, and for
// more, which give memory the time.
constexpr int64_t kDot8Ahead = 1024, kDot8TokensAhead = 2048;

// Weight gradients from this size on will not be found in a cache again by whoever reads them.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

inline const void* row_of(const Rows& rows, int64_t r) {
  const int64_t i = rows.index != nullptr ? rows.index[r] : r;
  return static_cast<const char*>(rows.data) + i * rows.stride * dtype_size(rows.type);
}

inline const char* element(const void* base, DType type, int64_t offset) {
  return static_cast<const char*>(base) + offset * dtype_size(type);
}

inline int64_t bits_of(const ExpertMatrices& m) {
  return m.quant.bits != 0 ? m.quant.bits : 8 * dtype_size(m.type);
}

// Weights of expert e from row o and step k on; the strides are in elements, of which 4-bit ones
// share bytes.
inline const char* weights_at(const ExpertMatrices& m, int64_t e, int64_t o, int64_t k) {
  const int64_t offset = e * m.stride_e + o * m.stride_o + k * m.stride_k;
  return static_cast<const char*>(m.data) + offset * bits_of(m) / 8;
}

inline const float* scales_at(const ExpertMatrices& m, int64_t e, int64_t o) {
  return m.quant.scale + e * m.quant.scale_stride_e + o * m.quant.scale_stride_o;
}

// Length of the parts when n is cut into equal ones of at most `most`, each a multiple of `unit`.
inline int64_t balanced(int64_t n, int64_t most, int64_t unit) {
  const int64_t parts = ceil_div(n, most);
  return std::min(n, round_up(ceil_div(n, parts), unit));
}

// What one product computes. Features come in one or two segments of `features` each: two when the
// gate and up halves of a fused projection are wanted side by side.
template <class T>
struct GemmDesc {
  const int64_t* expert_offsets;
  int64_t num_experts;
  int64_t features;          // per segment
  int segments = 1;          // segment s starts at row s * features of b
  int64_t feature_unit = 1;  // cuts between items fall on multiples of this
  int64_t in_features;
  Rows a;
  const T* a_scale = nullptr;      // [rows] or nullptr
  const float* k_scale = nullptr;  // [in_features] or nullptr; where b.quant has bits
  ExpertMatrices b;
  // Whether the number of an expert's rows must not show in the bits of one.
  bool invariant = batch_invariant();
};

enum class Path : int {
  kZero,
  kDot,
  kRank,
  kPack,
  kNn,
  kPanels,
  kStrip,
  kPairDot,
  kPairRank,
  kPairStrip,
  kPairPack,
  kPairNn,
  kPairPanels,
  kAmxPanels,
  kAmxRows,
  kAmxNn,
  kQuant8,
  kQuant4,
  kQuantPanels,
  kCodePanels,
  kBytePanels
};

// The same where the bits of a row must not depend on how many there are (batch_invariant.h). Of
// ways that a count of rows tells apart here, dot and strip add in the same order, and so do rank
// and nn, which then have blocks of one depth (nn_depth). bfloat16 pairs are multiplied as such by
// all rows or by none, and AMX, whose sums are none of the other ways', by none. Tokens become
// integers of 16 bits for weights of 8 bits, which costs less accuracy than those of 8 bits do, and
// integers of 8 bits for weights of 4, as at most other times.
template <class T>
Path invariant_path_of(const GemmDesc<T>& d, const Kernels<T>& k, int64_t expert_rows) {
  if (d.b.quant.bits != 0) return d.b.quant.bits == 4 ? Path::kQuant4 : Path::kQuant8;
  const bool pairs = k.pairs && d.b.type == DType::kBFloat16 && d.a_scale == nullptr &&
                     k.pairs_max_rows == std::numeric_limits<int64_t>::max();
  if (d.b.panels != nullptr) return pairs ? Path::kPairPanels : Path::kPanels;
  if (d.b.stride_k != 1) {
    const bool few = expert_rows <= (k.rank_one_pass ? k.dot_tokens : kRankMaxRows);
    if (pairs) return few ? Path::kPairRank : Path::kPairNn;
    return few ? Path::kRank : Path::kNn;
  }
  const bool few = expert_rows <= k.dot_max_rows;
  if (pairs && d.in_features % 2 == 0 && d.b.stride_o % 2 == 0) {
    return few ? Path::kPairDot : Path::kPairStrip;
  }
  return few ? Path::kDot : Path::kStrip;
}

template <class T>
Path path_of(const GemmDesc<T>& d, const Kernels<T>& k, int64_t expert_rows) {
  if (d.in_features == 0) return Path::kZero;
  if (d.invariant) return invariant_path_of(d, k, expert_rows);
  // Products of bfloat16 round tokens to it, which loses nothing unless they were scaled before.
  const bool pairs = k.pairs && d.b.type == DType::kBFloat16 && d.a_scale == nullptr;
  if (d.b.quant.bits != 0) {
    const QuantKernels& q = k.quant;
    const bool four = d.b.quant.bits == 4, half = d.b.type != DType::kFloat32;
    const bool bytes = half && q.byte_tile[four][0] != nullptr;
    const bool codes = half && !four && q.pairs != nullptr;
    int64_t dot_rows = kQuantMaxRows;
    if (four && bytes) dot_rows = q.dot4_rows;
    if (!four && (bytes || codes)) {
      dot_rows =
          std::clamp<int64_t>(d.in_features / q.dot8_depth_of_row, kMinDot8Rows, q.dot8_rows);
    }
    if (expert_rows <= dot_rows) return four ? Path::kQuant4 : Path::kQuant8;
    return bytes ? Path::kBytePanels : codes ? Path::kCodePanels : Path::kQuantPanels;
  }
  const bool amx = pairs && k.amx_panel != nullptr && expert_rows >= kAmxMinRows;
  const bool multiply_pairs = pairs && expert_rows <= k.pairs_max_rows;
  if (d.b.panels != nullptr) {
    return amx ? Path::kAmxPanels : multiply_pairs ? Path::kPairPanels : Path::kPanels;
  }
  // Whether tiles would have to widen the weights first.
  const bool half = sizeof(T) == 4 && d.b.type != DType::kFloat32;
  if (d.b.stride_k != 1) {
    const bool one_pass = k.rank_one_pass && (!half || multiply_pairs);
    if (expert_rows <= (one_pass ? k.dot_tokens : kRankMaxRows)) return Path::kRank;
    return amx ? Path::kAmxNn : multiply_pairs ? Path::kPairNn : Path::kNn;
  }
  if (amx && d.in_features % 32 == 0) return Path::kAmxRows;
  const bool two = multiply_pairs && d.in_features % 2 == 0 && d.b.stride_o % 2 == 0;
  // Every dot_tokens rows widen half types again; pairs at full speed (isa.h) beat that.
  const bool fast_pairs = two && k.pairs_max_rows > k.strip_max_rows;
  const int64_t half_rows = fast_pairs ? k.dot_tokens : 2 * k.dot_tokens;
  // Where dot would take two passes; from twice that depth on also where it takes four rows in one.
  const int64_t deep = expert_rows > k.dot_tokens ? d.in_features
                       : expert_rows == 4         ? d.in_features / 2
                                                  : 0;
  const bool one_pass = !half && expert_rows <= k.strip_tokens && deep >= k.strip_one_pass_depth;
  if (!one_pass && expert_rows <= (half ? half_rows : k.dot_max_rows)) return Path::kDot;
  const StripDepths& depth = k.strip_depth_of_row;
  const int64_t strip_rows = d.in_features / (two    ? depth.pairs
                                              : half ? depth.widened
                                                     : depth.same);
  if (expert_rows <= std::min(k.strip_max_rows, strip_rows)) {
    return two ? Path::kPairStrip : Path::kStrip;
  }
  return two ? Path::kPairPack : Path::kPack;
}

template <class T>
int64_t nn_features(const GemmDesc<T>& d, int64_t expert_rows) {
  return d.invariant || expert_rows >= kNnNarrowRows ? kNnFeatures / 2 : kNnFeatures;
}

// Depth of the blocks that nn copies; of `unit` weight rows each. By the width that an item has
// with one thread: blocks of k are summed by themselves, so bits depend on the depth.
template <class T>
int64_t nn_depth(const GemmDesc<T>& d, const Kernels<T>& k, int64_t unit, int64_t expert_rows) {
  const int64_t width = (unit == 2 ? 2 : 1) * k.lanes;
  const int64_t cuts = ceil_div(d.features * d.segments, nn_features(d, expert_rows));
  const int64_t widest = balanced(d.features, ceil_div(d.features, cuts),
                                  std::max<int64_t>(d.feature_unit, 2 * k.lanes));
  return std::clamp<int64_t>(
      kNnBlockBytes / (round_up(widest, width) * static_cast<int64_t>(sizeof(T))), 16, kKc);
}

struct GemmItem {
  Path path;
  int64_t expert, row_begin, row_end, feature_begin, feature_end;
};

// Items of features [first, last) of each segment.
template <class T>
std::vector<GemmItem> gemm_items(const GemmDesc<T>& d, const Kernels<T>& k, int num_threads,
                                 int64_t first, int64_t last) {
  const int64_t E = d.num_experts, wide = last - first, total = wide * d.segments;
  int64_t active = 0;
  for (int64_t e = 0; e < E; ++e) active += d.expert_offsets[e + 1] > d.expert_offsets[e];
  std::vector<GemmItem> items;
  if (wide == 0) return items;
  for (int64_t e = 0; e < E; ++e) {
    const int64_t begin = d.expert_offsets[e], end = d.expert_offsets[e + 1];
    if (begin == end) continue;
    const Path path = path_of(d, k, end - begin);
    int64_t most_rows = kRowBlock, most_features = kFeatureBlock, row_unit = 1;
    int64_t unit = 2 * k.lanes;
    switch (path) {
      case Path::kAmxRows:
      case Path::kAmxPanels:
        most_features = kAmxFeatureBlock;
        most_rows = path == Path::kAmxRows ? 16 * kAmxTokenTiles : kPanelRowBlock;
        row_unit = 16;
        break;
      case Path::kAmxNn:
        most_features = kAmxNnFeatures;
        most_rows = kPanelRowBlock;
        row_unit = 16;
        break;
      case Path::kPanels:
      case Path::kPairPanels:
        // Few rows are read in streams, of a quarter of an item each: the longer the better. More
        // are copied once for all parts of an item.
        most_features = end - begin <= k.stream_rows ? kStreamFeatureBlock : kPanelFeatures;
        most_rows = k.panel_rows;
        break;
      case Path::kQuantPanels:
        most_features = kPanelFeatureBlock;
        most_rows = kPanelRowBlock;
        break;
      case Path::kCodePanels:
      case Path::kBytePanels:
        most_features = kQuantFeatures;
        most_rows = kPanelRowBlock;
        break;
      case Path::kDot:
      case Path::kPairDot:
        // Read once, in streams of a quarter of an item each: the longer the better.
        if (end - begin <= k.dot_tokens) most_features = kStreamFeatureBlock;
        unit = 4;
        break;
      case Path::kStrip:
      case Path::kPairStrip:
        most_features = kStreamFeatureBlock;
        unit = 4;
        break;
      case Path::kQuant8:
        unit = 2 * k.quant.dot8_features;
        most_features = end - begin <= kQuantMaxRows ? kQuantFeatures : kQuantNarrowFeatures;
        most_rows = kPanelRowBlock;
        row_unit = k.dot_tokens;
        break;
      case Path::kQuant4:
        unit = 4;
        most_features = kQuantFeatures;
        break;
      case Path::kPack:
      case Path::kPairPack:
        most_features = kStreamFeatureBlock;
        if (std::min(total, most_features * d.segments) * d.in_features <= kKeptElements) {
          most_rows = kKeptRows;
        }
        break;
      case Path::kNn:
      case Path::kPairNn: {
        const int64_t rows_of_k = path == Path::kNn ? 1 : 2;
        most_features = nn_features(d, end - begin);
        if (ceil_div(d.in_features, rows_of_k) <= nn_depth(d, k, rows_of_k, end - begin)) {
          most_rows = kKeptRows;
        }
        break;
      }
      case Path::kRank:
      case Path::kPairRank:
        most_features = nn_features(d, end - begin);
        break;
      default:
        break;
    }
    const int64_t row_blocks = ceil_div(end - begin, most_rows);
    const int64_t rows = balanced(end - begin, most_rows, row_unit);
    // Enough items that the last ones to finish do not leave the other threads idle for long.
    int64_t feature_blocks = ceil_div(total, most_features);
    if (num_threads > 1) {
      const int64_t wanted = ceil_div<int64_t>(8 * num_threads, active * row_blocks);
      feature_blocks = std::max(feature_blocks, std::min(wanted, std::max<int64_t>(1, total / 64)));
    }
    const int64_t features = balanced(wide, std::max<int64_t>(1, ceil_div(wide, feature_blocks)),
                                      std::max(d.feature_unit, unit));
    for (int64_t f = first; f < last; f += features) {
      for (int64_t r = begin; r < end; r += rows) {
        items.push_back({path, e, r, std::min(end, r + rows), f, std::min(last, f + features)});
      }
    }
  }
  return items;
}

template <class T>
std::vector<GemmItem> gemm_items(const GemmDesc<T>& d, const Kernels<T>& k, int num_threads) {
  return gemm_items(d, k, num_threads, 0, d.features);
}

// src * scale as bfloat16; `buffer` has room for n floats.
inline void load_bf16_row(const Kernels<float>& k, DType type, const void* src, int64_t n,
                          float scale, float* buffer, uint16_t* dst) {
  if (type == DType::kBFloat16 && scale == 1.0f) {
    std::memcpy(dst, src, static_cast<size_t>(n) * 2);
  } else if (type == DType::kFloat32 && scale == 1.0f) {
    k.store_row(DType::kBFloat16, static_cast<const float*>(src), dst, n);
  } else {
    k.load_row(type, src, buffer, n, scale);
    k.store_row(DType::kBFloat16, buffer, dst, n);
  }
}

// Row r of the tokens, kc elements from k0 on; of pairs, when an element is one. What the last pair
// lacks is zero.
template <bool kPairs, class T>
void load_tokens(const GemmDesc<T>& d, const Kernels<T>& k, int64_t r, int64_t k0, int64_t kc,
                 T* dst) {
  if constexpr (kPairs) {
    auto* halves = reinterpret_cast<uint16_t*>(dst);
    const int64_t n = std::min(2 * kc, d.in_features - 2 * k0);
    const char* src = element(row_of(d.a, r), d.a.type, 2 * k0);
    load_bf16_row(k, d.a.type, src, n, 1.0f, nullptr, halves);
    if (n < 2 * kc) halves[n] = 0;
  } else {
    k.load_row(d.a.type, element(row_of(d.a, r), d.a.type, k0), dst, kc,
               d.a_scale ? d.a_scale[r] : T(1));
    if constexpr (sizeof(T) == 4) {
      if (d.k_scale != nullptr) k.quant.multiply_row(d.k_scale + k0, dst, kc);
    }
  }
}

}  // namespace moe_ops::cpu
