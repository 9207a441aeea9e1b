// Products of small experts, a block of tokens at a time.
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

#include "cpu/gemm/desc.h"
#include "cpu/gemm/small_gemm.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/workspace.h"
#include "moe_ops/batch_invariant.h"
#include "moe_ops/routing.h"

namespace moe_ops::cpu {

// 256 slots at K = 2: of 4 experts 64 rows each, 5 tiles; products of 64 columns take 64 KiB.
constexpr int64_t kBlockTokens = 128;
constexpr int64_t kChunkTokens = 256;
constexpr int64_t kMostChunks = 16;
// Widest row: one step over k of every tile, whichever side it is on.
constexpr int64_t kMostWidth = kLdm;
// So many rows of an expert in a block that tiles are full and making panels costs little.
constexpr int64_t kMinBlockRows = 16;
// Most weights of all experts: they stay in an L2.
constexpr int64_t kMostBlockWeights = int64_t{1} << 17;

// Sizes by which an operation is run in blocks or not. num_tokens counts only if results may depend
// on it bitwise.
struct BlockedSizes {
  int64_t num_tokens, top_k, num_experts;
  int64_t narrowest, widest;  // of all rows
  int64_t weights;            // of an expert
  DType type;
};

inline bool takes_blocks(const BlockedSizes& s) {
  if (s.narrowest == 0 || s.widest > kMostWidth) return false;
  if (s.num_experts * s.weights > kMostBlockWeights) return false;
  const int64_t slots = std::min(s.num_tokens, kBlockTokens) * s.top_k;
  if (slots < kMinBlockRows * s.num_experts && !batch_invariant()) return false;
  // AMX multiplies bfloat16 faster than anything else does.
  return s.type != DType::kBFloat16 || gemm_kernels<float>().amx.panel == nullptr;
}

inline int64_t chunk_tokens(int64_t num_tokens) {
  return std::max(kChunkTokens, round_up(ceil_div(num_tokens, kMostChunks), kBlockTokens));
}

inline int64_t num_chunks(int64_t num_tokens) {
  return ceil_div(num_tokens, chunk_tokens(num_tokens));
}

// Returns whether products of all slots with a matrix [rows, cols] of their experts run in blocks.
inline bool takes_blocks(const Routing& r, int64_t rows, int64_t cols, DType type) {
  return takes_blocks({r.num_tokens, r.top_k, r.num_experts, std::min(rows, cols),
                       std::max(rows, cols), rows * cols, type});
}

// Returns the approximate nanoseconds of so many multiplications per slot.
inline double slot_product_cost(const Routing& r, int64_t multiplications) {
  return static_cast<double>(r.num_slots()) * (static_cast<double>(multiplications) / 32 + 16);
}

// The slots of tokens [begin, end) that have an expert, by expert and in their order, in scratch of
// the caller's.
struct TokenBlock {
  int64_t begin, end, first;   // tokens; first = begin * K
  const int32_t* offsets;      // [E+1]
  const int32_t* slots;        // [offsets[E]], counted from `first`
  const int32_t* tokens;       // [offsets[E]], theirs
  const int32_t* rows;         // [(end - begin) * K], its place in slots or -1
  const int32_t* sorted_rows;  // [E]; of a sorted routing, the row of the call that an expert's
                               // first one in the block is
  int64_t num_slots() const { return rows_end - rows; }
  const int32_t* rows_end;
};

// Finds the slots of a block by ids, for a routing without maps.
template <class Index>
void find_block_slots(const Routing& r, int64_t first, int64_t n, int32_t* offsets, int32_t* slots,
                      int32_t* rows) {
  const int64_t E = r.num_experts;
  const Index* ids = static_cast<const Index*>(r.topk_ids.data) + first;
  const auto valid = [&](int64_t i) { return ids[i] >= 0 && ids[i] < E; };
  // offsets[e + 2] counts, then offsets[e + 1] is the next place of e.
  std::fill(offsets, offsets + E + 2, 0);
  for (int64_t i = 0; i < n; ++i) {
    if (valid(i)) ++offsets[ids[i] + 2];
  }
  for (int64_t e = 0; e < E; ++e) offsets[e + 2] += offsets[e + 1];
  for (int64_t i = 0; i < n; ++i) {
    rows[i] = -1;
    if (!valid(i)) continue;
    rows[i] = offsets[ids[i] + 1]++;
    slots[rows[i]] = static_cast<int32_t>(i);
  }
}

// Finds the rows of a block in a sorted routing: an expert's rows are in the order of slots, so
// those of a block are contiguous.
inline void find_block_rows(const Routing& r, int64_t first, int64_t n, int32_t* offsets,
                            int32_t* slots, int32_t* rows, int32_t* sorted_rows) {
  std::fill(rows, rows + n, -1);
  offsets[0] = 0;
  for (int64_t e = 0; e < r.num_experts; ++e) {
    const int32_t* stop = r.row_to_slot + r.expert_offsets[e + 1];
    const int32_t* at = std::lower_bound(r.row_to_slot + r.expert_offsets[e], stop, first);
    sorted_rows[e] = static_cast<int32_t>(at - r.row_to_slot);
    int32_t row = offsets[e];
    for (; at < stop && *at < first + n; ++at, ++row) {
      rows[*at - first] = row;
      slots[row] = static_cast<int32_t>(*at - first);
    }
    offsets[e + 1] = row;
  }
}

inline TokenBlock token_block(ScratchScope& scratch, const Routing& r, int64_t begin, int64_t end) {
  const int64_t E = r.num_experts, n = (end - begin) * r.top_k, first = begin * r.top_k;
  int32_t* offsets = scratch.take<int32_t>(Scratch::kIndex, 2 * E + 2 + 3 * n);
  int32_t *sorted_rows = offsets + E + 2, *slots = sorted_rows + E, *rows = slots + n;
  int32_t* tokens = rows + n;
  if (r.sorted()) {
    find_block_rows(r, first, n, offsets, slots, rows, sorted_rows);
  } else if (r.topk_ids.is_64) {
    find_block_slots<int64_t>(r, first, n, offsets, slots, rows);
  } else {
    find_block_slots<int32_t>(r, first, n, offsets, slots, rows);
  }
  // A division a row would cost as much as its copy.
  for (int64_t t = begin, i = 0; t < end; ++t) {
    for (int64_t last = i + r.top_k; i < last; ++i) {
      if (rows[i] >= 0) tokens[rows[i]] = static_cast<int32_t>(t);
    }
  }
  return {begin, end, first, offsets, slots, tokens, rows, sorted_rows, rows + n};
}

// Calls run(block) for the blocks of all tokens.
template <class Fn>
void parallel_blocks(const Routing& r, const Parallel& par, double cost, const Fn& run) {
  parallel_items(par, ceil_div(r.num_tokens, kBlockTokens), cost, [&](int64_t item) {
    const int64_t begin = item * kBlockTokens;
    ScratchScope scratch;
    run(token_block(scratch, r, begin, std::min(r.num_tokens, begin + kBlockTokens)));
  });
}

// Where rows begin. A copy in a loop that writes pointers: read through a reference, base and step
// would be loaded anew for each.
struct RowStarts {
  const char* base;
  int64_t step;
  const int32_t* index;
  explicit RowStarts(const Rows& rows)
      : base(static_cast<const char*>(rows.data)),
        step(rows.stride * dtype_size(rows.type)),
        index(rows.index) {}
  RowStarts(const void* data, int64_t bytes)
      : base(static_cast<const char*>(data)), step(bytes), index(nullptr) {}
  const void* operator[](int64_t r) const {
    return base + (index != nullptr ? index[r] : r) * step;
  }
};

// The matrices as panels [depth][2 or 1 vectors of outputs], of one expert after the other:
// transposed, those of W x, else those of W^T x. In a block of scratch, or in other memory of the
// caller's, elements() of it. With expert_offsets, those of experts without rows are not made.
template <class T>
class PackedExperts {
 public:
  static int64_t elements(const GemmKernels<T>& k, int64_t num_experts, int64_t outputs,
                          int64_t depth) {
    return num_experts * padded(k, outputs) * depth;
  }
  ScratchScope scratch;

