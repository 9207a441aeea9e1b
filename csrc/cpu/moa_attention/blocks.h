// Parts that forward and backward share: which keys a token sees, and operands in the order of the
// tiles.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include "cpu/gemm/small_gemm.h"
#include "cpu/kernels/attention.h"
#include "cpu/kernels/rows.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/workspace.h"
#include "moe_ops/batch_invariant.h"
#include "moe_ops/moa_attention.h"

namespace moe_ops::cpu::attention {

constexpr int64_t kRows =
    96;  // query rows of a block: whole tiles and whole vectors at every level
constexpr int64_t kKeys = 64;  // keys of a block
// Most bytes of keys and values that an item of several row blocks keeps: half of a small L2.
constexpr int64_t kKeptKeyBytes = int64_t{512} << 10;

// While it lives, results too small for a normal number are zero. Weights of far keys and their
// gradients pass through there on their way to nothing, and each such sum costs a hundred cycles.
class NoSubnormals {
#if defined(__SSE2__)
 public:
  NoSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  ~NoSubnormals() { _mm_setcsr(before_); }
  NoSubnormals(const NoSubnormals&) = delete;
  NoSubnormals& operator=(const NoSubnormals&) = delete;

 private:
  unsigned before_;
#else
 public:
  NoSubnormals() {}  // not trivial, so that the guard is no unused variable
#endif
};

struct KeyRange {
  int64_t first = 0, last = 0;
};

// Returns the keys that a token sees; both ends grow with the token.
inline KeyRange keys_of(const MoaAttentionParams& p, int64_t token) {
  int64_t begin = 0, end = p.num_keys, at = token + p.num_keys - p.num_tokens;
  if (p.cu_seqlens != nullptr) {
    const int64_t* next = std::upper_bound(p.cu_seqlens, p.cu_seqlens + p.num_sequences + 1, token);
    begin = next[-1];
    end = *next;
  }
  if (p.causal) end = std::min(end, at + 1);
  if (p.window > 0) {
    begin = std::max(begin, at - p.window + 1);
    end = std::min(end, at + p.window);
  }
  return {begin, std::max(begin, end)};
}

// Rows where blocks start, and their end.
//
// Sums over keys go from block to block, so they round differently where blocks start elsewhere.
// With `anchored`, blocks of keys start at multiples of kKeys from the first key of their sequence,
// and a block of rows has rows of one sequence: a row then sums in the same order whatever rows
// stand beside it. Otherwise blocks of keys start with the first key that the block's first row
// sees.
struct RowBlocks {
  std::vector<int64_t> starts;
  bool anchored;

  RowBlocks(const MoaAttentionParams& p, bool anchored) : anchored(anchored) {
    const int64_t rows = p.num_tokens * p.num_slots;
    const int64_t sequences = anchored && p.cu_seqlens != nullptr ? p.num_sequences : 1;
    int64_t begin = 0;
    for (int64_t i = 1; i <= sequences; ++i) {
      const int64_t end = sequences > 1 ? p.cu_seqlens[i] * p.num_slots : rows;
      for (; begin < end; begin += kRows) starts.push_back(begin);
      begin = end;
    }
    starts.push_back(rows);
  }
  int64_t count() const { return static_cast<int64_t>(starts.size()) - 1; }
  // Returns where the key blocks of a row block that starts with `token` start.
  int64_t first_key(const MoaAttentionParams& p, int64_t token) const {
    const int64_t first = keys_of(p, token).first;
    if (!anchored) return first;
    int64_t begin = 0;
    if (p.cu_seqlens != nullptr) {
      begin = std::upper_bound(p.cu_seqlens, p.cu_seqlens + p.num_sequences + 1, token)[-1];
    }
    return begin + (first - begin) / kKeys * kKeys;
  }
};

inline const char* at(const AttentionOperand& x, DType type, int64_t b, int64_t token, int64_t slot,
                      int64_t head) {
  const int64_t offset =
      b * x.stride_batch + token * x.stride_token + slot * x.stride_slot + head * x.stride_head;
  return static_cast<const char*>(x.data) + offset * dtype_size(type);
}

// Returns the index of row r of a head in a contiguous [B, S, K, n, ...], in heads.
inline int64_t row_index(const MoaAttentionParams& p, int64_t b, int64_t head, int64_t r) {
  return (b * p.num_tokens * p.num_slots + r) * p.num_heads + head;
}

// A block of rows in panels of two vectors, the last one perhaps of one; with narrow heads, of one.
template <class T>
struct RowBlock {
  int64_t b, head, begin, count;  // rows begin to begin + count of a head
  int64_t panel_rows;
  int64_t padded;                         // whole vectors
  bool anchored;                          // RowBlocks
  KeyRange keys;                          // of all rows, from the start of a block of keys on
  KeyIndex<T> first[kRows], last[kRows];  // of each row, counted from keys.first; none of the rows
                                          // that pad

