// What forward and backward share: which keys a token sees, and operands in the order of the tiles.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"
#include "moe_ops/moa_attention.h"

namespace moe_ops::cpu::attention {

constexpr int64_t kRows =
    96;  // query rows of a block: whole tiles and whole vectors at every level
constexpr int64_t kKeys = 64;  // keys of a block
// Depth of the products with queries is split at kKc, width of those with values at kLdm.
constexpr int64_t kDepthParts = 2;

struct KeyRange {
  int64_t first = 0, last = 0;
};

// Both ends grow with the token.
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

inline const char* at(const AttentionOperand& x, DType type, int64_t b, int64_t token, int64_t slot,
                      int64_t head) {
  const int64_t offset =
      b * x.stride_batch + token * x.stride_token + slot * x.stride_slot + head * x.stride_head;
  return static_cast<const char*>(x.data) + offset * dtype_size(type);
}

// Where row r of a head lies in a contiguous [B, S, K, n, ...], in heads.
inline int64_t row_index(const MoaAttentionParams& p, int64_t b, int64_t head, int64_t r) {
  return (b * p.num_tokens * p.num_slots + r) * p.num_heads + head;
}

// A block of rows in panels of two vectors, the last one perhaps of one.
template <class T>
struct RowBlock {
  int64_t b, head, begin, count;  // rows begin to begin + count of a head
  int lanes;
  int64_t padded;          // whole vectors
  KeyRange keys;           // of all rows
  KeyRange ranges[kRows];  // of each row; none of the rows that pad
  T first[kRows],
      last[kRows];  // the same in numbers of the block of keys that sees() was asked for

  RowBlock(const MoaAttentionParams& p, int lanes, int64_t b, int64_t head, int64_t begin)
      : b(b), head(head), begin(begin), lanes(lanes) {
    count = std::min(kRows, p.num_tokens * p.num_slots - begin);
    padded = round_up<int64_t>(count, lanes);
    int64_t token = begin / p.num_slots, slot = begin % p.num_slots;
    KeyRange range = keys_of(p, token);
    keys = range;
    for (int64_t r = 0; r < padded; ++r, ++slot) {
      if (slot == p.num_slots && r < count) {
        slot = 0;
        range = keys_of(p, ++token);
      }
      keys.last = range.last;
      ranges[r] = r < count ? range : KeyRange{};
    }
  }
  int64_t panels() const { return ceil_div<int64_t>(padded, 2 * lanes); }
  int width(int64_t panel) const {
    return static_cast<int>(std::min<int64_t>(2 * lanes, padded - panel * 2 * lanes));
  }
  // What a panel sees of the keys from j0 on: how many, and where each of its rows starts and ends.
  AttentionBlock<T> sees(int64_t panel, int64_t j0, int64_t num_keys, double softcap) {
    AttentionBlock<T> out;
    out.width = width(panel);
    out.softcap = static_cast<T>(softcap);
    const int64_t r0 = panel * 2 * lanes, r1 = std::min(r0 + out.width, count);
    out.keys = std::clamp<int64_t>(ranges[r1 - 1].last - j0, 0, num_keys);
    if (ranges[r0].first >= j0 + num_keys) out.keys = 0;
    out.first = first + r0;
    out.last = last + r0;
    // Both ends grow with the row: nothing is masked if the first row sees the last key and the
    // last one the first, and then nobody reads where rows start and end.
    if (ranges[r1 - 1].first <= j0 && ranges[r0].last >= j0 + out.keys) {
      std::fill(first + r0, first + r0 + out.width, T(0));
      std::fill(last + r0, last + r0 + out.width, static_cast<T>(out.keys));
      return out;
    }
    for (int64_t r = r0; r < r0 + out.width; ++r) {
      const int64_t a = std::clamp<int64_t>(ranges[r].first - j0, 0, out.keys);
      const int64_t z = std::clamp<int64_t>(ranges[r].last - j0, 0, out.keys);
      first[r] = static_cast<T>(a);
      last[r] = static_cast<T>(z);
      out.masked = out.masked || (r < count && (a > 0 || z < out.keys));
    }
    return out;
  }
};

// Products of a panel: c [m][width] (+)= a b with `a` in row form, b [depth][width].
template <class T>
void multiply(const typename Kernels<T>::Micro* tiles, int max_rows, int64_t a_step, int64_t depth,
              const T* a, const T* b, int64_t m, T* c, int64_t ldc, bool accumulate) {
  TileHints hints;
  const int64_t num_tiles = ceil_div<int64_t>(m, max_rows);
  for (int64_t t = 0; t < num_tiles; ++t) {  // of equal heights
    const int64_t i0 = m * t / num_tiles, i1 = m * (t + 1) / num_tiles;
    tiles[i1 - i0 - 1](depth, a + i0 * a_step, b, c + i0 * ldc, ldc, accumulate, hints);
  }
}

template <class T>
struct Products {
  const Kernels<T>& k;
  int64_t d;

