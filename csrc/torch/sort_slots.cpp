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

void check_num_slots(const Op& op, int64_t n) {
  MOE_CHECK(n <= std::numeric_limits<int32_t>::max(), op,
            ": topk_ids must hold fewer than 2^31 slots, got ", n, ".");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> sorted_slots(const Op& op, const Tensor& topk_ids,
                                                int64_t num_experts) {
  const int64_t n = topk_ids.numel();
  check_num_slots(op, n);
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

#ifdef MOE_OPS_WITH_CUDA

std::tuple<Tensor, Tensor, Tensor> device_sorted_slots(const Op& op, const Tensor& topk_ids,
                                                       int64_t num_experts) {
  const int64_t n = topk_ids.numel();
  check_num_slots(op, n);
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
