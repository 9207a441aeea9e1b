// The blocked loops over the kernels of kernels.h: which rows, features and panels one work item
// covers. NOTES.md beside this file gives the arithmetic of the block sizes.
//
// Three ways through, all with the sum over k in increasing order inside one accumulator:
//   dot    few rows, weights dense along k: stream each weight row once, vectors along k.
//   nt     weights dense along k: weight rows are the broadcast side and tokens the vector side, so
//          only the (small) block of x is transposed and weights are copied as they lie.
//   nn     weights dense along features: token rows are the broadcast side, weight rows the
//   vectors.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"
#include "moe_ops/grouped_gemm.h"

namespace moe_ops::cpu {

// Most token rows of one item: with 256-deep blocks of fp32 their panel is 96 KiB of L2.
constexpr int64_t kRowBlock = 96;
// Features (of all segments together) of one item: a multiple of every tile height.
constexpr int64_t kFeatureBlock = 252;

// Weight gradients from this size on will not be found in a cache again by whoever reads them.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

inline const void* row_of(const Rows& rows, int64_t r) {
  const int64_t i = rows.index != nullptr ? rows.index[r] : r;
  return static_cast<const char*>(rows.data) + i * rows.stride * dtype_size(rows.type);
}

inline const char* element(const void* base, DType type, int64_t offset) {
  return static_cast<const char*>(base) + offset * dtype_size(type);
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
  const T* a_scale = nullptr;  // [rows] or nullptr
  ExpertMatrices b;
};

struct GemmItem {
  int64_t expert, row_begin, row_end, feature_begin, feature_end;
};

template <class T>
std::vector<GemmItem> gemm_items(const GemmDesc<T>& d, const Kernels<T>& k, int num_threads) {
  const int64_t E = d.num_experts;
  const bool nt = d.b.stride_k == 1;
  int64_t row_blocks = 0;
  for (int64_t e = 0; e < E; ++e) {
    row_blocks += ceil_div(d.expert_offsets[e + 1] - d.expert_offsets[e], kRowBlock);
  }
  // Enough items that the last ones to finish do not leave the other threads idle for long.
  int64_t feature_blocks = ceil_div(d.features * d.segments, kFeatureBlock);
  if (num_threads > 1) {
    const int64_t wanted = ceil_div<int64_t>(8 * num_threads, std::max<int64_t>(row_blocks, 1));
    const int64_t most = std::max<int64_t>(1, d.features * d.segments / 64);
    feature_blocks = std::max(feature_blocks, std::min(wanted, most));
  }
  const int64_t unit = std::max<int64_t>(d.feature_unit, nt ? 4 : 2 * k.lanes);
  const int64_t feature_block =
      balanced(d.features, std::max<int64_t>(1, ceil_div(d.features, feature_blocks)), unit);
  std::vector<GemmItem> items;
  items.reserve(static_cast<size_t>(row_blocks * ceil_div(d.features, feature_block)));
  for (int64_t e = 0; e < E; ++e) {
    const int64_t begin = d.expert_offsets[e], end = d.expert_offsets[e + 1];
    if (begin == end) continue;
    const int64_t block = balanced(end - begin, kRowBlock, nt ? k.lanes : 1);
    for (int64_t f = 0; f < d.features; f += feature_block) {
      for (int64_t r = begin; r < end; r += block) {
        items.push_back(
            {e, r, std::min(end, r + block), f, std::min(d.features, f + feature_block)});
      }
    }
  }
  return items;
}

// Epilogue: fn(expert, row, feature_begin, n, T* values0, T* values1); values1 is the second
// segment. It may overwrite the values.
template <class T, class Epilogue>
void dot_item(const GemmDesc<T>& d, const Kernels<T>& k, const GemmItem& it, const Epilogue& fn) {
  const int64_t m = it.row_end - it.row_begin;
  const int64_t n = it.feature_end - it.feature_begin;
  const int64_t K = d.in_features;
  const int64_t ldx = round_up<int64_t>(K, k.lanes);
  T* x = scratch<T>(Scratch::kTokens, m * ldx);
  for (int64_t t = 0; t < m; ++t) {
    const int64_t r = it.row_begin + t;
    k.load_row(d.a.type, row_of(d.a, r), x + t * ldx, K, d.a_scale ? d.a_scale[r] : T(1));
    std::fill(x + t * ldx + K, x + (t + 1) * ldx, T(0));
  }
  const int64_t ldo = n * d.segments;
  T* out = scratch<T>(Scratch::kTile, m * ldo);
  for (int s = 0; s < d.segments; ++s) {
    for (int64_t f = 0; f < n; f += kDotFeatures) {
      const int features = static_cast<int>(std::min(kDotFeatures, n - f));
      const void* w = element(
          d.b.data, d.b.type,
          it.expert * d.b.stride_e + (s * d.features + it.feature_begin + f) * d.b.stride_o);
      for (int64_t t = 0; t < m; t += k.dot_tokens) {
        const int tokens = static_cast<int>(std::min<int64_t>(k.dot_tokens, m - t));
        k.dot(d.b.type, features, tokens, K, w, d.b.stride_o, x + t * ldx, ldx,
              out + t * ldo + s * n + f, ldo);
      }
    }
  }
  for (int64_t t = 0; t < m; ++t) {
    fn(it.expert, it.row_begin + t, it.feature_begin, n, out + t * ldo, out + t * ldo + n);
  }
}

template <class T, class Epilogue>
void nt_item(const GemmDesc<T>& d, const Kernels<T>& k, const GemmItem& it, const Epilogue& fn) {
  const int64_t W = k.lanes;
  const int64_t m = it.row_end - it.row_begin;
  const int64_t n = it.feature_end - it.feature_begin;
  const int64_t total = n * d.segments;
  const int64_t padded_m = round_up(m, W);
  const int64_t padded_n = round_up(total, W);
  T* a = scratch<T>(Scratch::kPackA, kMaxMr * kLda);
  T* panels = scratch<T>(Scratch::kPackB, padded_m * kKc);
  T* rows = scratch<T>(Scratch::kTokens, std::max(2 * W * kLda, padded_m * padded_n));
  T* tile = scratch<T>(Scratch::kTile, padded_n * padded_m);
  const char* w = element(d.b.data, d.b.type, it.expert * d.b.stride_e);

  for (int64_t k0 = 0; k0 < d.in_features; k0 += kKc) {
    const int64_t kc = std::min(kKc, d.in_features - k0);
    // x of this block, one panel of [kc][W or 2W] after the other.
    for (int64_t t0 = 0; t0 < padded_m; t0 += 2 * W) {
      const int64_t width = std::min(2 * W, padded_m - t0);
      for (int64_t t = 0; t < width; ++t) {
        const int64_t r = it.row_begin + t0 + t;
        if (r < it.row_end) {
          k.load_row(d.a.type, element(row_of(d.a, r), d.a.type, k0), rows + t * kLda, kc,
                     d.a_scale ? d.a_scale[r] : T(1));
        } else {
          std::fill(rows + t * kLda, rows + t * kLda + kc, T(0));
        }
      }
      k.transpose(rows, kLda, width, kc, panels + t0 * kKc, width);
    }
    const int64_t mr = padded_m == W ? k.mr1 : k.mr2;
    const int64_t blocks = ceil_div(total, mr);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t i0 = total * b / blocks, i1 = total * (b + 1) / blocks;
      for (int64_t i = i0; i < i1; ++i) {
        const int64_t feature = i / n * d.features + it.feature_begin + i % n;
        k.load_row(d.b.type, element(w, d.b.type, feature * d.b.stride_o + k0), a + (i - i0) * kLda,
                   kc, T(1));
      }
      // The tiles of this block fetch the weights of the next one: the same k further down, or the
      // first rows of the next k.
      const bool same_k = b + 1 < blocks;
      const int64_t next_i = same_k ? i1 : 0;
      const int64_t next_k = same_k ? k0 : k0 + kKc;
      TileHints next;
      if (next_k < d.in_features) {
        const int64_t feature = next_i / n * d.features + it.feature_begin + next_i % n;
        next.base = element(w, d.b.type, feature * d.b.stride_o + next_k);
        next.stride = d.b.stride_o * dtype_size(d.b.type);
        next.rows = std::min(mr, n - next_i % n);
        next.bytes = std::min(kKc, d.in_features - next_k) * dtype_size(d.b.type);
        next.spread(kc * ceil_div(padded_m, 2 * W));
      }
      for (int64_t t0 = 0; t0 < padded_m; t0 += 2 * W) {
        const int nv = padded_m - t0 > W ? 2 : 1;
        k.row_a[nv - 1][i1 - i0 - 1](kc, a, panels + t0 * kKc, tile + i0 * padded_m + t0, padded_m,
                                     k0 > 0, next);
      }
    }
  }
  k.transpose(tile, padded_m, padded_n, m, rows, padded_n);
  for (int64_t t = 0; t < m; ++t) {
    fn(it.expert, it.row_begin + t, it.feature_begin, n, rows + t * padded_n,
       rows + t * padded_n + n);
  }
}

