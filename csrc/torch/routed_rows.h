// The routing of moe_linear_map and moe_linear_reduce in the form that the kernels take.
#pragma once

#include <cstring>
#include <vector>

#include "moe_ops/moe_linear_map.h"
#include "moe_ops/unpermute.h"
#include "torch/device.h"
#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

struct RoutedRows {
  Tensor row_to_slot_tensor, slot_to_row_tensor;
  std::vector<int64_t> offsets;       // [E+1]
  const int32_t* row_to_slot;         // [N]
  const int32_t* slot_to_row;         // [T, K]
  std::vector<int32_t> row_to_token;  // [N]

  int64_t valid() const { return offsets.back(); }
};

// Sizes for cpu::takes_slot_product; the caller sets ids. w: [E, rows, cols].
inline SlotProduct slot_product(const Tensor& topk_ids, const Tensor& w) {
  return {topk_ids.size(0), topk_ids.size(1), w.size(0), w.size(1), w.size(2), nullptr};
}

inline void* data_if(bool wanted, Tensor& t) { return wanted ? t.mutable_data_ptr() : nullptr; }

inline RoutedRows routed_rows(const Op& op, const Tensor& topk_ids, int64_t num_experts) {
  auto [ends, row_to_slot, slot_to_row] = sorted_slots(op, topk_ids, num_experts);
  const auto* e = static_cast<const int32_t*>(ends.const_data_ptr());
  RoutedRows out{row_to_slot,
                 slot_to_row,
                 std::vector<int64_t>(e, e + num_experts + 1),
                 static_cast<const int32_t*>(row_to_slot.const_data_ptr()),
                 static_cast<const int32_t*>(slot_to_row.const_data_ptr()),
                 std::vector<int32_t>(static_cast<size_t>(row_to_slot.numel()))};
  const auto top_k = static_cast<int32_t>(topk_ids.size(1));
  for (size_t r = 0; r < out.row_to_token.size(); ++r) {
    out.row_to_token[r] = out.row_to_slot[r] / top_k;
  }
  return out;
}

// Rows [valid, features] in the accumulate type of `type` into y [T, features] of `type`: the
// weighted (or plain) sum of each token's.
inline void sum_slots(const RoutedRows& routing, const Tensor& rows, const void* weights, Tensor& y,
                      DType type) {
  UnpermuteParams p;
  p.rows = rows.const_data_ptr();
  p.type = accumulate_type(type);
  p.row_stride = p.hidden_size = rows.size(1);
  p.num_tokens = routing.slot_to_row_tensor.size(0);
  p.top_k = routing.slot_to_row_tensor.size(1);
  p.num_valid_rows = routing.valid();
  p.slot_to_row = routing.slot_to_row;
  p.topk_weights = weights;
  p.y = y.mutable_data_ptr();
  p.y_type = type;
  cpu::unpermute(p, torch_parallel());
}

// out[r] = b[e(r)] a[r] (+ bias) over the routed rows; b is [E, out_features, in_features].
inline void multiply_rows(const RoutedRows& routing, const Rows& a, const ExpertMatrices& b,
                          const ExpertVectors& bias, int64_t out_features, int64_t in_features,
                          const MutableRows& out) {
  GroupedGemmParams p;
  p.expert_offsets = routing.offsets.data();
  p.num_experts = static_cast<int64_t>(routing.offsets.size()) - 1;
  p.out_features = out_features;
  p.in_features = in_features;
  p.a = a;
  p.b = b;
  p.bias = bias;
  p.out = out;
  cpu::grouped_gemm(p, torch_parallel());
}

// Gradients of the matrices and of the bias; scale: one factor a row of grad, or nullptr.
inline void weight_gradient(const RoutedRows& routing, const Rows& grad, const void* scale,
                            const Rows& a, Tensor& out, DType type) {
  GroupedWgradParams p;
  p.expert_offsets = routing.offsets.data();
  p.num_experts = out.size(0);
  p.out_features = out.size(1);
  p.in_features = out.size(2);
  p.grad = grad;
  p.grad_scale = scale;
  p.a = a;
  p.out = out.mutable_data_ptr();
  p.out_type = type;
  cpu::grouped_gemm_wgrad(p, torch_parallel());
}

inline void bias_gradient(const RoutedRows& routing, const Rows& grad, const void* scale,
                          Tensor& out, DType type) {
  GroupedSumParams p;
  p.expert_offsets = routing.offsets.data();
  p.num_experts = out.size(0);
  p.features = out.size(1);
  p.rows = grad;
  p.scale = scale;
  p.out = out.mutable_data_ptr();
  p.out_type = type;
  cpu::grouped_sum(p, torch_parallel());
}

