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

}  // namespace moe_ops
