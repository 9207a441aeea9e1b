// The gradients of weights and biases: sums over an expert's rows.
#pragma once

#include "cpu/gemm/amx.h"
#include "cpu/gemm/desc.h"
#include "cpu/gemm/pack_b.h"
#include "cpu/runtime/huge_pages.h"

namespace moe_ops::cpu {

// Room for the panels of x where sums are added to memory: an eighth of an L2.
constexpr int64_t kAddBytes = int64_t{128} << 10;
// Up to so many steps a tile of four rows computes as fast as memory delivers its sums.
constexpr int64_t kAddLowDepth = 8;

// Rows of an expert, on average, up to which an item is several pages of the result.
constexpr int64_t kFewWgradRows = 32;
// Leading dimension of the copies of `grad`. At 128, the lines that a tile reads, one a step, would
// meet in an eighth of the sets of an L1.
constexpr int64_t kGradLd = kLdm + 16;

// Computes an item of out[e, o, j] = sum over rows r of e: grad[r, o] * a[r, j]. Row blocks are the
// depth of the tiles; both operands are copied in their layout. One item covers the features
// [o_begin, o_end) of one expert.
template <class Op, class T>
void wgrad_item(const GroupedWgradParams& p, const GemmKernels<T>& k, int64_t e, int64_t o_begin,
                int64_t o_end) {
  constexpr int64_t kRows = Op::kSteps;  // rows of an element
  const int64_t W = k.lanes, O = p.out_features, J = p.in_features;
  const int64_t size = dtype_size(p.out_type);
  const int64_t begin = p.expert_offsets[e], end = p.expert_offsets[e + 1];
  char* out = static_cast<char*>(p.out) + e * O * J * size;
  if (begin == end) {
    if (p.accumulate) return;
    std::memset(out + o_begin * J * size, 0, static_cast<size_t>((o_end - o_begin) * J * size));
    return;
  }
  const auto* grad_scale = static_cast<const T*>(p.grad_scale);
  const auto* a_scale = static_cast<const T*>(p.a_scale);
  const auto& tiles = Op::col_a(k);
  const bool large = !p.accumulate && p.num_experts * O * J * size >= kStreamBytes;
  const int64_t unit = kRows * W;  // width of the narrowest panel
  const int64_t depth = std::min(ceil_div(end - begin, kRows), kKc);
  // The copies of one block of rows serve all columns and all features of the item.
  const bool one = end - begin <= kRows * kKc;
  // A large result, written once and in whole lines, goes past the cache.
  const int64_t line = kLineBytes / static_cast<int64_t>(sizeof(T));
  // Sums of pairs that are complete in one tile are rounded there.
  const bool half = Op::kBf16 && p.out_type == DType::kBFloat16 && one && !p.accumulate;
  const bool by_tiles = p.out_type == kAccumulate<T> || half;  // what they can write themselves
  const bool streamed = large && k.streams && by_tiles && one && J % std::max(unit, line) == 0 &&
                        reinterpret_cast<uintptr_t>(out) % kLineBytes == 0;
  // Whole panels go straight to their place. Large ones that do not pass the cache are summed in a
  // tile first, and written once.
  const bool in_place = by_tiles && (streamed || !large);
  // Sums that are added to memory pass through the core along rows, as long as the panels of x fit;
  // so do lines that are written in halves.
  const bool adding = p.accumulate && p.num_experts * O * J * size >= kStreamBytes;
  const bool along_rows = adding || (streamed && (W < line || half));
  int64_t most_j = 256, most_o = kFeatureBlock / 2, height = k.mr2;
  if (along_rows) {
    most_j = std::max(most_j, kAddBytes / (depth * static_cast<int64_t>(sizeof(T))));
  }
  if (adding) {
    if (depth <= kAddLowDepth) height = std::min<int64_t>(height, 4);
    if (!in_place) most_o = std::max(height, 28 / height * height);
  }
  const int64_t o_block = balanced(o_end - o_begin, most_o, 1);
  const int64_t j_block = balanced(J, most_j, 2 * W), padded_j = round_up(j_block, unit);
  const int64_t g_blocks = one ? ceil_div(o_end - o_begin, o_block) : 1;
  ScratchScope scratch;
  T* copies = scratch.take<T>(Scratch::kPackA, g_blocks * depth * kGradLd);
  T* panels =
      scratch.take<T>(Scratch::kPackB, ceil_div(padded_j, 2 * W) * (2 * W * depth + kPanelPad));
  T* tile = scratch.take<T>(Scratch::kTile, o_block * padded_j);
  const int64_t half_rows = std::max(j_block, kLdm);
  auto* halves = Op::kBf16
                     ? scratch.take<uint16_t>(Scratch::kTokens, (kRows * depth + 2) * half_rows)
                     : nullptr;
  // A row in fp32 on its way to bfloat16. `tile` holds sums of earlier blocks of rows meanwhile.
  float* widened = Op::kBf16 ? scratch.take<float>(Scratch::kRowAsFloat, half_rows) : nullptr;
  const void* a_rows[kRows * kKc];
  TileOptions options;
  options.lda = kGradLd;
  const auto pack_a = [&](int64_t r0, int64_t rows, int64_t j0, int64_t cols) {
    const int64_t offset = j0 * dtype_size(p.a.type);
    for (int64_t r = 0; r < rows; ++r) a_rows[r] = row_of(p.a, r0 + r);
    if constexpr (Op::kBf16) {
      for (int64_t r = 0; r < rows; ++r) {
        const char* src = static_cast<const char*>(a_rows[r]) + offset;
        const float scale = a_scale ? a_scale[r0 + r] : 1.0f;
        a_rows[r] = src;
        if (p.a.type != DType::kBFloat16 || scale != 1.0f) {
          uint16_t* copy = halves + r * half_rows;
          load_bf16_row(p.a.type, src, cols, scale, widened, copy);
          a_rows[r] = copy;
        }
      }
      if (rows % 2 != 0) a_rows[rows] = nullptr;
      const int64_t padded = round_up<int64_t>(rows, 2);
      k.bf16_pack_b(reinterpret_cast<const uint16_t* const*>(a_rows), 0, padded, cols,
                    reinterpret_cast<uint16_t*>(panels), padded * 2 * W + 2 * kPanelPad);
    } else {
      k.pack_b({p.a.type, a_rows, rows, cols}, offset, a_scale ? a_scale + r0 : nullptr, panels,
               rows * 2 * W + kPanelPad);
    }
  };
  const auto pack_grad = [&](int64_t r0, int64_t rows, int64_t o0, int64_t n, T* g) {
    const auto row = [&](int64_t r) { return element(row_of(p.grad, r), p.grad.type, o0); };
    const auto scale = [&](int64_t r) { return grad_scale ? grad_scale[r] : T(1); };
    if constexpr (Op::kBf16) {
      uint16_t* two = halves + kRows * depth * half_rows;
      for (int64_t r = 0; r < rows; r += 2) {
        for (int64_t i = 0; i < 2; ++i) {
          uint16_t* dst = two + i * half_rows;
          if (r + i < rows) {
            load_bf16_row(p.grad.type, row(r0 + r + i), n, scale(r0 + r + i), widened, dst);
          } else {
            std::fill(dst, dst + n, uint16_t{0});
          }
        }
        k.bf16_interleave(two, two + half_rows, g + r / 2 * kGradLd, n);
      }
    } else {
      for (int64_t r = 0; r < rows; ++r) {
        row_kernels<T>().load_row(p.grad.type, row(r0 + r), g + r * kGradLd, n, scale(r0 + r));
      }
    }
  };

  for (int64_t j0 = 0; j0 < J; j0 += j_block) {
    const int64_t j1 = std::min(J, j0 + j_block);
    const int64_t ldc = round_up(j1 - j0, unit);
    const int64_t j_direct = in_place ? j0 + (j1 - j0) / unit * unit : j0;
    for (int64_t o0 = o_begin; o0 < o_end; o0 += o_block) {
      const int64_t n = std::min(o_block, o_end - o0);
      const int64_t blocks = ceil_div<int64_t>(n, height);
      const BalancedPartition tile_rows(n, blocks);
      T* g = copies + (one ? (o0 - o_begin) / o_block * depth * kGradLd : 0);
      for (int64_t r0 = begin; r0 < end; r0 += kRows * kKc) {
        const int64_t rows = std::min(kRows * kKc, end - r0), kc = ceil_div(rows, kRows);
        if (o0 == o_begin || !one) pack_a(r0, rows, j0, j1 - j0);
        if (j0 == 0 || !one) pack_grad(r0, rows, o0, n, g);
        const auto run_tile = [&](int64_t j, int64_t b) {
          const int64_t width = std::min(2 * W, ldc - (j - j0));
          const bool direct = j + width <= j_direct;
          const int nv = width > W ? 2 : 1;
          const int64_t i0 = tile_rows.begin(b), i1 = tile_rows.begin(b + 1);
          T* c = direct ? reinterpret_cast<T*>(out + ((o0 + i0) * J + j) * size)
                        : tile + i0 * ldc + (j - j0);
          options.stream = streamed && direct;
          options.bf16_out = half && direct;
          tiles[nv - 1][i1 - i0 - 1](
              kc, g + i0, panels + (j - j0) / (2 * W) * (2 * W * kc + kPanelPad),
              {c, direct ? J : ldc, r0 > begin || (direct && p.accumulate)}, options);
        };
        if (along_rows) {
          for (int64_t b = 0; b < blocks; ++b) {
            for (int64_t j = j0; j < j1; j += 2 * W) run_tile(j, b);
          }
        } else {
          for (int64_t j = j0; j < j1; j += 2 * W) {
            for (int64_t b = 0; b < blocks; ++b) run_tile(j, b);
          }
        }
      }
      // Stores the sums that went through the tile: all columns of another type, or those of a
      // partial last panel, which shares its panel of two vectors with a whole one.
      const int64_t first = in_place ? j0 + (j_direct - j0) / (2 * W) * (2 * W) : j0;
      const int64_t from = j_direct == j1 ? j1 : first;
      for (int64_t o = 0; from < j1 && o < n; ++o) {
        T* row = tile + o * ldc + (from - j0);
        char* dst = out + ((o0 + o) * J + from) * size;
        if (p.accumulate) row_kernels<T>().axpy(p.out_type, dst, T(1), row, j1 - from);
        if (large) {
          row_kernels<T>().stream_row(p.out_type, row, dst, j1 - from);
        } else {
          row_kernels<T>().store_row(p.out_type, row, dst, j1 - from);
        }
      }
    }
  }
  if (large) row_kernels<T>().stream_fence();
}

// The items of one weight gradient: blocks of `features` of one expert after the other.
struct WgradPlan {
  int64_t features = 0, parts = 0, count = 0;
  double cost = 0;
};

inline WgradPlan wgrad_plan(const GroupedWgradParams& p, int num_threads) {
  const int64_t E = p.num_experts, O = p.out_features, J = p.in_features;
  WgradPlan plan;
  if (O == 0 || J == 0) return plan;
  // The output is usually fresh memory, and the first write into a huge page clears all of it. Two
  // threads that meet in one page both clear it, so an item covers a page at least, unless that
  // leaves threads idle.
  // Each item copies the rows of x. The fewer there are, the less work the copies serve.
  const int64_t item_bytes =
      p.expert_offsets[E] <= kFewWgradRows * E ? int64_t{3 * kHugePage} : int64_t{kHugePage};
  int64_t features = std::max(kFeatureBlock / 2, ceil_div(item_bytes, J * dtype_size(p.out_type)));
  if (E * ceil_div(O, features) < 4 * num_threads) features = kFeatureBlock / 2;
  plan.features = balanced(O, features, 1);
  plan.parts = ceil_div(O, plan.features);
  plan.count = E * plan.parts;
  const double rows = static_cast<double>(p.expert_offsets[E]);
  plan.cost = static_cast<double>(O * J) * (rows / 16 + static_cast<double>(E));
  return plan;
}

template <class T>
void run_wgrad_item(const GroupedWgradParams& p, const GemmKernels<T>& k, const WgradPlan& plan,
                    int64_t item) {
  const int64_t e = item / plan.parts, begin = item % plan.parts * plan.features;
  const int64_t end = std::min(p.out_features, begin + plan.features);
  if constexpr (sizeof(T) == 4) {
    // In a bfloat16 block one operand is bfloat16 (tokens, or the gradient of the output); the
    // other may be an intermediate result in fp32.
    const bool pairs =
        k.has_bf16 && (p.grad.type == DType::kBFloat16 || p.a.type == DType::kBFloat16);
    const int64_t expert_rows = p.expert_offsets[e + 1] - p.expert_offsets[e];
    if (pairs && k.amx.panel != nullptr && expert_rows >= kAmxMinRows) {
      return amx_wgrad_item(p, k, e, begin, end);
    }
    if (pairs && expert_rows <= k.bf16_max_rows) return wgrad_item<Bf16>(p, k, e, begin, end);
  }
  wgrad_item<Wide>(p, k, e, begin, end);
}

// Sums over the rows of each expert: the gradient of a bias. An item is a block of features.
constexpr int64_t kSumFeatures = 512;

inline int64_t sum_items(const GroupedSumParams& p) {
  return p.num_experts * ceil_div(p.features, kSumFeatures);
}

inline double sum_cost(const GroupedSumParams& p) {
  return static_cast<double>(p.expert_offsets[p.num_experts] + p.num_experts) *
         static_cast<double>(p.features) / 8.0;
}

template <class T>
void run_sum_item(const GroupedSumParams& p, int64_t item) {
  const int64_t O = p.features, blocks = ceil_div(O, kSumFeatures);
  const int64_t e = item / blocks, f = item % blocks * kSumFeatures;
  const int64_t n = std::min(kSumFeatures, O - f);
  const auto* scale = static_cast<const T*>(p.scale);
  ScratchScope scratch;
  T* sum = scratch.take<T>(Scratch::kTile, n);
  std::fill(sum, sum + n, T(0));
  for (int64_t r = p.expert_offsets[e]; r < p.expert_offsets[e + 1]; ++r) {
    row_kernels<T>().axpy(p.rows.type, element(row_of(p.rows, r), p.rows.type, f),
                          scale ? scale[r] : T(1), sum, n);
  }
  row_kernels<T>().store_row(p.out_type, sum,
                             static_cast<char*>(p.out) + (e * O + f) * dtype_size(p.out_type), n);
}

}  // namespace moe_ops::cpu
