// Products of narrow experts, a block of tokens at a time.
//
// A row of 32 or 64 numbers is a few vectors: sorting all slots, writing the products of all of
// them and reading them again for the sum over a token's slots, and calling a function a row cost
// more than multiplying. A block's tokens, its slots by expert and their products stay in L1 and
// L2; the matrices of all experts are panels there, made once a call.
//
// Gradients of weights are summed over a chunk of blocks; chunks are cut by sizes alone and added
// in order, so that bits do not depend on threads.
#pragma once

#include <algorithm>
#include <array>

#include "cpu/gemm/plan.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"
#include "moe_ops/moe_linear_map.h"

namespace moe_ops::cpu {

// 256 slots at K = 2: of 4 experts 64 rows each, 5 tiles; products of 64 columns take 64 KiB.
constexpr int64_t kBlockTokens = 128;
constexpr int64_t kChunkTokens = 256;
constexpr int64_t kMostChunks = 16;
// Widest row: one step over k of every tile, whichever side it is on.
constexpr int64_t kMostWidth = kLdm;

inline int64_t chunk_tokens(const SlotProduct& s) {
  return std::max(kChunkTokens, round_up(ceil_div(s.num_tokens, kMostChunks), kBlockTokens));
}

inline int64_t num_chunks(const SlotProduct& s) { return ceil_div(s.num_tokens, chunk_tokens(s)); }

// About nanoseconds of `products` products of every slot.
inline double slot_product_cost(const SlotProduct& s, int products) {
  return static_cast<double>(s.num_tokens * s.top_k) *
         (static_cast<double>(products * s.rows * s.cols) / 32 + 16);
}

// The slots of tokens [begin, end), by expert and in their order. Valid until the thread makes the
// next one.
struct SlotBlock {
  int64_t begin, end, first;  // tokens; first = begin * K
  const int32_t* offsets;     // [E+1]
  const int32_t* slots;       // [offsets[E]], counted from `first`
  const int32_t* rows;        // [(end - begin) * K], its place in slots or -1
};

inline SlotBlock slot_block(const SlotProduct& s, int64_t begin, int64_t end) {
  const int64_t E = s.num_experts, n = (end - begin) * s.top_k, first = begin * s.top_k;
  const int32_t* ids = s.ids + first;
  int32_t* offsets = scratch<int32_t>(Scratch::kIndex, E + 2 + 2 * n);
  int32_t *slots = offsets + E + 2, *rows = slots + n;
  // offsets[e + 2] counts, then offsets[e + 1] is the next place of e.
  std::fill(offsets, offsets + E + 2, 0);
  for (int64_t i = 0; i < n; ++i) {
    if (ids[i] >= 0) ++offsets[ids[i] + 2];
  }
  for (int64_t e = 0; e < E; ++e) offsets[e + 2] += offsets[e + 1];
  for (int64_t i = 0; i < n; ++i) {
    rows[i] = ids[i] < 0 ? -1 : offsets[ids[i] + 1]++;
    if (ids[i] >= 0) slots[rows[i]] = static_cast<int32_t>(i);
  }
  return {begin, end, first, offsets, slots, rows};
}

// Columns of one panel after the other, so that tiles of two vectors cover a row.
template <class T>
int64_t padded(const Kernels<T>& k, int64_t n) {
  return round_up<int64_t>(n, k.lanes);
}

// The matrices as panels [depth][2 or 1 vectors of outputs], of one expert after the other:
// transposed, those of W x, else those of W^T x. One block of scratch, of the calling thread.
template <class T>
class PanelBank {
 public:
  PanelBank(const Kernels<T>& k, const ExpertMatrices& w, int64_t num_experts, int64_t outputs,
            int64_t depth)
      : size_(padded(k, outputs) * depth) {
    const int64_t W = k.lanes, n = padded(k, outputs);
    panels_ = scratch<T>(Scratch::kTokens, num_experts * size_);
    T* rows = scratch<T>(Scratch::kRows, n * padded(k, depth));
    std::array<const void*, kMostWidth> at;
    for (int64_t e = 0; e < num_experts; ++e) {
      const char* base = element(w.data, w.type, e * w.stride_e);
      T* out = panels_ + e * size_;
      if (w.stride_k == 1) {  // Dense along the depth.
        const int64_t ld = padded(k, depth);
        std::fill(rows + outputs * ld, rows + n * ld, T(0));
        k.load_rows(w.type, base, w.stride_o, outputs, depth, rows, ld, T(1));
        for (int64_t j = 0; j < n; j += 2 * W) {
          const int64_t width = std::min(2 * W, n - j);
          k.transpose(rows + j * ld, ld, width, depth, out + j * depth, width);
        }
      } else {
        for (int64_t d = 0; d < depth; ++d) at[d] = element(base, w.type, d * w.stride_k);
        k.pack_panels(w.type, at.data(), 0, depth, outputs, nullptr, out, 2 * W * depth);
      }
    }
  }

  const T* of(int64_t expert) const { return panels_ + expert * size_; }