  int max_rows(int nv) const { return nv == 1 ? k.mr1 : k.mr2; }

  // c [m][width] = a b, depth d: a is [part][m][kLda] with kKc of the depth each, b [d][width].
  void by_rows(const T* a, int64_t a_part, const T* b, int width, int64_t m, T* c) const {
    const int nv = width / k.lanes;
    for (int64_t d0 = 0; d0 < d; d0 += kKc) {
      multiply<T>(k.row_a[nv - 1], max_rows(nv), kLda, std::min(kKc, d - d0), a, b + d0 * width, m,
                  c, width, d0 > 0);
      a += a_part;
    }
  }
  // c [d][width] += a^T b, depth n: a is [part][n][kLdm] with kLdm of the columns each.
  void by_columns(int64_t n, const T* a, int64_t a_part, const T* b, int width, T* c) const {
    const int nv = width / k.lanes;
    for (int64_t c0 = 0; c0 < d; c0 += kLdm) {
      multiply<T>(k.col_a[nv - 1], max_rows(nv), 1, n, a, b, std::min(kLdm, d - c0), c + c0 * width,
                  width, true);
      a += a_part;
    }
  }
};

// Keys or values j0 to j0 + n of a head, split along d into parts of `part` columns with `pitch`.
template <class T>
void load_keys(const Kernels<T>& k, const MoaAttentionParams& p, const AttentionOperand& x,
               int64_t b, int64_t head, int64_t j0, int64_t n, int64_t part, int64_t pitch,
               T* dst) {
  const char* rows = at(x, p.type, b, j0, 0, head);
  for (int64_t c = 0, i = 0; c < p.head_size; c += part, ++i) {
    k.load_rows(p.type, rows + c * dtype_size(p.type), x.stride_token, n,
                std::min(part, p.head_size - c), dst + i * kKeys * pitch, pitch, T(1));
  }
}

// Rows of q (or of its gradient's like) as [padded][ld], zero where there are none.
template <class T>
void load_rows(const Kernels<T>& k, const MoaAttentionParams& p, const AttentionOperand& x,
               const RowBlock<T>& block, T scale, T* dst, int64_t ld) {
  const int64_t d = p.head_size;
  if (ld > d) std::fill(dst, dst + block.count * ld, T(0));
  std::fill(dst + block.count * ld, dst + block.padded * ld, T(0));
  // Runs of rows that are one stride apart: all of them, or else the slots of a token.
  const int64_t stride = p.num_slots == 1 ? x.stride_token : x.stride_slot;
  const bool even = x.stride_token == p.num_slots * stride;
  for (int64_t r = 0; r < block.count;) {
    const int64_t i = block.begin + r, slot = i % p.num_slots;
    const int64_t n = even ? block.count : std::min(block.count - r, p.num_slots - slot);
    k.load_rows(p.type, at(x, p.type, block.b, i / p.num_slots, slot, block.head), stride, n, d,
                dst + r * ld, ld, scale);
    r += n;
  }
}

// [padded][ld] to panels [panel][d][width].
template <class T>
void to_panels(const Kernels<T>& k, const RowBlock<T>& block, const T* rows, int64_t ld, int64_t d,
               T* dst) {
  for (int64_t i = 0; i < block.panels(); ++i) {
    const int64_t r0 = i * 2 * k.lanes;
    k.transpose(rows + r0 * ld, ld, block.width(i), d, dst + r0 * d, block.width(i));
  }
}

}  // namespace moe_ops::cpu::attention