  RowBlock(const MoaAttentionParams& p, int lanes, int64_t panel_rows, int64_t b, int64_t head,
           const RowBlocks& blocks, int64_t index)
      : b(b),
        head(head),
        begin(blocks.starts[index]),
        count(blocks.starts[index + 1] - begin),
        panel_rows(panel_rows),
        padded(round_up<int64_t>(count, lanes)),
        anchored(blocks.anchored) {
    int64_t token = begin / p.num_slots, slot = begin % p.num_slots;
    keys = keys_of(p, token);
    const int64_t origin = keys.first = blocks.first_key(p, token);
    for (int64_t r = 0; r < count; slot = 0, ++token) {
      const KeyRange range = keys_of(p, token);
      const int64_t next = std::min(count, r + p.num_slots - slot);
      for (; r < next; ++r) {
        first[r] = static_cast<KeyIndex<T>>(range.first - origin);
        last[r] = static_cast<KeyIndex<T>>(range.last - origin);
      }
      keys.last = range.last;
    }
    std::fill(first + count, first + padded, KeyIndex<T>(0));
    std::fill(last + count, last + padded, KeyIndex<T>(0));
  }
  int64_t panels() const { return ceil_div(padded, panel_rows); }
  int width(int64_t panel) const {
    return static_cast<int>(std::min(panel_rows, padded - panel * panel_rows));
  }
  // Returns the keys from j0 on that a panel sees. Both ends of a row's keys grow with the row, so
  // the first and the last row determine how many there are, and whether any row misses one.
  AttentionBlock<T> sees(int64_t panel, int64_t j0, int64_t num_keys, double softcap) const {
    AttentionBlock<T> out;
    out.width = width(panel);
    out.softcap = static_cast<T>(softcap);
    const int64_t r0 = panel * panel_rows, r1 = std::min(r0 + out.width, count);
    const int64_t at = j0 - keys.first;
    out.keys = std::clamp<int64_t>(last[r1 - 1] - at, 0, num_keys);
    if (first[r0] >= at + num_keys) out.keys = 0;
    out.start = std::max<int64_t>(first[r0] - at, 0);
    if (anchored) out.start = out.start / kNarrowKeys * kNarrowKeys;
    out.all_first = first[r1 - 1] - at;
    out.all_last = std::min<int64_t>(last[r0] - at, out.keys);
    out.masked = out.all_first > 0 || out.all_last < out.keys;
    out.begin = static_cast<KeyIndex<T>>(at);
    out.first = first + r0;
    out.last = last + r0;
    return out;
  }
};

// Excludes rows whose stick is empty, which see no more keys: those keys must not affect them, and
// whether keys are read depends on the sticks of the rows beside them. `last`: scratch for a panel.
template <class T>
void leave_out_empty_sticks(const RowBlock<T>& block, int64_t panel, const T* log_rest, T log_tiny,
                            AttentionBlock<T>& seen, KeyIndex<T>* last) {
  const int64_t r0 = panel * block.panel_rows,
                rows = std::min<int64_t>(seen.width, block.count - r0);
  bool any = false;
  for (int64_t r = 0; r < rows; ++r) any |= log_rest[r] < log_tiny;
  if (!any) return;
  for (int64_t r = 0; r < seen.width; ++r) {
    last[r] = log_rest[r] < log_tiny ? seen.first[r] : seen.last[r];
  }
  seen.masked = true;
  seen.last = last;
}

template <class T>
struct Products {
  const GemmKernels<T>& k;
  int64_t d;