 private:
  int64_t size_;
  T* panels_;
};

// c[r] = (bias +) the product of row r with the panels; c has rows of padded(outputs).
template <class T>
void multiply_slots(const Kernels<T>& k, DType type, const void* const* rows, int64_t count,
                    int64_t depth, const T* panels, int64_t outputs, const void* bias, T* c) {
  const int64_t W = k.lanes, n = padded(k, outputs);
  T* a = scratch<T>(Scratch::kPackA, kMaxMr * kLda);
  TileHints none;
  const int64_t tiles = ceil_div<int64_t>(count, k.mr2);
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t r0 = count * i / tiles, m = count * (i + 1) / tiles - r0;
    k.gather_rows(type, rows + r0, m, depth, nullptr, a, kLda);
    T* out = c + r0 * n;
    if (bias != nullptr) {
      for (int64_t r = 0; r < m; ++r) {
        k.load_row(type, bias, out + r * n, outputs, T(1));
        std::fill(out + r * n + outputs, out + (r + 1) * n, T(0));
      }
    }
    for (int64_t j = 0; j < n; j += 2 * W) {
      k.row_a[n - j > W ? 1 : 0][m - 1](depth, a, panels + j * depth, out + j, n, bias != nullptr,
                                        none);
    }
  }
}

// c[i][j] (+)= the sum over r of grad[r][i] * scales[r] * x[r][j], rows of c padded(width of x).
template <class T>
void multiply_outer(const Kernels<T>& k, DType type, const void* const* grad, int64_t grad_width,
                    const void* const* x, int64_t x_width, const T* scales, int64_t count, T* c,
                    bool accumulate) {
  const int64_t W = k.lanes, n = padded(k, x_width);
  T* g = scratch<T>(Scratch::kPackA, kKc * kLdm);
  T* panels = scratch<T>(Scratch::kPackB, kKc * n);
  TileHints none;
  const int64_t tiles = ceil_div<int64_t>(grad_width, k.mr2);
  const int64_t parts = ceil_div(count, kKc);
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t r0 = count * part / parts, rows = count * (part + 1) / parts - r0;
    k.gather_rows(type, grad + r0, rows, grad_width, nullptr, g, kLdm);
    k.pack_panels(type, x + r0, 0, rows, x_width, scales == nullptr ? nullptr : scales + r0, panels,
                  2 * W * rows);
    for (int64_t j = 0; j < n; j += 2 * W) {
      const auto& column = k.col_a[n - j > W ? 1 : 0];
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t i0 = grad_width * i / tiles, i1 = grad_width * (i + 1) / tiles;
        column[i1 - i0 - 1](rows, g + i0, panels + j * rows, c + i0 * n + j, n,
                            accumulate || part > 0, none);
      }
    }
  }
}

// run(chunk, begin, end, first): the blocks of each chunk in order, `first` for its first one.
template <class Fn>
void run_chunks(const SlotProduct& s, const Parallel& par, int products, const Fn& run) {
  const int64_t length = chunk_tokens(s);
  parallel_items(par, num_chunks(s), slot_product_cost(s, products), [&](int64_t chunk) {
    const int64_t begin = chunk * length, end = std::min(s.num_tokens, begin + length);
    for (int64_t t = begin; t < end; t += kBlockTokens) {
      run(chunk, t, std::min(end, t + kBlockTokens), t == begin);
    }
  });
}

// Sums of chunks: [chunks][E], a matrix with padded columns and a bias each. One block of scratch,
// of the calling thread, that a PanelBank is made in: that comes first.
template <class T>
class ChunkSums {
 public:
  ChunkSums(const SlotProduct& s, const Kernels<T>& k, bool wanted) : s_(s), k_(k) {
    const int64_t parts = wanted ? num_chunks(s) * s.num_experts : 0;
    data_ = scratch<T>(Scratch::kRows, parts * (matrix() + bias()));
  }

  int64_t matrix() const { return s_.rows * padded(k_, s_.cols); }
  int64_t bias() const { return padded(k_, s_.rows); }
  T* matrix_of(int64_t chunk, int64_t e) const {
    return data_ + (chunk * s_.num_experts + e) * (matrix() + bias());
  }
  T* bias_of(int64_t chunk, int64_t e) const { return matrix_of(chunk, e) + matrix(); }

  // Into [E, rows, cols] and [E, rows], where they are wanted.
  void add_up(DType type, void* grad_w, void* grad_bias, const Parallel& par) const {
    const int64_t chunks = num_chunks(s_), n = padded(k_, s_.cols);
    parallel_items(
        par, s_.num_experts, static_cast<double>(chunks * s_.num_experts * matrix()) / 8,
        [&](int64_t e) {
          std::array<const void*, kMostChunks + 1> parts;
          T* sum = scratch<T>(Scratch::kTile, std::max(matrix(), bias()));
          if (grad_w != nullptr) {
            for (int64_t c = 0; c < chunks; ++c) parts[c] = matrix_of(c, e);
            k_.weighted_sum(kAccumulate<T>, parts.data(), nullptr, chunks, sum, matrix());
            k_.store_rows(type, sum, n, s_.rows, s_.cols,
                          static_cast<char*>(grad_w) + e * s_.rows * s_.cols * dtype_size(type),
                          s_.cols);
          }
          if (grad_bias == nullptr) return;
          for (int64_t c = 0; c < chunks; ++c) parts[c] = bias_of(c, e);
          k_.weighted_sum(kAccumulate<T>, parts.data(), nullptr, chunks, sum, s_.rows);
          k_.store_row(type, sum, static_cast<char*>(grad_bias) + e * s_.rows * dtype_size(type),
                       s_.rows);
        });
  }

 private:
  const SlotProduct& s_;
  const Kernels<T>& k_;
  T* data_;
};

}  // namespace moe_ops::cpu
