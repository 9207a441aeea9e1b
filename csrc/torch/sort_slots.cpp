#include "moe_ops/sort_slots.h"

#include "torch/device.h"
#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

namespace {

void check_sort_slots(const Op& op, const Tensor& topk_ids, int64_t num_experts) {
  check_index(op, "topk_ids", topk_ids);
  check_dim(op, "topk_ids", topk_ids, 2, "[T, K]");
  check_num_experts(op, num_experts);
}

std::tuple<Tensor, Tensor, Tensor> sort_slots(const Tensor& topk_ids, int64_t num_experts) {
  const Op op("sort_slots");
  check_sort_slots(op, topk_ids, num_experts);
  return sorted_slots(op, topk_ids, num_experts);
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

std::tuple<Tensor, Tensor, Tensor> sorted_slots(const Op& op, const Tensor& topk_ids,
                                                int64_t num_experts) {
  const int64_t n = topk_ids.numel();
  check_num_slots(op, "topk_ids", n);
  check_num_experts(op, num_experts);
  Tensor expert_offsets = empty_cpu(op, {num_experts + 1}, ScalarType::Int);
  Tensor row_to_slot = empty_cpu(op, {n}, ScalarType::Int);
  Tensor slot_to_row = empty_cpu(op, {topk_ids.size(0), topk_ids.size(1)}, ScalarType::Int);
  sort(topk_ids, num_experts, static_cast<int32_t*>(expert_offsets.mutable_data_ptr()),
       static_cast<int32_t*>(row_to_slot.mutable_data_ptr()),
       static_cast<int32_t*>(slot_to_row.mutable_data_ptr()));
  return {expert_offsets, row_to_slot, slot_to_row};
}

SlotMaps slot_maps(const Op& op, const Tensor& topk_ids, int64_t num_experts) {
  const int64_t n = topk_ids.numel();
  check_num_slots(op, "topk_ids", n);
  check_num_experts(op, num_experts);
  SlotMaps out;
  out.row_to_slot = std::make_unique_for_overwrite<int32_t[]>(static_cast<size_t>(n));
  out.slot_to_row = std::make_unique_for_overwrite<int32_t[]>(static_cast<size_t>(n));
  std::vector<int32_t> ends(static_cast<size_t>(num_experts) + 1);
  sort(topk_ids, num_experts, ends.data(), out.row_to_slot.get(), out.slot_to_row.get());
  out.offsets.assign(ends.begin(), ends.end());
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) { m.impl("sort_slots", MOE_BOX(sort_slots)); }

#ifdef MOE_OPS_WITH_CUDA

std::tuple<Tensor, Tensor, Tensor> device_sorted_slots(const Op& op, const Tensor& topk_ids,
                                                       int64_t num_experts) {
  const int64_t n = topk_ids.numel();
  check_num_slots(op, "topk_ids", n);
  check_num_experts(op, num_experts);
  const DeviceIndex ids = device_index(op, "topk_ids", topk_ids);
  Tensor expert_offsets = device_empty(topk_ids, {num_experts + 1}, ScalarType::Int);
  Tensor row_to_slot = device_empty(topk_ids, {n}, ScalarType::Int);
  Tensor slot_to_row =
      device_empty(topk_ids, {topk_ids.size(0), topk_ids.size(1)}, ScalarType::Int);
  Tensor workspace =
      device_empty(topk_ids, {cuda::sort_slots_workspace(n, num_experts)}, ScalarType::Byte);
  cuda::SortSlotsParams p;
  p.topk_ids = ids.data;
  p.ids_are_int64 = ids.is_64;
  p.num_slots = n;
  p.num_experts = num_experts;
  p.expert_offsets = static_cast<int32_t*>(expert_offsets.mutable_data_ptr());
  p.row_to_slot = static_cast<int32_t*>(row_to_slot.mutable_data_ptr());
  p.slot_to_row = static_cast<int32_t*>(slot_to_row.mutable_data_ptr());
  p.workspace = workspace.mutable_data_ptr();
  check_status(op, cuda::sort_slots(p, current_stream(topk_ids)));
  return {expert_offsets, row_to_slot, slot_to_row};
}

static std::tuple<Tensor, Tensor, Tensor> sort_slots_cuda(const Tensor& topk_ids,
                                                          int64_t num_experts) {
  const Op op("sort_slots", topk_ids);
  check_sort_slots(op, topk_ids, num_experts);
  return device_sorted_slots(op, topk_ids, num_experts);
}

MOE_CUDA_LIBRARY(m) { m.impl("sort_slots", MOE_CUDA_BOX(sort_slots_cuda)); }

#endif  // MOE_OPS_WITH_CUDA

}  // namespace moe_ops::adapter