  int max_rows(int nv) const { return nv == 1 ? k.mr1 : k.mr2; }

  // Computes c [m][width] = a b with depth d: a is row-major, a_block elements between blocks of
  // kKc columns; b is [d][width].
  void row_major(const T* a, int64_t a_block, const T* b, int width, int64_t m, T* c) const {
    small_gemm_row_major<T>({k, m, width, d, a, b, c, width, false, a_block});
  }
  // Computes c [d][width] += a^T b over the keys of a block: a^T is column-major, a_block elements
  // between blocks of kLdm columns of a. With `apart`, keys that a row does not see are left out of
  // its sums instead of multiplied by zero.
  void column_major(const AttentionBlock<T>& seen, const T* a, int64_t a_block, const T* b, T* c,
                    bool apart) const {
    const int width = seen.width;
    if (!apart || !seen.masked) {
      return small_gemm_column_major<T>({k, d, width, seen.keys, a, b, c, width, true, a_block});
    }
    for (int64_t c0 = 0; c0 < d; c0 += kLdm, a += a_block) {
      attention_kernels<T>().seen_sums(seen, a, kLdm, b, std::min(kLdm, d - c0), c + c0 * width);
    }
  }
};

// Returns the features that the narrow kernels multiply, or 0 if they do not support a call.
template <class T>
int narrow_size(const MoaAttentionParams& p) {
  const bool taken = p.kind == AttentionKind::kSoftmax && p.softcap == 0 &&
                     p.head_size <= attention_kernels<T>().narrow_size;
  return !taken ? 0 : p.head_size <= 8 ? 8 : 16;
}

// Layout of a copy of keys or values: parts of `part` columns, each with rows `pitch` apart.
struct KeyLayout {
  int64_t part, pitch;
  KeyRange kept;  // the keys of the copy; none: a block at a time

  int64_t rows() const { return std::max(kKeys, kept.last - kept.first); }
  // Returns the elements of a copy of vectors of d features.
  int64_t size(int64_t d) const { return ceil_div(d, part) * rows() * pitch; }
};

// Copy of the keys or values of a head: a block at a time, or, where an item of several row blocks
// reads them again and again, all that it has read so far.
template <class T>
class KeyCopy {
 public:
  KeyCopy(const GemmKernels<T>& k, const MoaAttentionParams& p, const AttentionOperand& x,
          int64_t b, int64_t head, const KeyLayout& layout, T* data)
      : k_(k),
        p_(p),
        x_(x),
        b_(b),
        head_(head),
        part_(layout.part),
        pitch_(layout.pitch),
        rows_(layout.rows()),
        kept_(layout.kept),
        data_(data) {
    // The narrow kernels read whole rows.
    if (pitch_ == kNarrowSize && p.head_size < pitch_) {
      std::fill(data, data + layout.size(p.head_size), T(0));
    }
  }

  int64_t part_stride() const { return rows_ * pitch_; }

  // Returns keys j0 to j0 + n.
  const T* get(int64_t j0, int64_t n) {
    if (kept_.last == kept_.first) {
      load(j0, j0 + n, data_);
      return data_;
    }
    if (j0 > done_.last || j0 + n < done_.first) done_ = {j0, j0};
    const auto row = [&](int64_t j) { return data_ + (j - kept_.first) * pitch_; };
    if (j0 < done_.first) {
      load(j0, done_.first, row(j0));
      done_.first = j0;
    }
    if (j0 + n > done_.last) {
      load(done_.last, j0 + n, row(done_.last));
      done_.last = j0 + n;
    }
    return row(j0);
  }