template <class T, class Epilogue>
void nn_item(const GemmDesc<T>& d, const Kernels<T>& k, const GemmItem& it, const Epilogue& fn) {
  const int64_t W = k.lanes;
  const int64_t m = it.row_end - it.row_begin;
  const int64_t n = it.feature_end - it.feature_begin;
  const int64_t padded_n = round_up(n, W);
  const int64_t ldc = padded_n * d.segments;
  T* a = scratch<T>(Scratch::kPackA, kRowBlock * kLda);
  T* panels = scratch<T>(Scratch::kPackB, padded_n * kKc);
  T* tile = scratch<T>(Scratch::kTile, m * ldc);
  const int64_t blocks = ceil_div<int64_t>(m, k.mr2);
  const void* w_rows[kKc];

  for (int64_t k0 = 0; k0 < d.in_features; k0 += kKc) {
    const int64_t kc = std::min(kKc, d.in_features - k0);
    for (int64_t t = 0; t < m; ++t) {
      const int64_t r = it.row_begin + t;
      k.load_row(d.a.type, element(row_of(d.a, r), d.a.type, k0), a + t * kLda, kc,
                 d.a_scale ? d.a_scale[r] : T(1));
    }
    for (int64_t kk = 0; kk < kc; ++kk) {
      w_rows[kk] = element(d.b.data, d.b.type,
                           it.expert * d.b.stride_e + (k0 + kk) * d.b.stride_k + it.feature_begin);
    }
    for (int s = 0; s < d.segments; ++s) {
      k.pack_panels(d.b.type, w_rows, s * d.features * dtype_size(d.b.type), kc, n, nullptr,
                    panels);
      // These tiles fetch the weights of the next block: the other segment, or the next k.
      const bool same_k = s + 1 < d.segments;
      const int64_t next_k = same_k ? k0 : k0 + kKc;
      TileHints next;
      if (next_k < d.in_features) {
        next.base =
            element(w_rows[0], d.b.type, same_k ? (s + 1) * d.features : kKc * d.b.stride_k);
        next.stride = d.b.stride_k * dtype_size(d.b.type);
        next.rows = std::min(kKc, d.in_features - next_k);
        next.bytes = n * dtype_size(d.b.type);
        next.spread(kc * blocks * ceil_div(padded_n, 2 * W));
      }
      for (int64_t j = 0; j < padded_n; j += 2 * W) {
        const int nv = padded_n - j > W ? 2 : 1;
        for (int64_t b = 0; b < blocks; ++b) {
          const int64_t i0 = m * b / blocks, i1 = m * (b + 1) / blocks;
          k.row_a[nv - 1][i1 - i0 - 1](kc, a + i0 * kLda, panels + j * kc,
                                       tile + i0 * ldc + s * padded_n + j, ldc, k0 > 0, next);
        }
      }
    }
  }
  for (int64_t t = 0; t < m; ++t) {
    fn(it.expert, it.row_begin + t, it.feature_begin, n, tile + t * ldc, tile + t * ldc + padded_n);
  }
}

