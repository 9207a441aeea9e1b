// gated_act: activation of [rows, 2I] (or [rows, I] without a gate).
#pragma once

#include <cstdint>

#include "moe_ops/activation.h"
#include "moe_ops/common.h"

namespace moe_ops {

struct GatedActParams {
  const void* gate_up;  // [rows, 2I] (gated) or [rows, I], contiguous
  DType type;
  int64_t num_rows;
  int64_t intermediate_size;  // I
  ActivationParams act;
  void* h;  // [rows, I] contiguous, out
};

struct GatedActBwdParams {
  const void* grad_h;   // [rows, I] contiguous
  const void* gate_up;  // as above
  DType type;
  int64_t num_rows;
  int64_t intermediate_size;
  ActivationParams act;
  void* grad_gate_up;  // as gate_up, out
};

namespace cpu {
void gated_act(const GatedActParams& p, const Parallel& par);
void gated_act_bwd(const GatedActBwdParams& p, const Parallel& par);
}  // namespace cpu

namespace cuda {

struct GatedActParams : moe_ops::GatedActParams {
  const int32_t* num_valid_rows = nullptr;  // rows from here on are left alone; nullptr: all valid
};

Status gated_act(const GatedActParams& p, Stream stream);
Status gated_act_bwd(const GatedActBwdParams& p, Stream stream);

}  // namespace cuda

}  // namespace moe_ops
