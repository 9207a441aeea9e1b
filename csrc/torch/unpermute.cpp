#include "moe_ops/unpermute.h"

#include "torch/device.h"
#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

namespace {

// Checks shared by both directions.
DType check_unpermute(const Op& op, const Tensor& rows, const Tensor& slot_to_row,
                      const OptTensor& topk_weights) {
  const DType type = check_float(op, "rows", rows);
  check_dim(op, "rows", rows, 2, "[N, H]");
  check_index(op, "slot_to_row", slot_to_row);
  check_dim(op, "slot_to_row", slot_to_row, 2, "[T, K]");
  check_num_slots(op, "slot_to_row", slot_to_row.numel());
  MOE_CHECK(rows.size(0) <= std::numeric_limits<int32_t>::max(), op,
            ": rows must be fewer than 2^31, got ", rows.size(0), ".");
  if (topk_weights.has_value()) {
    check_float(op, "topk_weights", *topk_weights);
    check_dim(op, "topk_weights", *topk_weights, 2, "[T, K]");
    check_size(op, "topk_weights", *topk_weights, 0, slot_to_row.size(0), "T");
    check_size(op, "topk_weights", *topk_weights, 1, slot_to_row.size(1), "K");
  }
  return type;
}

void check_grad_y(const Op& op, const Tensor& grad_y, const Tensor& rows,
                  const Tensor& slot_to_row) {
  check_same_dtype(op, "grad_y", grad_y, "rows", rows);
  check_dim(op, "grad_y", grad_y, 2, "[T, H]");
  check_size(op, "grad_y", grad_y, 0, slot_to_row.size(0), "T");
  check_size(op, "grad_y", grad_y, 1, rows.size(1), "H");
}

Tensor unpermute(const Tensor& rows, const Tensor& expert_offsets, const Tensor& slot_to_row,
                 const OptTensor& topk_weights) {
  constexpr const char* kOp = "unpermute";
  const DType type = check_unpermute(kOp, rows, slot_to_row, topk_weights);
  const int64_t valid = num_valid_rows(checked_offsets(kOp, expert_offsets, rows.size(0)));
  const Tensor map = checked_map(kOp, "slot_to_row", slot_to_row, rows.size(0), -1);
  const ScalarType acc = accumulate_type(rows.scalar_type());
  const Tensor src = with_dense_rows(rows);
  const OptTensor weights = contiguous_as(topk_weights, acc);
  Tensor y = empty_cpu(kOp, {slot_to_row.size(0), rows.size(1)}, rows.scalar_type());
  UnpermuteParams p;
  p.rows = src.const_data_ptr();
  p.type = p.y_type = type;
  p.row_stride = row_stride(src);
  p.hidden_size = rows.size(1);
  p.num_tokens = slot_to_row.size(0);
  p.top_k = slot_to_row.size(1);
  p.num_valid_rows = valid;
  p.slot_to_row = int32_data(map);
  p.topk_weights = weights ? weights->const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  cpu::unpermute(p, torch_parallel());
  return y;
}

std::tuple<Tensor, Tensor> unpermute_bwd(const Tensor& grad_y, const Tensor& rows,
                                         const Tensor& expert_offsets, const Tensor& slot_to_row,
                                         const OptTensor& topk_weights) {
  constexpr const char* kOp = "unpermute_bwd";
  const DType type = check_unpermute(kOp, rows, slot_to_row, topk_weights);
  const int64_t valid = num_valid_rows(checked_offsets(kOp, expert_offsets, rows.size(0)));
  check_grad_y(kOp, grad_y, rows, slot_to_row);
  const Tensor map = checked_map(kOp, "slot_to_row", slot_to_row, rows.size(0), -1);
  const ScalarType acc = accumulate_type(rows.scalar_type());
  const Tensor gy = with_dense_rows(grad_y);
  const Tensor src = with_dense_rows(rows);
  const OptTensor weights = contiguous_as(topk_weights, acc);
  Tensor grad_rows = empty_cpu(kOp, {rows.size(0), rows.size(1)}, rows.scalar_type());
  Tensor grad_weights = topk_weights
                            ? empty_cpu(kOp, {slot_to_row.size(0), slot_to_row.size(1)}, acc)
                            : empty_cpu(kOp, {0}, acc);
  UnpermuteBwdParams p;
  p.grad_y = gy.const_data_ptr();
  p.rows = src.const_data_ptr();
  p.type = type;
  p.grad_y_stride = row_stride(gy);
  p.row_stride = row_stride(src);
  p.hidden_size = rows.size(1);
  p.num_tokens = slot_to_row.size(0);
  p.top_k = slot_to_row.size(1);
  p.num_rows = rows.size(0);
  p.num_valid_rows = valid;
  p.slot_to_row = int32_data(map);
  p.topk_weights = weights ? weights->const_data_ptr() : nullptr;
  p.grad_rows = grad_rows.mutable_data_ptr();
  p.grad_weights = topk_weights ? grad_weights.mutable_data_ptr() : nullptr;
  cpu::unpermute_bwd(p, torch_parallel());
  return {grad_rows, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) {
  m.impl("unpermute", MOE_BOX(unpermute));
  m.impl("unpermute_bwd", MOE_BOX(unpermute_bwd));
}

#ifdef MOE_OPS_WITH_CUDA

static Tensor unpermute_cuda(const Tensor& rows, const Tensor& expert_offsets,
                             const Tensor& slot_to_row, const OptTensor& topk_weights) {
  const Op op("unpermute", rows);
  cuda::UnpermuteParams p;
  p.type = p.y_type = check_unpermute(op, rows, slot_to_row, topk_weights);
  const Tensor offsets = device_offsets(op, expert_offsets, rows.size(0));
  const DeviceIndex map = device_index(op, "slot_to_row", slot_to_row);
  const Tensor src = with_dense_rows(rows);
  const OptTensor weights = contiguous_as(topk_weights, accumulate_type(rows.scalar_type()));
  Tensor y = device_empty(rows, {slot_to_row.size(0), rows.size(1)}, rows.scalar_type());
  p.rows = src.const_data_ptr();
  p.row_stride = row_stride(src);
  p.hidden_size = rows.size(1);
  p.num_tokens = slot_to_row.size(0);
  p.top_k = slot_to_row.size(1);
  p.num_rows = rows.size(0);
  p.expert_offsets = int32_data(offsets);
  p.num_experts = offsets.numel() - 1;
  p.slot_to_row = {map.data, map.is_64};
  p.topk_weights = weights ? weights->const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  check_status(op, cuda::unpermute(p, current_stream(rows)));
  return y;
}

static std::tuple<Tensor, Tensor> unpermute_bwd_cuda(const Tensor& grad_y, const Tensor& rows,
                                                     const Tensor& expert_offsets,
                                                     const Tensor& slot_to_row,
                                                     const OptTensor& topk_weights) {
  const Op op("unpermute_bwd", rows);
  cuda::UnpermuteBwdParams p;
  p.type = check_unpermute(op, rows, slot_to_row, topk_weights);
  check_grad_y(op, grad_y, rows, slot_to_row);
  const Tensor offsets = device_offsets(op, expert_offsets, rows.size(0));
  const DeviceIndex map = device_index(op, "slot_to_row", slot_to_row);
  const ScalarType acc = accumulate_type(rows.scalar_type());
  const Tensor gy = with_dense_rows(grad_y);
  const Tensor src = with_dense_rows(rows);
  const OptTensor weights = contiguous_as(topk_weights, acc);
  Tensor named = device_empty(rows, {2, rows.size(0)}, ScalarType::Int);
  Tensor grad_rows = device_empty(rows, {rows.size(0), rows.size(1)}, rows.scalar_type());
  Tensor grad_weights = topk_weights
                            ? device_empty(rows, {slot_to_row.size(0), slot_to_row.size(1)}, acc)
                            : device_empty(rows, {0}, acc);
  p.grad_y = gy.const_data_ptr();
  p.rows = src.const_data_ptr();
  p.grad_y_stride = row_stride(gy);
  p.row_stride = row_stride(src);
  p.hidden_size = rows.size(1);
  p.num_tokens = slot_to_row.size(0);
  p.top_k = slot_to_row.size(1);
  p.num_rows = rows.size(0);
  p.expert_offsets = int32_data(offsets);
  p.num_experts = offsets.numel() - 1;
  p.slot_to_row = {map.data, map.is_64};
  p.topk_weights = weights ? weights->const_data_ptr() : nullptr;
  p.named = static_cast<int32_t*>(named.mutable_data_ptr());
  p.grad_rows = grad_rows.mutable_data_ptr();
  p.grad_weights = topk_weights ? grad_weights.mutable_data_ptr() : nullptr;
  check_status(op, cuda::unpermute_bwd(p, current_stream(rows)));
  return {grad_rows, grad_weights};
}

MOE_CUDA_LIBRARY(m) {
  m.impl("unpermute", MOE_CUDA_BOX(unpermute_cuda));
  m.impl("unpermute_bwd", MOE_CUDA_BOX(unpermute_bwd_cuda));
}

#endif  // MOE_OPS_WITH_CUDA

}  // namespace moe_ops::adapter