// Slots without an expert have no row that writes them.
inline void zero_empty_slots(const RoutedRows& routing, void* slots, int64_t bytes_per_slot) {
  if (bytes_per_slot == 0) return;
  for (int64_t r = routing.valid(); r < static_cast<int64_t>(routing.row_to_token.size()); ++r) {
    std::memset(static_cast<char*>(slots) + routing.row_to_slot[r] * bytes_per_slot, 0,
                static_cast<size_t>(bytes_per_slot));
  }
}

#ifdef MOE_OPS_WITH_CUDA

// The same on a device, where the host knows N only. Rows of a token's slots, and of slots, are
// reached through row_to_slot.
struct DeviceRouting {
  Tensor expert_offsets, row_to_slot, slot_to_row;
  int64_t num_experts, num_rows, top_k;

  const int32_t* offsets() const {
    return static_cast<const int32_t*>(expert_offsets.const_data_ptr());
  }
  const int32_t* slots() const { return static_cast<const int32_t*>(row_to_slot.const_data_ptr()); }

  cuda::DeviceRows by_token(const Tensor& t, DType type) const {
    return device_rows(t, type, slots(), top_k);
  }
  // t: [N, features] or [T, K, features] contiguous, by slot.
  cuda::DeviceRows by_slot(const Tensor& t, DType type) const {
    return {t.const_data_ptr(), type, t.size(t.dim() - 1), slots(), 1, num_rows};
  }
  cuda::MutableDeviceRows by_slot(Tensor& t, DType type) const {
    return {t.mutable_data_ptr(), type, t.size(t.dim() - 1), slots(), 1, num_rows};
  }
  // weights: [T, K] in the accumulate type.
  cuda::RowScale by_slot(const Tensor& weights) const {
    return {weights.const_data_ptr(), slots(), num_rows};
  }
};

inline DeviceRouting device_routing(const Op& op, const Tensor& topk_ids, int64_t num_experts) {
  auto [offsets, row_to_slot, slot_to_row] = device_sorted_slots(op, topk_ids, num_experts);
  return {offsets, row_to_slot, slot_to_row, num_experts, topk_ids.numel(), topk_ids.size(1)};
}

inline cuda::GroupedGemmParams device_product(const DeviceRouting& routing,
                                              const cuda::DeviceRows& a, const ExpertMatrices& b,
                                              const ExpertVectors& bias, int64_t out_features,
                                              int64_t in_features,
                                              const cuda::MutableDeviceRows& out) {
  cuda::GroupedGemmParams p;
  p.expert_offsets = routing.offsets();
  p.num_experts = routing.num_experts;
  p.num_rows = routing.num_rows;
  p.out_features = out_features;
  p.in_features = in_features;
  p.a = a;
  p.b = b;
  p.bias = bias;
  p.out = out;
  return p;
}

// Rows [N, features] of `type` into y [T, features]: the weighted (or plain) sum of each token's.
inline void device_sum_slots(const Op& op, const DeviceRouting& routing, const Tensor& rows,
                             const void* weights, Tensor& y, DType type) {
  cuda::UnpermuteParams p{};
  p.rows = rows.const_data_ptr();
  p.type = p.y_type = type;
  p.row_stride = p.hidden_size = rows.size(1);
  p.num_tokens = y.size(0);
  p.top_k = routing.top_k;
  p.num_rows = routing.num_rows;
  p.expert_offsets = routing.offsets();
  p.num_experts = routing.num_experts;
  p.slot_to_row = {routing.slot_to_row.const_data_ptr(), false};
  p.topk_weights = weights;
  p.y = y.mutable_data_ptr();
  check_status(op, cuda::unpermute(p, current_stream(y)));
}

inline void device_weight_gradient(const Op& op, const DeviceRouting& routing,
                                   const cuda::DeviceRows& grad, const cuda::RowScale& scale,
                                   const cuda::DeviceRows& a, Tensor& out) {
  cuda::GroupedWgradParams p;
  p.expert_offsets = routing.offsets();
  p.num_experts = routing.num_experts;
  p.num_rows = routing.num_rows;
  p.out_features = out.size(1);
  p.in_features = out.size(2);
  p.grad = grad;
  p.grad_scale = scale;
  p.a = a;
  p.out = out.mutable_data_ptr();
  p.out_type = grad.type;
  check_status(op, cuda::grouped_gemm_wgrad(p, current_stream(out)));
}

inline void device_bias_gradient(const Op& op, const DeviceRouting& routing,
                                 const cuda::DeviceRows& grad, const cuda::RowScale& scale,
                                 Tensor& out) {
  cuda::GroupedSumParams p;
  p.expert_offsets = routing.offsets();
  p.num_experts = routing.num_experts;
  p.num_rows = routing.num_rows;
  p.features = out.size(1);
  p.rows = grad;
  p.scale = scale;
  p.out = out.mutable_data_ptr();
  p.out_type = grad.type;
  check_status(op, cuda::grouped_sum(p, current_stream(out)));
}

#endif  // MOE_OPS_WITH_CUDA

}  // namespace moe_ops::adapter