template <class T, class Epilogue>
void gemm(const GemmDesc<T>& d, const Parallel& par, const Epilogue& fn) {
  const Kernels<T>& k = kernels<T>();
  const int64_t rows = d.expert_offsets[d.num_experts];
  if (rows == 0 || d.features == 0) return;
  const std::vector<GemmItem> items = gemm_items(d, k, par.num_threads);
  // Elementary operations, in units of about a nanosecond.
  const double cost = static_cast<double>(rows) * static_cast<double>(d.features * d.segments) *
                      (static_cast<double>(d.in_features) / 16 + 1);
  parallel_items(par, static_cast<int64_t>(items.size()), cost, [&](int64_t i) {
    const GemmItem& it = items[i];
    const int64_t expert_rows = d.expert_offsets[it.expert + 1] - d.expert_offsets[it.expert];
    if (d.in_features == 0) {
      const int64_t n = it.feature_end - it.feature_begin;
      T* zeros = scratch<T>(Scratch::kTile, 2 * n);
      for (int64_t r = it.row_begin; r < it.row_end; ++r) {
        std::fill(zeros, zeros + 2 * n, T(0));
        fn(it.expert, r, it.feature_begin, n, zeros, zeros + n);
      }
    } else if (d.b.stride_k != 1) {
      nn_item(d, k, it, fn);
    } else if (expert_rows <= k.dot_max_rows) {
      dot_item(d, k, it, fn);
    } else {
      nt_item(d, k, it, fn);
    }
  });
}