  PackedExperts(ScratchScope& scratch, const GemmKernels<T>& k, const ExpertMatrices& w,
                int64_t num_experts, int64_t outputs, int64_t depth)
      : PackedExperts(k, w, num_experts, outputs, depth,
                      scratch.take<T>(Scratch::kTokens, elements(k, num_experts, outputs, depth))) {
  }

  PackedExperts(const GemmKernels<T>& k, const ExpertMatrices& w, int64_t num_experts,
                int64_t outputs, int64_t depth, T* panels, const int32_t* expert_offsets = nullptr)
      : size_(padded(k, outputs) * depth), panels_(panels) {
    const int64_t W = k.lanes, n = padded(k, outputs);
    ScratchScope packing;
    T* rows = packing.take<T>(Scratch::kRows, n * padded(k, depth));
    std::array<const void*, kMostWidth> at;
    for (int64_t e = 0; e < num_experts; ++e) {
      if (expert_offsets != nullptr && expert_offsets[e] == expert_offsets[e + 1]) continue;
      const char* base = element(w.data, w.type, e * w.stride_e);
      T* out = panels_ + e * size_;
      if (w.stride_k == 1 && w.type == kAccumulate<T> && outputs % W == 0 && depth % W == 0) {
        const T* from = reinterpret_cast<const T*>(base);
        for (int64_t j = 0; j < n; j += 2 * W) {
          const int64_t width = std::min(2 * W, n - j);
          k.transpose(from + j * w.stride_o, w.stride_o, width, depth, out + j * depth, width);
        }
      } else if (w.stride_k == 1) {  // Dense along the depth.
        const int64_t ld = padded(k, depth);
        std::fill(rows + outputs * ld, rows + n * ld, T(0));
        row_kernels<T>().load_rows({w.type, base, w.stride_o, outputs, depth}, rows, ld, T(1));
        for (int64_t j = 0; j < n; j += 2 * W) {
          const int64_t width = std::min(2 * W, n - j);
          k.transpose(rows + j * ld, ld, width, depth, out + j * depth, width);
        }
      } else {
        for (int64_t d = 0; d < depth; ++d) at[d] = element(base, w.type, d * w.stride_k);
        k.pack_b({w.type, at.data(), depth, outputs}, 0, nullptr, out, 2 * W * depth);
      }
    }
  }

