#include "moe_ops/dispatch_layout.h"

#include "torch/device.h"
#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

namespace {

constexpr const char* kOp = "dispatch_layout";

using PlanOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Checks, and the sizes of a call.
DispatchLayoutParams check(const Op& op, const Tensor& topk_ids, int64_t num_ranks,
                           int64_t experts_per_rank, const OptTensor& physical) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  check_index(op, "topk_ids", topk_ids);
  check_dim(op, "topk_ids", topk_ids, 2, "[T, K]");
  check_num_slots(op, "topk_ids", topk_ids.numel());
  MOE_CHECK(num_ranks >= 1 && num_ranks < kMost, op,
            ": num_ranks must be at least 1 and less than 2^31 - 1, got ", num_ranks, ".");
  MOE_CHECK(experts_per_rank >= 1 && experts_per_rank <= kMost / num_ranks, op,
            ": experts_per_rank must be at least 1 and, times num_ranks = ", num_ranks,
            ", less than 2^31, got ", experts_per_rank, ".");
  if (physical.has_value()) {
    check_index(op, "physical", *physical);
    check_dim(op, "physical", *physical, 1, "[E]");
  }
  DispatchLayoutParams p{};
  p.num_tokens = topk_ids.size(0);
  p.top_k = topk_ids.size(1);
  p.num_ranks = num_ranks;
  p.experts_per_rank = experts_per_rank;
  p.num_ids = physical.has_value() ? physical->numel() : num_ranks * experts_per_rank;
  return p;
}

// Tensors that hold the indices of a call, and the pointers to them.
struct Indices {
  Tensor topk_ids;
  OptTensor physical;
};
Indices set_indices(DispatchLayoutParams& p, const Tensor& topk_ids, const OptTensor& physical) {
  const auto map_of = [](const Tensor& t) {
    return IndexMap{t.const_data_ptr(), t.scalar_type() == ScalarType::Long};
  };
  Indices out{dense(topk_ids), {}};
  p.topk_ids = map_of(out.topk_ids);
  if (physical.has_value()) {
    out.physical = dense(*physical);
    p.physical = map_of(*out.physical);
  }
  return out;
}

// Allocates outputs with `empty` and sets the pointers to them.
template <class Empty>
PlanOutputs outputs_of(DispatchLayoutParams& p, const Empty& empty) {
  Tensor rank_offsets = empty({p.num_ranks + 1});
  Tensor row_to_token = empty({p.num_rows()});
  Tensor slot_to_row = empty({p.num_tokens, p.top_k});
  Tensor local_ids = empty({p.num_rows(), p.top_k});
  p.rank_offsets = static_cast<int32_t*>(rank_offsets.mutable_data_ptr());
  p.row_to_token = static_cast<int32_t*>(row_to_token.mutable_data_ptr());
  p.slot_to_row = static_cast<int32_t*>(slot_to_row.mutable_data_ptr());
  p.local_ids = static_cast<int32_t*>(local_ids.mutable_data_ptr());
  return {rank_offsets, row_to_token, slot_to_row, local_ids};
}

PlanOutputs dispatch_layout(const Tensor& topk_ids, int64_t num_ranks, int64_t experts_per_rank,
                            const OptTensor& physical) {
  DispatchLayoutParams p = check(kOp, topk_ids, num_ranks, experts_per_rank, physical);
  const Indices indices = set_indices(p, topk_ids, physical);
  PlanOutputs out = outputs_of(p, [](std::initializer_list<int64_t> sizes) {
    return empty_cpu(kOp, sizes, ScalarType::Int);
  });
  cpu::dispatch_layout(p, torch_parallel());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) { m.impl("dispatch_layout", MOE_BOX(dispatch_layout)); }

#ifdef MOE_OPS_WITH_CUDA

static PlanOutputs dispatch_layout_cuda(const Tensor& topk_ids, int64_t num_ranks,
                                        int64_t experts_per_rank, const OptTensor& physical) {
  const Op op(kOp, topk_ids);
  DispatchLayoutParams p = check(op, topk_ids, num_ranks, experts_per_rank, physical);
  const Indices indices = set_indices(p, topk_ids, physical);
  PlanOutputs out = outputs_of(p, [&](std::initializer_list<int64_t> sizes) {
    return device_empty(topk_ids, sizes, ScalarType::Int);
  });
  Tensor workspace = device_empty(topk_ids, {cuda::dispatch_layout_workspace(p)}, ScalarType::Byte);
  p.workspace = workspace.mutable_data_ptr();
  check_status(op, cuda::dispatch_layout(p, current_stream(topk_ids)));
  return out;
}

MOE_CUDA_LIBRARY(m) { m.impl("dispatch_layout", MOE_CUDA_BOX(dispatch_layout_cuda)); }

#endif  // MOE_OPS_WITH_CUDA

}  // namespace moe_ops::adapter