// out[e, o, j] = sum over rows r of e: grad[r, o] * a[r, j]. Row blocks are the depth of the tiles;
// both operands are copied as they lie. One item covers the features [o_begin, o_end) of one
// expert.
template <class T>
void wgrad_item(const GroupedWgradParams& p, const Kernels<T>& k, int64_t e, int64_t o_begin,
                int64_t o_end) {
  const int64_t W = k.lanes, O = p.out_features, J = p.in_features;
  const int64_t size = dtype_size(p.out_type);
  const int64_t begin = p.expert_offsets[e], end = p.expert_offsets[e + 1];
  char* out = static_cast<char*>(p.out) + e * O * J * size;
  if (begin == end) {
    std::memset(out + o_begin * J * size, 0, static_cast<size_t>((o_end - o_begin) * J * size));
    return;
  }
  const auto* grad_scale = static_cast<const T*>(p.grad_scale);
  const auto* a_scale = static_cast<const T*>(p.a_scale);
  // Whole panels of the accumulate type go straight to their place.
  const bool same_type = p.out_type == kAccumulate<T>;
  const int64_t o_block = balanced(o_end - o_begin, kFeatureBlock / 2, 1);
  const int64_t j_block = balanced(J, 256, 2 * W);
  T* g = scratch<T>(Scratch::kPackA, kKc * kLdm);
  T* panels = scratch<T>(Scratch::kPackB, round_up(j_block, W) * kKc);
  T* tile = scratch<T>(Scratch::kTile, o_block * round_up(j_block, W));
  const void* a_rows[kKc];
  // A large result, written once and in whole vectors, goes past the cache.
  TileHints hints;
  const int64_t vector = W * static_cast<int64_t>(sizeof(T));
  const bool large = p.num_experts * O * J * size >= kStreamBytes;
  const bool streamed = large && k.streams && same_type && end - begin <= kKc && J % W == 0 &&
                        reinterpret_cast<uintptr_t>(out) % vector == 0;

  for (int64_t j0 = 0; j0 < J; j0 += j_block) {
    const int64_t j1 = std::min(J, j0 + j_block);
    const int64_t ldc = round_up(j1 - j0, W);
    for (int64_t o0 = o_begin; o0 < o_end; o0 += o_block) {
      const int64_t n = std::min(o_block, o_end - o0);
      const int64_t blocks = ceil_div<int64_t>(n, k.mr2);
      for (int64_t r0 = begin; r0 < end; r0 += kKc) {
        const int64_t kc = std::min(kKc, end - r0);
        // A short expert's rows are packed once for all feature blocks.
        if (o0 == o_begin || end - begin > kKc) {
          for (int64_t r = 0; r < kc; ++r) a_rows[r] = row_of(p.a, r0 + r);
          k.pack_panels(p.a.type, a_rows, j0 * dtype_size(p.a.type), kc, j1 - j0,
                        a_scale ? a_scale + r0 : nullptr, panels);
        }
        for (int64_t r = 0; r < kc; ++r) {
          k.load_row(p.grad.type, element(row_of(p.grad, r0 + r), p.grad.type, o0), g + r * kLdm, n,
                     grad_scale ? grad_scale[r0 + r] : T(1));
        }
        for (int64_t j = j0; j < j1; j += 2 * W) {
          const int64_t valid = std::min(2 * W, j1 - j);
          const bool direct = same_type && valid % W == 0;
          T* c = direct ? reinterpret_cast<T*>(out) + o0 * J + j : tile + (j - j0);
          const int64_t ld = direct ? J : ldc;
          const int nv = valid > W ? 2 : 1;
          hints.stream = streamed && direct;
          for (int64_t b = 0; b < blocks; ++b) {
            const int64_t i0 = n * b / blocks, i1 = n * (b + 1) / blocks;
            k.col_a[nv - 1][i1 - i0 - 1](kc, g + i0, panels + (j - j0) * kc, c + i0 * ld, ld,
                                         r0 > begin, hints);
          }
        }
      }
      for (int64_t j = j0; j < j1; j += 2 * W) {
        const int64_t valid = std::min(2 * W, j1 - j);
        if (same_type && valid % W == 0) continue;
        for (int64_t o = 0; o < n; ++o) {
          k.store_row(p.out_type, tile + o * ldc + (j - j0), out + ((o0 + o) * J + j) * size,
                      valid);
        }
      }
    }
  }
  if (streamed) k.stream_fence();
}

template <class T>
void wgrad(const GroupedWgradParams& p, const Parallel& par) {
  const Kernels<T>& k = kernels<T>();
  const int64_t E = p.num_experts, O = p.out_features, J = p.in_features;
  if (O == 0 || J == 0) return;
  // The output is usually fresh memory, and the first write into a huge page clears all of it. Two
  // threads that meet in one page both clear it, so an item covers a page at least, unless that
  // leaves threads idle.
  constexpr int64_t kHugePage = int64_t{2} << 20;
  int64_t features = std::max(kFeatureBlock / 2, ceil_div(kHugePage, J * dtype_size(p.out_type)));
  if (E * ceil_div(O, features) < 4 * par.num_threads) features = kFeatureBlock / 2;
  features = balanced(O, features, 1);
  const int64_t parts = ceil_div(O, features);
  const double rows = static_cast<double>(p.expert_offsets[E]);
  const double cost = static_cast<double>(O * J) * (rows / 16 + static_cast<double>(E));
  parallel_items(par, E * parts, cost, [&](int64_t item) {
    const int64_t o = item % parts * features;
    wgrad_item(p, k, item / parts, o, std::min(O, o + features));
  });
}

}  // namespace moe_ops::cpu