  const T* of(int64_t expert) const { return panels_ + expert * size_; }

 private:
  int64_t size_;
  T* panels_;
};

// c[r] = (bias +) the product of row r of a with an expert's panels, for the m rows of a tile.
template <class T>
struct TileProduct {
  const T* a;  // [m, depth], rows kLda apart
  int64_t m, depth;
  const T* panels;  // of a matrix [outputs, depth]
  int64_t outputs;
  DType bias_type = DType::kFloat32;
  const void* bias = nullptr;  // [outputs] of bias_type, or nullptr: zeros
  T* c;                        // [m, padded(outputs)], out
};

template <class T>
void multiply_tile(const GemmKernels<T>& k, const TileProduct<T>& p) {
  const int64_t n = padded(k, p.outputs);
  if (p.bias != nullptr) {
    const RowKernels<T>& row_k = row_kernels<T>();
    for (int64_t r = 0; r < p.m; ++r) {
      row_k.load_row(p.bias_type, p.bias, p.c + r * n, p.outputs, T(1));
      std::fill(p.c + r * n + p.outputs, p.c + (r + 1) * n, T(0));
    }
  }
  small_gemm_row_major<T>({k, p.m, p.outputs, p.depth, p.a, p.panels, p.c, n, p.bias != nullptr});
}

// Multiplies any number of rows, which may lie anywhere, with an expert's panels; c
// [rows, padded(outputs)] starts with bias, of the rows' type, unless that is nullptr.
template <class T>
void multiply_rows(const GemmKernels<T>& k, const RowPointers& rows, const T* panels,
                   int64_t outputs, const void* bias, T* c) {
  ScratchScope scratch;
  T* a = scratch.take<T>(Scratch::kPackA, kMaxMr * kLda);
  for (RowTiles t(rows.count, k.mr2); t.next();) {
    row_kernels<T>().gather_rows({rows.type, rows.rows + t.begin, t.height, rows.n}, nullptr, a,
                                 kLda);
    multiply_tile<T>(k, {.a = a,
                         .m = t.height,
                         .depth = rows.n,
                         .panels = panels,
                         .outputs = outputs,
                         .bias_type = rows.type,
                         .bias = bias,
                         .c = c + t.begin * padded(k, outputs)});
  }
}

// Returns the leading dimension of rows that are B of outer_product: an odd number of cache lines,
// so that the lines of one column are not in the same few sets of an L1.
template <class T>
int64_t odd_ld(const GemmKernels<T>& k, int64_t n) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  return (ceil_div(padded(k, n), kLine) | 1) * kLine;
}

