#include "moe_ops/sort_slots.h"

#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

namespace {

std::tuple<Tensor, Tensor, Tensor> sort_slots(const Tensor& topk_ids, int64_t num_experts) {
  constexpr const char* kOp = "sort_slots";
  check_index(kOp, "topk_ids", topk_ids);
  check_dim(kOp, "topk_ids", topk_ids, 2, "[T, K]");
  check_num_experts(kOp, num_experts);
  return sorted_slots(kOp, topk_ids, num_experts);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> sorted_slots(const Op& op, const Tensor& topk_ids,
                                                int64_t num_experts) {
  const int64_t n = topk_ids.numel();
  MOE_CHECK(n <= std::numeric_limits<int32_t>::max(), op,
            ": topk_ids must hold fewer than 2^31 slots, got ", n, ".");
  Tensor expert_offsets = empty_cpu({num_experts + 1}, ScalarType::Int);
  Tensor row_to_slot = empty_cpu({n}, ScalarType::Int);
  Tensor slot_to_row = empty_cpu({topk_ids.size(0), topk_ids.size(1)}, ScalarType::Int);
  SortSlotsParams p;
  p.num_slots = n;
  p.num_experts = num_experts;
  p.expert_offsets = static_cast<int32_t*>(expert_offsets.mutable_data_ptr());
  p.row_to_slot = static_cast<int32_t*>(row_to_slot.mutable_data_ptr());
  p.slot_to_row = static_cast<int32_t*>(slot_to_row.mutable_data_ptr());
  normalize_ids(topk_ids, num_experts, p.slot_to_row);
  p.topk_ids = p.slot_to_row;
  cpu::sort_slots(p);
  return {expert_offsets, row_to_slot, slot_to_row};
}

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) { m.impl("sort_slots", MOE_BOX(sort_slots)); }

}  // namespace moe_ops::adapter
