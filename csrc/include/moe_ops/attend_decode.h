// attend_decode: the part of attention_decode between its projections, on a device.
#pragma once

#include "moe_ops/attention_block.h"

namespace moe_ops::cuda {

// Features of a head, at most.
constexpr int64_t kMaxHeadSize = 512;
// Positions of a split: a constant, so that the order of sums depends on nothing else.
constexpr int64_t kSplitKeys = 256;

struct AttendDecodeParams {
  const void *q, *k, *v;               // [B, S, n d], [B, S, m d] twice, contiguous
  DType type;                          // of these, the caches, norms, sinks and y
  int64_t batch, num_tokens;           // B, S
  int64_t heads, kv_heads, head_size;  // n, m, d
  const void *query_norm, *key_norm;   // nullptr: none
  bool norms_heads;                    // [d] of each head; otherwise [n d] and [m d] of a token
  double head_eps;
  const void *cos, *sin;  // [B, S, half], the last dense
  DType angle_type;
  int64_t cos_stride_batch, cos_stride_token, sin_stride_batch, sin_stride_token;
  int64_t half;
  KeptHeads<void> keys, values;
  int64_t start;
  AttentionMask mask;
  const void* sinks;
  double scale;
  // Scratch in the accumulate type: [B, S, n, d], [B, S, n, splits, d] and [B, S, n, splits, 2]
  void *queries, *sums, *totals;
  int64_t splits;  // ceil((start + S) / kSplitKeys)
  void* y;         // [B, S, n d] contiguous, out
};

Status attend_decode(const AttendDecodeParams& p, Stream stream);

}  // namespace moe_ops::cuda
