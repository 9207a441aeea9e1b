// unpermute: weighted sum of a token's rows, in slot order, in the accumulate type.
#pragma once

#include <cstdint>

#include "moe_ops/common.h"

namespace moe_ops {

struct UnpermuteParams {
  const void* rows;  // [N, H] rows row_stride elements apart, any number of them
  DType type;
  int64_t row_stride;
  int64_t hidden_size;         // H
  int64_t num_tokens;          // T
  int64_t top_k;               // K
  int64_t num_valid_rows;      // expert_offsets[E]; slots whose row is at or past it add nothing
  const int32_t* slot_to_row;  // [T, K]; -1: no row, the slot adds nothing
  // [T+1] or nullptr: token t has the places token_starts[t] to token_starts[t+1] of slot_to_row
  // instead of K, and then there are no topk_weights.
  const int64_t* token_starts = nullptr;
  const void* topk_weights;  // [T, K] in the accumulate type, or nullptr: ones
  void* y;                   // [T, H] rows y_stride elements apart, out
  DType y_type;
  int64_t y_stride = 0;  // 0: contiguous
};

// grad_rows[r] = weight of its slot * grad_y of its token, the sum of them in slot order where
// several slots name row r, and zero where none does; grad_weights[t,k] = <rows[r], grad_y[t]>.
struct UnpermuteBwdParams {
  const void* grad_y;  // [T, H] rows grad_y_stride elements apart
  const void* rows;    // [N, H] rows row_stride elements apart
  DType type;          // of both
  int64_t grad_y_stride, row_stride;
  int64_t hidden_size, num_tokens, top_k, num_rows, num_valid_rows;
  const int32_t* slot_to_row;  // [T, K]; -1: no row
  const void* topk_weights;    // [T, K] in the accumulate type, or nullptr: ones
  void* grad_rows;             // [N, H] contiguous, out
  void* grad_weights;          // [T, K] in the accumulate type, out; nullptr: not wanted
};

namespace cpu {
void unpermute(const UnpermuteParams& p, const Parallel& par);
// unpermute_tokens computes tokens [begin, end) only; unpermute_cost returns the elementary
// operations per token.
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
  int64_t num_rows;               // N, any number
  const int32_t* expert_offsets;  // [E+1]; slots whose row is at or past the last one add nothing
  int64_t num_experts;            // E
  IndexMap slot_to_row;           // [T, K], out of range: no row; not used with `named`
  // Instead of slot_to_row, rows by the map the other way, several or none a slot: row_to_slot [N]
  // and what name_targets made of it. Then there are no topk_weights.
  IndexMap row_to_slot;
  const int32_t* named = nullptr;
  const void* topk_weights;  // [T, K] in the accumulate type, or nullptr: ones
  void* y;                   // [T, H] contiguous, out
  DType y_type;              // type; or one of the two is the accumulate type of the other
};

// Device counterpart of moe_ops::UnpermuteBwdParams.
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
  int32_t* named;            // [2, N] scratch
  void* grad_rows;           // [N, H] contiguous, out
  void* grad_weights;        // [T, K] in the accumulate type, out; nullptr: not wanted
};

// Finds the first and last occurrence of each target in a map of `places` entries to n targets.
// named [2, n]: element i is `places` minus the first place that holds i, element n + i is the last
// such place plus one; both are 0 if no place holds i. Values out of range are ignored.
Status name_targets(const IndexMap& map, int64_t places, int64_t n, int32_t* named, Stream stream);

Status unpermute(const UnpermuteParams& p, Stream stream);
Status unpermute_bwd(const UnpermuteBwdParams& p, Stream stream);

}  // namespace cuda

}  // namespace moe_ops