// Computes c[i][j] (+)= the sum over r of grad[r][i] * x[r][j] for at most kKc rows r. Rows of c
// are padded(x_width) apart, those of grad kLda, and those of x odd_ld of x_width.
template <class T>
void outer_product(const GemmKernels<T>& k, const T* grad, int64_t grad_width, const T* x,
                   int64_t x_width, int64_t rows, T* c, bool accumulate) {
  small_gemm_column_major<T>({k, grad_width, x_width, rows, grad, x, c, padded(k, x_width),
                              accumulate, 0, kLda, odd_ld(k, x_width)});
}

// Operands of the two products with the gradients of one expert's slots.
template <class T>
struct GradientProducts {
  RowPointers grad;  // [count, O]
  RowPointers x;     // [count, K], like grad in type and count
  const T* scales;   // [count], factors of x in c; nullptr: ones
  T* c;              // [O, padded(K)], out: the gradient of the matrix; nullptr: not wanted
  bool accumulate;   // add to c
  const T* panels;   // of the transposed matrix [K, O]
  T* dx;             // [count, padded(K)], out: the gradient of x; nullptr: not wanted
};

// Computes c (+)= the outer product of grad and scaled x, and dx = the product of grad with the
// panels; the rows of grad are copied once for the two.
template <class T>
void multiply_gradients(const GemmKernels<T>& k, const GradientProducts<T>& p) {
  const auto& [grad, x, scales, c, accumulate, panels, dx] = p;
  const int64_t count = grad.count, grad_width = grad.n, x_width = x.n;
  const int64_t ldx = odd_ld(k, x_width);
  ScratchScope scratch;
  T* g = scratch.take<T>(Scratch::kPackA, kKc * kLda);
  T* rows = scratch.take<T>(Scratch::kPackB, kKc * ldx);
  const int64_t parts = ceil_div(count, kKc);
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t r0 = count * part / parts, m = count * (part + 1) / parts - r0;
    for (RowTiles t(m, k.mr2); t.next();) {
      const int64_t t0 = t.begin, r = r0 + t0;
      row_kernels<T>().gather_rows({grad.type, grad.rows + r, t.height, grad_width}, nullptr,
                                   g + t0 * kLda, kLda);
      if (c != nullptr) {
        row_kernels<T>().gather_rows({x.type, x.rows + r, t.height, x_width},
                                     scales == nullptr ? nullptr : scales + r, rows + t0 * ldx,
                                     ldx);
      }
      if (dx == nullptr) continue;
      multiply_tile<T>(k, {.a = g + t0 * kLda,
                           .m = t.height,
                           .depth = grad_width,
                           .panels = panels,
                           .outputs = x_width,
                           .c = dx + r * padded(k, x_width)});
    }
    if (c == nullptr) continue;
    outer_product(k, g, grad_width, rows, x_width, m, c, accumulate || part > 0);
  }
}

// Calls run(chunk, block, first) for the blocks of each chunk in order; `first` is true for the
// first one.
template <class Fn>
void run_chunks(const Routing& r, const Parallel& par, double cost, const Fn& run) {
  const int64_t length = chunk_tokens(r.num_tokens);
  parallel_items(par, num_chunks(r.num_tokens), cost, [&](int64_t chunk) {
    const int64_t begin = chunk * length, end = std::min(r.num_tokens, begin + length);
    for (int64_t t = begin; t < end; t += kBlockTokens) {
      ScratchScope scratch;
      run(chunk, token_block(scratch, r, t, std::min(end, t + kBlockTokens)), t == begin);
    }
  });
}

// Gradients of matrices [E, rows, cols], contiguous.
struct MatrixGrads {
  void* data = nullptr;  // nullptr: not wanted
  DType type = DType::kFloat32;
  // [E+1] if they are added to what is there, except to that of experts without rows.
  const int32_t* offsets_to_add = nullptr;
};

// Sums of chunks: [chunks][E], a matrix with padded columns and a bias each. In a block of
// scratch that a PackedExperts packs with, which comes first; or in other memory of the caller's,
// elements() of it.
template <class T>
class ChunkSums {
 public:
  static int64_t elements(const GemmKernels<T>& k, int64_t chunks, int64_t num_experts,
                          int64_t rows, int64_t cols) {
    return chunks * num_experts * (rows * padded(k, cols) + padded(k, rows));
  }
  ScratchScope scratch;