 private:
  void load(int64_t j0, int64_t j1, T* to) const {
    const char* rows = at(x_, p_.type, b_, j0, 0, head_);
    for (int64_t c = 0; c < p_.head_size; c += part_, to += part_stride()) {
      row_kernels<T>().load_rows({p_.type, rows + c * dtype_size(p_.type), x_.stride_token, j1 - j0,
                                  std::min(part_, p_.head_size - c)},
                                 to, pitch_, T(1));
    }
  }

  const GemmKernels<T>& k_;
  const MoaAttentionParams& p_;
  const AttentionOperand& x_;
  int64_t b_, head_, part_, pitch_, rows_;
  KeyRange kept_, done_ = {};
  T* data_;
};

// Returns the keys that an item of row blocks `begin` to `end` keeps: all, if they take at most
// kKeptKeyBytes and are read more than once.
inline KeyRange kept_keys(const MoaAttentionParams& p, const RowBlocks& blocks, int64_t begin,
                          int64_t end, int64_t bytes_a_key) {
  const KeyRange all = {blocks.first_key(p, blocks.starts[begin] / p.num_slots),
                        keys_of(p, (blocks.starts[end] - 1) / p.num_slots).last};
  return end - begin > 1 && (all.last - all.first) * bytes_a_key <= kKeptKeyBytes ? all
                                                                                  : KeyRange{};
}

// Returns the row blocks where `chunks` runs of about the same number of keys start, and their end.
inline std::vector<int64_t> cut_row_blocks(const MoaAttentionParams& p, const RowBlocks& blocks,
                                           int64_t chunks) {
  std::vector<int64_t> before = {0}, cuts;
  for (int64_t i = 0; i < blocks.count(); ++i) {
    const int64_t n = keys_of(p, (blocks.starts[i + 1] - 1) / p.num_slots).last -
                      keys_of(p, blocks.starts[i] / p.num_slots).first;
    before.push_back(before.back() + std::max<int64_t>(n, 1));
  }
  for (int64_t c = 0; c <= chunks; ++c) {
    const auto at = std::lower_bound(before.begin(), before.end(), before.back() * c / chunks);
    cuts.push_back(at - before.begin());
  }
  cuts.back() = blocks.count();
  return cuts;
}

// Calls fn(its first element, stride, first row, rows) for runs of rows of x that are one stride
// apart: all rows of a block, or else the slots of a token.
template <class T, class Fn>
void for_runs(const MoaAttentionParams& p, const AttentionOperand& x, const RowBlock<T>& block,
              const Fn& fn) {
  const int64_t stride = p.num_slots == 1 ? x.stride_token : x.stride_slot;
  const bool even = x.stride_token == p.num_slots * stride;
  for (int64_t r = 0; r < block.count;) {
    const int64_t i = block.begin + r, slot = i % p.num_slots;
    const int64_t n = even ? block.count : std::min(block.count - r, p.num_slots - slot);
    fn(at(x, p.type, block.b, i / p.num_slots, slot, block.head), stride, r, n);
    r += n;
  }
}

// Loads rows of q, or of a tensor of its shape, as [padded][ld], with zeros as padding.
template <class T>
void load_rows(const MoaAttentionParams& p, const AttentionOperand& x, const RowBlock<T>& block,
               T scale, T* dst, int64_t ld) {
  const int64_t d = p.head_size;
  if (ld > d) std::fill(dst, dst + block.count * ld, T(0));
  std::fill(dst + block.count * ld, dst + block.padded * ld, T(0));
  for_runs(p, x, block, [&](const char* rows, int64_t stride, int64_t r, int64_t n) {
    row_kernels<T>().load_rows({p.type, rows, stride, n, d}, dst + r * ld, ld, scale);
  });
}

// Converts rows [padded][ld] to panels [panel][d][width].
template <class T>
void to_panels(const GemmKernels<T>& k, const RowBlock<T>& block, const T* rows, int64_t ld,
               int64_t d, T* dst) {
  for (int64_t i = 0; i < block.panels(); ++i) {
    const int64_t r0 = i * block.panel_rows;
    k.transpose(rows + r0 * ld, ld, block.width(i), d, dst + r0 * d, block.width(i));
  }
}

}  // namespace moe_ops::cpu::attention
