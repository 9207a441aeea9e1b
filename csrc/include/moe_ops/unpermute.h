// unpermute: weighted sum of a token's rows, in slot order, in the accumulate type.
#pragma once

#include <cstdint>

#include "moe_ops/common.h"

namespace moe_ops {

struct UnpermuteParams {
  const void* rows;  // [N, H] rows row_stride elements apart
  DType type;
  int64_t row_stride;
  int64_t hidden_size;         // H
  int64_t num_tokens;          // T
  int64_t top_k;               // K
  int64_t num_valid_rows;      // expert_offsets[E]; slots whose row is at or past it add nothing
  const int32_t* slot_to_row;  // [T, K]
  const void* topk_weights;    // [T, K] in the accumulate type, or nullptr: ones
  void* y;                     // [T, H] contiguous, out
  DType y_type;
};

// grad_rows[r] = weight of its slot * grad_y of its token; grad_weights[t,k] = <rows[r],
// grad_y[t]>.
struct UnpermuteBwdParams {
  const void* grad_y;  // [T, H] rows grad_y_stride elements apart
  const void* rows;    // [N, H] rows row_stride elements apart
  DType type;          // of both
  int64_t grad_y_stride, row_stride;
  int64_t hidden_size, num_tokens, top_k, num_rows, num_valid_rows;
  const int32_t* slot_to_row;  // [T, K]
  const void* topk_weights;    // [T, K] in the accumulate type, or nullptr: ones
  void* grad_rows;             // [N, H] contiguous, out
  void* grad_weights;          // [T, K] in the accumulate type, out; nullptr: not wanted
};

namespace cpu {
void unpermute(const UnpermuteParams& p, const Parallel& par);
// Its tokens [begin, end) alone, and what one costs in elementary operations.
void unpermute_tokens(const UnpermuteParams& p, int64_t begin, int64_t end);
double unpermute_cost(const UnpermuteParams& p);
void unpermute_bwd(const UnpermuteBwdParams& p, const Parallel& par);
}  // namespace cpu

namespace cuda {

struct UnpermuteParams {
  const void* rows;  // [N, H] rows row_stride elements apart
  DType type;
  int64_t row_stride;
  int64_t hidden_size;            // H
  int64_t num_tokens;             // T
  int64_t top_k;                  // K
  int64_t num_rows;               // N
  const int32_t* expert_offsets;  // [E+1]; slots whose row is at or past the last one add nothing
  int64_t num_experts;            // E
  IndexMap slot_to_row;           // [T, K]
  // [N] or none: a slot counts only if this maps its row back to it, so that slot_to_row may hold
  // anything where no row belongs to a slot.
  IndexMap row_to_slot;
  const void* topk_weights;  // [T, K] in the accumulate type, or nullptr: ones
  void* y;                   // [T, H] contiguous, out
  DType y_type;              // type, or with type its accumulate type
};

// As the CPU's. slot_to_row must hold each row once: rows that it leaves out are not written.
struct UnpermuteBwdParams {
  const void* grad_y;  // [T, H] rows grad_y_stride elements apart
  const void* rows;    // [N, H] rows row_stride elements apart; not read without grad_weights
  DType type;          // of both
  int64_t grad_y_stride, row_stride;
  int64_t hidden_size, num_tokens, top_k, num_rows;
  const int32_t* expert_offsets;
  int64_t num_experts;
  IndexMap slot_to_row;      // [T, K]
  const void* topk_weights;  // [T, K] in the accumulate type, or nullptr: ones
  void* grad_rows;           // [N, H] contiguous, out
  void* grad_weights;        // [T, K] in the accumulate type, out; nullptr: not wanted
};

Status unpermute(const UnpermuteParams& p, Stream stream);
Status unpermute_bwd(const UnpermuteBwdParams& p, Stream stream);

}  // namespace cuda

}  // namespace moe_ops