  ChunkSums(ScratchScope& scratch, const Routing& r, int64_t rows, int64_t cols,
            const GemmKernels<T>& k, bool wanted, const MatrixGrads& to)
      : ChunkSums(k, num_chunks(r.num_tokens), r.num_experts, rows, cols,
                  scratch.take<T>(Scratch::kRows, wanted ? elements(k, num_chunks(r.num_tokens),
                                                                    r.num_experts, rows, cols)
                                                         : 0),
                  to) {}

  ChunkSums(const GemmKernels<T>& k, int64_t chunks, int64_t num_experts, int64_t rows,
            int64_t cols, T* data, const MatrixGrads& to = {})
      : k_(k), chunks_(chunks), experts_(num_experts), rows_(rows), cols_(cols), data_(data) {
    // The first chunk's matrices are where their sums will be, if they look the same there.
    if (to.type == kAccumulate<T> && to.offsets_to_add == nullptr && padded(k, cols) == cols) {
      first_ = static_cast<T*>(to.data);
    }
  }

  int64_t matrix() const { return rows_ * padded(k_, cols_); }
  int64_t bias() const { return padded(k_, rows_); }
  T* matrix_of(int64_t chunk, int64_t e) const {
    if (chunk == 0 && first_ != nullptr) return first_ + e * matrix();
    return data_ + (chunk * experts_ + e) * (matrix() + bias());
  }
  T* bias_of(int64_t chunk, int64_t e) const {
    return data_ + (chunk * experts_ + e) * (matrix() + bias()) + matrix();
  }

  // Prepares the sums of expert e before the first block of a chunk, in which it has `count` rows.
  // A matrix is written by its first product.
  void begin(int64_t chunk, int64_t e, int64_t count) const {
    if (count == 0) std::fill_n(matrix_of(chunk, e), matrix(), T(0));
    std::fill_n(bias_of(chunk, e), bias(), T(0));
  }

  // Adds the chunks up into matrices and biases [E, rows], if they are wanted.
  void add_up(const MatrixGrads& w, void* grad_bias, DType bias_type, const Parallel& par) const {
    const int64_t n = padded(k_, cols_);
    const auto run = [&](int64_t e) {
      std::array<const void*, kMostChunks> parts;
      ScratchScope scratch;
      T* sum = scratch.take<T>(Scratch::kTile, std::max(matrix(), bias()));
      const bool left_alone =
          w.offsets_to_add != nullptr && w.offsets_to_add[e] == w.offsets_to_add[e + 1];
      const bool there = chunks_ == 1 && first_ != nullptr;
      if (w.data != nullptr && !left_alone && !there) {
        const int64_t size = dtype_size(w.type);
        char* out = static_cast<char*>(w.data) + e * rows_ * cols_ * size;
        for (int64_t c = 0; c < chunks_; ++c) parts[c] = matrix_of(c, e);
        row_kernels<T>().weighted_sum({kAccumulate<T>, parts.data(), chunks_, matrix()}, nullptr,
                                      sum);
        for (int64_t i = 0; w.offsets_to_add != nullptr && i < rows_; ++i) {
          row_kernels<T>().axpy(w.type, out + i * cols_ * size, T(1), sum + i * n, cols_);
        }
        row_kernels<T>().store_rows(sum, n, {w.type, out, cols_, rows_, cols_});
      }
      if (grad_bias == nullptr) return;
      for (int64_t c = 0; c < chunks_; ++c) parts[c] = bias_of(c, e);
      row_kernels<T>().weighted_sum({kAccumulate<T>, parts.data(), chunks_, rows_}, nullptr, sum);
      row_kernels<T>().store_row(
          bias_type, sum, static_cast<char*>(grad_bias) + e * rows_ * dtype_size(bias_type), rows_);
    };
    parallel_items(par, experts_, static_cast<double>(chunks_ * experts_ * matrix()) / 8, run);
  }

 private:
  const GemmKernels<T>& k_;
  int64_t chunks_, experts_, rows_, cols_;
  T* data_;
  T* first_ = nullptr;
};

}  // namespace moe_ops::cpu
