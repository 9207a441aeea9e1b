// attention_decode: the attention block of a decoder layer on a few new tokens, whose keys and values
// join those that are kept of the tokens before.
#pragma once

#include "moe_ops/attention_block.h"

namespace moe_ops {

// The first 2 * half features of a head are rotated.
struct AttentionDecodeParams : AttentionBlock {
  int64_t kv_heads = 0, head_size = 0;  // m (a divisor of n), d
  DenseLayer query, key, value;         // [n d, H], [m d, H] twice; out is [H, n d]
  // [d], of each head, or [n d] and [m d], of a token; nullptr: none
  const void *query_norm = nullptr, *key_norm = nullptr;
  bool norms_heads = true;
  double head_eps = 0;
  KeptHeads<void> keys, values;
};

namespace cpu {
void attention_decode(const AttentionDecodeParams& p, const Parallel& par);
}  // namespace cpu

}  // namespace moe_ops
