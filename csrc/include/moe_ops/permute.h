// permute: token rows into expert order. Its gradient sums a token's rows.
#pragma once

#include <cstdint>

#include "moe_ops/common.h"

namespace moe_ops {

struct PermuteParams {
  const void* x;  // [T, H] rows x_stride elements apart
  DType type;
  int64_t x_stride;
  int64_t hidden_size;          // H
  int64_t num_rows;             // N
  int64_t num_valid_rows;       // expert_offsets[E]; rows from here on come out zero
  const int32_t* row_to_token;  // [num_valid_rows]
  void* rows;                   // [N, H] contiguous, out
};

namespace cpu {
void permute(const PermuteParams& p, const Parallel& par);
}  // namespace cpu

}  // namespace moe_ops
