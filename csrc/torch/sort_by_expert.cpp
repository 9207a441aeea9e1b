#include "moe_ops/sort_by_expert.h"

#include "torch/device.h"
#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

namespace {

void check_sort_by_expert(const Op& op, const Tensor& topk_ids, int64_t num_experts) {
  check_index(op, "topk_ids", topk_ids);
  check_dim(op, "topk_ids", topk_ids, 2, "[T, K]");
  check_num_experts(op, num_experts);
}

std::tuple<Tensor, Tensor, Tensor> sort_by_expert(const Tensor& topk_ids, int64_t num_experts) {
  const Op op("sort_by_expert");
  check_sort_by_expert(op, topk_ids, num_experts);
  const SortedSlots out = sorted_slots(op, topk_ids, num_experts);
  return {out.expert_offsets, out.row_to_slot, out.slot_to_row};
}

// Sets the outputs that sort_by_expert fills, in the routing and in the returned parameters.
SortByExpertParams sort_params(const SlotIds& ids, SortedSlots& out) {
  SortByExpertParams p{ids.routing, static_cast<int32_t*>(out.expert_offsets.mutable_data_ptr()),
                       static_cast<int32_t*>(out.row_to_slot.mutable_data_ptr()),
                       static_cast<int32_t*>(out.slot_to_row.mutable_data_ptr()), nullptr};
  out.routing = routing_of(out.expert_offsets, out.row_to_slot, out.slot_to_row);
  return p;
}

}  // namespace

SlotIds slot_ids(const Op& op, const Tensor& topk_ids, int64_t num_experts) {
  check_num_slots(op, "topk_ids", topk_ids.numel());
  check_num_experts(op, num_experts);
  SlotIds out{dense(topk_ids), {}};
  out.routing.num_tokens = topk_ids.size(0);
  out.routing.top_k = topk_ids.size(1);
  out.routing.num_experts = num_experts;
  out.routing.topk_ids = {out.topk_ids.const_data_ptr(),
                          out.topk_ids.scalar_type() == ScalarType::Long};
  return out;
}

SortedSlots sorted_slots(const Op& op, const Tensor& topk_ids, int64_t num_experts) {
  const SlotIds ids = slot_ids(op, topk_ids, num_experts);
  SortedSlots out{empty_cpu(op, {num_experts + 1}, ScalarType::Int),
                  empty_cpu(op, {topk_ids.numel()}, ScalarType::Int),
                  empty_cpu(op, {topk_ids.size(0), topk_ids.size(1)}, ScalarType::Int),
                  {}};
  cpu::sort_by_expert(sort_params(ids, out));
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) { m.impl("sort_by_expert", MOE_BOX(sort_by_expert)); }

#ifdef MOE_OPS_WITH_CUDA

UnsortedSlots device_unsorted_slots(const Op& op, const Tensor& topk_ids, int64_t num_experts) {
  const int64_t n = topk_ids.numel();
  const SlotIds ids = slot_ids(op, topk_ids, num_experts);
  SortedSlots sorted{device_empty(topk_ids, {num_experts + 1}, ScalarType::Int),
                     device_empty(topk_ids, {n}, ScalarType::Int),
                     device_empty(topk_ids, {topk_ids.size(0), topk_ids.size(1)}, ScalarType::Int),
                     {}};
  Tensor workspace =
      device_empty(topk_ids, {cuda::sort_by_expert_workspace(n, num_experts)}, ScalarType::Byte);
  SortByExpertParams sort = sort_params(ids, sorted);
  sort.workspace = workspace.mutable_data_ptr();
  sorted.routing.topk_ids = ids.routing.topk_ids;
  return {sorted, sort, ids.topk_ids, workspace};
}

SortedSlots device_sorted_slots(const Op& op, const Tensor& topk_ids, int64_t num_experts) {
  const UnsortedSlots slots = device_unsorted_slots(op, topk_ids, num_experts);
  check_status(op, cuda::sort_by_expert(slots.sort, current_stream(topk_ids)));
  return slots.sorted;
}

static std::tuple<Tensor, Tensor, Tensor> sort_by_expert_cuda(const Tensor& topk_ids,
                                                              int64_t num_experts) {
  const Op op("sort_by_expert", topk_ids);
  check_sort_by_expert(op, topk_ids, num_experts);
  const SortedSlots out = device_sorted_slots(op, topk_ids, num_experts);
  return {out.expert_offsets, out.row_to_slot, out.slot_to_row};
}

MOE_CUDA_LIBRARY(m) { m.impl("sort_by_expert", MOE_CUDA_BOX(sort_by_expert_cuda)); }

#endif  // MOE_OPS_WITH_CUDA

}  // namespace moe_ops::adapter
