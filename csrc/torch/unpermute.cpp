#include "moe_ops/unpermute.h"

#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

namespace {

// Checks shared by both directions; returns the valid rows.
int64_t check_unpermute(const Op& op, const Tensor& rows, const Tensor& expert_offsets,
                        const Tensor& slot_to_row, const OptTensor& topk_weights) {
  check_float(op, "rows", rows);
  check_dim(op, "rows", rows, 2, "[N, H]");
  check_index(op, "slot_to_row", slot_to_row);
  check_dim(op, "slot_to_row", slot_to_row, 2, "[T, K]");
  MOE_CHECK(slot_to_row.numel() == rows.size(0), op,
            ": slot_to_row must be [T, K] with T*K = ", rows.size(0), " like the rows, got shape ",
            shape_string(slot_to_row), ".");
  if (topk_weights.has_value()) {
    check_float(op, "topk_weights", *topk_weights);
    check_dim(op, "topk_weights", *topk_weights, 2, "[T, K]");
    check_size(op, "topk_weights", *topk_weights, 0, slot_to_row.size(0), "T");
    check_size(op, "topk_weights", *topk_weights, 1, slot_to_row.size(1), "K");
  }
  return checked_offsets(op, expert_offsets, rows.size(0)).back();
}

Tensor unpermute(const Tensor& rows, const Tensor& expert_offsets, const Tensor& slot_to_row,
                 const OptTensor& topk_weights) {
  constexpr const char* kOp = "unpermute";
  const int64_t valid = check_unpermute(kOp, rows, expert_offsets, slot_to_row, topk_weights);
  const std::vector<int32_t> map = checked_map(kOp, "slot_to_row", slot_to_row, rows.size(0));
  const ScalarType acc = accumulate_type(rows.scalar_type());
  const Tensor src = with_dense_rows(rows);
  const OptTensor weights = contiguous_as(topk_weights, acc);
  Tensor y = empty_cpu({slot_to_row.size(0), rows.size(1)}, rows.scalar_type());
  UnpermuteParams p;
  p.rows = src.const_data_ptr();
  p.type = p.y_type = check_float(kOp, "rows", rows);
  p.row_stride = row_stride(src);
  p.hidden_size = rows.size(1);
  p.num_tokens = slot_to_row.size(0);
  p.top_k = slot_to_row.size(1);
  p.num_valid_rows = valid;
  p.slot_to_row = map.data();
  p.topk_weights = weights ? weights->const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  cpu::unpermute(p, torch_parallel());
  return y;
}

std::tuple<Tensor, Tensor> unpermute_bwd(const Tensor& grad_y, const Tensor& rows,
                                         const Tensor& expert_offsets, const Tensor& slot_to_row,
                                         const OptTensor& topk_weights) {
  constexpr const char* kOp = "unpermute_bwd";
  const int64_t valid = check_unpermute(kOp, rows, expert_offsets, slot_to_row, topk_weights);
  check_same_dtype(kOp, "grad_y", grad_y, "rows", rows);
  check_dim(kOp, "grad_y", grad_y, 2, "[T, H]");
  check_size(kOp, "grad_y", grad_y, 0, slot_to_row.size(0), "T");
  check_size(kOp, "grad_y", grad_y, 1, rows.size(1), "H");
  const std::vector<int32_t> map = checked_map(kOp, "slot_to_row", slot_to_row, rows.size(0));
  const ScalarType acc = accumulate_type(rows.scalar_type());
  const Tensor gy = with_dense_rows(grad_y);
  const Tensor src = with_dense_rows(rows);
  const OptTensor weights = contiguous_as(topk_weights, acc);
  Tensor grad_rows = empty_cpu({rows.size(0), rows.size(1)}, rows.scalar_type());
  Tensor grad_weights = topk_weights ? empty_cpu({slot_to_row.size(0), slot_to_row.size(1)}, acc)
                                     : empty_cpu({0}, acc);
  UnpermuteBwdParams p;
  p.grad_y = gy.const_data_ptr();
  p.rows = src.const_data_ptr();
  p.type = check_float(kOp, "rows", rows);
  p.grad_y_stride = row_stride(gy);
  p.row_stride = row_stride(src);
  p.hidden_size = rows.size(1);
  p.num_tokens = slot_to_row.size(0);
  p.top_k = slot_to_row.size(1);
  p.num_rows = rows.size(0);
  p.num_valid_rows = valid;
  p.slot_to_row = map.data();
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

}  // namespace moe_ops::adapter
