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

void check_count(const char* op, int64_t n) {
  MOE_CHECK(n <= std::numeric_limits<int32_t>::max(), op,
            ": topk_ids must hold fewer than 2^31 slots, got ", n, ".");
}

void sort(const Tensor& topk_ids, int64_t num_experts, int32_t* expert_offsets,
          int32_t* row_to_slot, int32_t* slot_to_row) {
  normalize_ids(topk_ids, num_experts, slot_to_row);
  SortSlotsParams p;
  p.topk_ids = slot_to_row;
  p.num_slots = topk_ids.numel();
  p.num_experts = num_experts;
  p.expert_offsets = expert_offsets;
  p.row_to_slot = row_to_slot;
  p.slot_to_row = slot_to_row;
  cpu::sort_slots(p);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> sorted_slots(const char* op, const Tensor& topk_ids,
                                                int64_t num_experts) {
  const int64_t n = topk_ids.numel();
  check_count(op, n);
  Tensor expert_offsets = empty_cpu({num_experts + 1}, ScalarType::Int);
  Tensor row_to_slot = empty_cpu({n}, ScalarType::Int);
  Tensor slot_to_row = empty_cpu({topk_ids.size(0), topk_ids.size(1)}, ScalarType::Int);
  sort(topk_ids, num_experts, static_cast<int32_t*>(expert_offsets.mutable_data_ptr()),
       static_cast<int32_t*>(row_to_slot.mutable_data_ptr()),
       static_cast<int32_t*>(slot_to_row.mutable_data_ptr()));
  return {expert_offsets, row_to_slot, slot_to_row};
}

SlotMaps slot_maps(const char* op, const Tensor& topk_ids, int64_t num_experts) {
  const int64_t n = topk_ids.numel();
  check_count(op, n);
  SlotMaps out;
  out.row_to_slot = std::make_unique_for_overwrite<int32_t[]>(static_cast<size_t>(n));
  out.slot_to_row = std::make_unique_for_overwrite<int32_t[]>(static_cast<size_t>(n));
  std::vector<int32_t> ends(static_cast<size_t>(num_experts) + 1);
  sort(topk_ids, num_experts, ends.data(), out.row_to_slot.get(), out.slot_to_row.get());
  out.offsets.assign(ends.begin(), ends.end());
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) { m.impl("sort_slots", MOE_BOX(sort_slots)); }

}  // namespace moe_ops::adapter
