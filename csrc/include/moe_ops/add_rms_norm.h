// add_rms_norm: a row, what is added to it, and the sum over its root mean square.
#pragma once

#include <cstdint>

#include "moe_ops/common.h"

namespace moe_ops {

struct AddRmsNormParams {
  const void* x;         // [rows, H] contiguous, like all below
  const void* residual;  // [rows, H] or nullptr
  const void* weight;    // [H]
  const void* bias;      // [H] or nullptr
  DType type;            // of all these, of y and of sum
  int64_t num_rows;
  int64_t hidden_size;  // H
  double eps;
  void* y;     // [rows, H], out
  void* sum;   // [rows, H], out; nullptr: there is nothing to add, and the sum is x
  void* rstd;  // [rows] in the accumulate type, out
};

struct AddRmsNormBwdParams {
  const void* grad_y;    // [rows, H]
  const void* grad_sum;  // [rows, H] or nullptr: zeros
  const void* sum;       // [rows, H]
  const void* weight;    // [H]
  const void* rstd;      // [rows] in the accumulate type
  DType type;
  int64_t num_rows;
  int64_t hidden_size;
  void* workspace;    // add_rms_norm_workspace() bytes
  void* grad_x;       // [rows, H], out; of the residual too. nullptr: not wanted, like the others
  void* grad_weight;  // [H], out
  void* grad_bias;    // [H], out
};

namespace cpu {
void add_rms_norm(const AddRmsNormParams& p, const Parallel& par);
void add_rms_norm_bwd(const AddRmsNormBwdParams& p, const Parallel& par);
int64_t add_rms_norm_workspace(int64_t num_rows, int64_t hidden_size, DType type);
}  // namespace cpu

}  // namespace moe_ops
