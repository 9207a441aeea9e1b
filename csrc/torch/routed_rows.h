// The routing of moe_linear_map and moe_linear_reduce in the form that the kernels take.
#pragma once

#include <cstring>
#include <vector>

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

inline RoutedRows routed_rows(const char* op, const Tensor& topk_ids, int64_t num_experts) {
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

// Slots without an expert have no row that writes them.
inline void zero_empty_slots(const RoutedRows& routing, void* slots, int64_t bytes_per_slot) {
  if (bytes_per_slot == 0) return;
  for (int64_t r = routing.valid(); r < static_cast<int64_t>(routing.row_to_token.size()); ++r) {
    std::memset(static_cast<char*>(slots) + routing.row_to_slot[r] * bytes_per_slot, 0,
                static_cast<size_t>(bytes_per_slot));
  }
}

}  // namespace moe_ops::adapter
