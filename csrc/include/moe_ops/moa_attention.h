// Attention of K query slots a token against one set of keys and values.
//
// Slot s of head h attends KV head h. A row is a slot of a token: row r of a head is slot r % K of
// token r / K. The tokens of q are the last S of the S_kv keys' positions.
#pragma once

#include <cstdint>

#include "moe_ops/common.h"

namespace moe_ops {

enum class AttentionKind : int { kSoftmax, kStickBreaking };

constexpr int64_t kMaxHeadSize = 256;

// [B, S, K, n, d] or, with slot strides of 0, [B, S, n, d]: strides in elements, d dense.
struct AttentionOperand {
  const void* data = nullptr;
  int64_t stride_batch = 0, stride_token = 0, stride_slot = 0, stride_head = 0;
};

struct MoaAttentionParams {
  DType type;
  AttentionKind kind;
  int64_t batch;       // B
  int64_t num_tokens;  // S
  int64_t num_slots;   // K
  int64_t num_heads;   // n
  int64_t head_size;   // d, at most kMaxHeadSize
  int64_t num_keys;    // S_kv, below 2^31
  AttentionOperand q, k, v;
  bool causal;
  double scale;
  int64_t window;  // a query sees keys less than this far away; 0: any
  double softcap;  // 0: none
  // Sequences lie one after the other in batch 0: [num_sequences + 1], from 0 to S = S_kv.
  const int64_t* cu_seqlens = nullptr;
  int64_t num_sequences = 0;
  void* out = nullptr;    // [B, S, K, n, d] contiguous
  void* state = nullptr;  // [B, S, K, n] accumulate type: log-sum-exp, or what remains of the stick
};

struct MoaAttentionBwdParams {
  MoaAttentionParams fwd;  // out and state are read
  AttentionOperand grad_out;
  const void* grad_state = nullptr;  // [B, S, K, n] accumulate type, contiguous
  void* workspace = nullptr;         // moa_attention_workspace() bytes
  void* grad_q = nullptr;            // contiguous, like the operands
  void* grad_k = nullptr;
  void* grad_v = nullptr;
};

namespace cpu {
void moa_attention(const MoaAttentionParams& p, const Parallel& par);
int64_t moa_attention_workspace(const MoaAttentionParams& p);
void moa_attention_bwd(const MoaAttentionBwdParams& p, const Parallel& par);
}  // namespace cpu

namespace cuda {

// Pointers are the device's. cu_seqlens of the base is not read: kernels take `sequences`
// [num_sequences + 1] and clamp what leads outside.
struct MoaAttentionParams : ::moe_ops::MoaAttentionParams {
  IndexMap sequences;            // data is nullptr without sequences
  void* workspace = nullptr;     // moa_attention_workspace() or moa_attention_bwd_workspace() bytes
  bool batch_invariant = false;  // as it was when the workspace was asked for
};

struct MoaAttentionBwdParams {
  MoaAttentionParams fwd;  // out and state are read
  AttentionOperand grad_out;
  const void* grad_state = nullptr;  // [B, S, K, n] accumulate type, contiguous
  void* grad_q = nullptr;            // contiguous, like the operands
  void* grad_k = nullptr;
  void* grad_v = nullptr;
};

int64_t moa_attention_workspace(const MoaAttentionParams& p);
Status moa_attention(const MoaAttentionParams& p, Stream stream);
int64_t moa_attention_bwd_workspace(const MoaAttentionParams& p);
Status moa_attention_bwd(const MoaAttentionBwdParams& p, Stream stream);

}  // namespace cuda

}  // namespace moe_ops
