// permute: token rows into expert order. Its gradient sums a token's rows.
#pragma once

#include <cstdint>

#include "moe_ops/common.h"

namespace moe_ops {

struct PermuteParams {
  const void* x;  // [T, H] rows x_stride elements apart
  DType type;
  int64_t x_stride;
  int64_t hidden_size;         // H
  int64_t top_k;               // K
  int64_t num_rows;            // N, any number
  int64_t num_valid_rows;      // expert_offsets[E]; rows from here on come out zero
  const int32_t* row_to_slot;  // [N] of T * K slots; -1: no slot, the row comes out zero
  void* rows;                  // [N, H] contiguous, out
};

// grad_x[t] = the sum of its rows, in the order of their slots, then of the rows. A slot may be
// named by several rows or by none.
struct PermuteBwdParams {
  const void* grad_rows;  // [N, H] rows grad_stride elements apart
  DType type;
  int64_t grad_stride;
  int64_t hidden_size, num_tokens, top_k, num_rows, num_valid_rows;
  const int32_t* row_to_slot;  // [N]; -1: no slot, the row adds nothing
  void* grad_x;                // [T, H] contiguous, out
};

namespace cpu {
void permute(const PermuteParams& p, const Parallel& par);
void permute_bwd(const PermuteBwdParams& p, const Parallel& par);
}  // namespace cpu

namespace cuda {

struct PermuteParams {
  const void* x;  // [T, H] rows x_stride elements apart
  DType type;
  int64_t x_stride;
  int64_t hidden_size;            // H
  int64_t num_tokens;             // T
  int64_t top_k;                  // K
  int64_t num_rows;               // N, any number
  const int32_t* expert_offsets;  // [E+1]; rows from the last one on come out zero
  int64_t num_experts;            // E
  IndexMap row_to_slot;           // [N] of T * K slots; out of range: the row comes out zero
  void* rows;                     // [N, H] contiguous, out
};

// Device counterpart of moe_ops::PermuteBwdParams.
struct PermuteBwdParams {
  const void* grad_rows;  // [N, H] rows grad_stride elements apart
  DType type;
  int64_t grad_stride;
  int64_t hidden_size, num_tokens, top_k, num_rows;
  const int32_t* expert_offsets;
  int64_t num_experts;
  IndexMap row_to_slot;  // [N]
  int32_t* named;        // [2, T * K] scratch
  void* grad_x;          // [T, H] contiguous, out
};

Status permute(const PermuteParams& p, Stream stream);
Status permute_bwd(const PermuteBwdParams& p, Stream stream);

}  // namespace cuda

}  // namespace moe_ops
