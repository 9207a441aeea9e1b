// mla_decode: the block of multi-head latent attention of a decoder layer on a few new
// tokens. Keys and values of all heads are products of one small vector a token, and that is kept.
#pragma once

#include "moe_ops/attention_block.h"

namespace moe_ops {

// A head of a query has nope_size features, and after them 2 * half that are rotated.
struct MlaDecodeParams : AttentionBlock {
  int64_t nope_size = 0, value_size = 0;  // d_n, d_v
  int64_t rank = 0, query_rank = 0;       // r; r_q, or 0 without query_down
  DenseLayer query_down;                  // [r_q, H]
  const void* query_norm = nullptr;       // [r_q] or nullptr, of what query_down gives
  DenseLayer query;                       // [n (d_n + 2 half), r_q or H]
  DenseLayer latent;                      // [r + 2 half, H]; out is [H, n d_v]
  const void* latent_norm = nullptr;      // [r]
  double latent_eps = 0;                  // of both norms
  // [n (d_n + d_v), r]: of each head first the rows that make keys, then those that make values
  ExpertMatrices heads_of_latent;
  // Which features form a pair, of queries and keys as projections give them and as they are kept:
  // 2 i and 2 i + 1, otherwise i and i + half.
  bool interleaved = false, interleaved_keys = false;
  KeptHeads<void> latents, rope_keys;  // [B, 1, L, r] and [B, 1, L, 2 half]
};

namespace cpu {
void mla_decode(const MlaDecodeParams& p, const Parallel& par);
}  // namespace cpu

}  // namespace moe_ops
