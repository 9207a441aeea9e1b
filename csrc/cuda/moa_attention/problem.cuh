// Where rows lie and which keys they see.
//
// A row is a slot of a token: row r of a head is slot r % K of token r / K.
#pragma once

#include <cstdint>

#include "cuda/vec.cuh"
#include "moe_ops/moa_attention.h"

namespace moe_ops::cuda::attention {

struct Range {
  int first = 0, last = 0;
};

__device__ inline int sequence_bound(const MoaAttentionParams& p, int64_t i) {
  const int64_t value = p.sequences.is_64 ? static_cast<const int64_t*>(p.sequences.data)[i]
                                          : static_cast<const int32_t*>(p.sequences.data)[i];
  return static_cast<int>(min(max(value, int64_t{0}), p.num_tokens));
}

// Returns the sequence that holds `token`; without sequences, all keys or all tokens.
__device__ inline Range sequence_of(const MoaAttentionParams& p, int token, int64_t everything) {
  if (p.sequences.data == nullptr) return {0, static_cast<int>(everything)};
  int64_t low = 0, high = p.num_sequences + 1;  // the first bound after the token
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (sequence_bound(p, middle) <= token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return {low > 0 ? sequence_bound(p, low - 1) : 0,
          low <= p.num_sequences ? sequence_bound(p, low) : static_cast<int>(everything)};
}

// Returns the keys that a token sees; both ends grow with the token.
__device__ inline Range keys_of(const MoaAttentionParams& p, int token) {
  const Range sequence = sequence_of(p, token, p.num_keys);
  const int64_t at = token + p.num_keys - p.num_tokens;
  int64_t first = sequence.first, last = sequence.last;
  if (p.causal) last = min(last, at + 1);
  if (p.window > 0) {
    first = max(first, at - p.window + 1);
    last = min(last, at + p.window);
  }
  return {static_cast<int>(first), static_cast<int>(max(first, last))};
}

// Returns the tokens that may see keys first to last - 1.
__device__ inline Range tokens_of(const MoaAttentionParams& p, int first_key, int last_key) {
  const int64_t shift = p.num_keys - p.num_tokens;
  int64_t first = sequence_of(p, first_key, p.num_tokens).first;
  int64_t last = sequence_of(p, last_key - 1, p.num_tokens).last;
  if (p.causal) first = max(first, first_key - shift);
  if (p.window > 0) {
    first = max(first, first_key - p.window + 1 - shift);
    last = min(last, last_key - 1 + p.window - shift);
  }
  return {static_cast<int>(first), static_cast<int>(max(first, last))};
}

__device__ inline int num_rows(const MoaAttentionParams& p) {
  return static_cast<int>(p.num_tokens * p.num_slots);
}

// Returns the keys that all rows row0 to row_end - 1 see.
__device__ inline Range keys_of_all(const MoaAttentionParams& p, int row0, int row_end) {
  const int slots = static_cast<int>(p.num_slots);
  return {keys_of(p, (row_end - 1) / slots).first, keys_of(p, row0 / slots).last};
}

// Returns the keys of row r; none past the last row.
__device__ inline Range keys_of_row(const MoaAttentionParams& p, int r) {
  return r < num_rows(p) ? keys_of(p, r / static_cast<int>(p.num_slots)) : Range{};
}

// Batch and head of item b * n + head.
struct Head {
  // Blocks are counted in 32 bits; 64 would be spilled on sm_100.
  int batch, head;
  __device__ Head(const MoaAttentionParams& p, int64_t item)
      : batch(static_cast<int>(static_cast<uint32_t>(item) / static_cast<uint32_t>(p.num_heads))),
        head(static_cast<int>(static_cast<uint32_t>(item) % static_cast<uint32_t>(p.num_heads))) {}
};

// Returns the index of row r in a contiguous [B, S, K, n, ...], in heads.
__device__ inline int64_t row_index(const MoaAttentionParams& p, Head h, int r) {
  return (h.batch * p.num_tokens * p.num_slots + r) * p.num_heads + h.head;
}

template <class S>
__device__ const S* row_of(const MoaAttentionParams& p, const AttentionOperand& x, Head h, int r) {
  const int slots = static_cast<int>(p.num_slots);
  return static_cast<const S*>(x.data) + h.batch * x.stride_batch + r / slots * x.stride_token +
         r % slots * x.stride_slot + h.head * x.stride_head;
}

template <class S>
__device__ const S* key_of(const AttentionOperand& x, Head h, int j) {
  return static_cast<const S*>(x.data) + h.batch * x.stride_batch + j * x.stride_token +
         h.head * x.stride_head;
}

}  // namespace moe_ops::cuda::attention
