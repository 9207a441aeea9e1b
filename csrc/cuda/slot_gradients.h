// Gradients of slots and routing weights from u = W^T grad_y by rows, with s = row_to_slot[r]:
//   grad_topk_weights[s] = <h[r], u[r]> + <bias[e(r)], grad_y[r]>
//   grad_h[s] = topk_weights[s] * u[r]
// Slots without an expert get zeros. u, h, grad_y and bias have one type. For moe_linear_reduce and
// moe_ffn.
#pragma once

#include "moe_ops/grouped_gemm.h"
#include "moe_ops/routing.h"

namespace moe_ops::cuda {

struct SlotGradientsParams {
  Routing routing;
  int64_t in_features = 0;  // D
  int64_t hidden_size = 0;  // H
  DType type = DType::kFloat32;
  const void* u = nullptr;             // [N, D] contiguous
  DeviceRows h;                        // [N, D]
  DeviceRows grad_y;                   // [N, H]; read with a bias only
  ExpertVectors bias;                  // [E, H] or none
  const void* topk_weights = nullptr;  // [N] by slot, accumulate type; not read without grad_h
  void* grad_h = nullptr;              // [N, D] contiguous by slot; nullptr: not wanted
  void* grad_topk_weights = nullptr;   // [N] by slot, accumulate type; nullptr: not wanted
};

Status slot_gradients(const SlotGradientsParams& p, Stream stream);

}  // namespace moe_ops::cuda
