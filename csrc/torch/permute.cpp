#include "moe_ops/permute.h"

#include "moe_ops/unpermute.h"
#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

namespace {

Tensor permute(const Tensor& x, const Tensor& expert_offsets, const Tensor& row_to_slot) {
  constexpr const char* kOp = "permute";
  const DType type = check_float(kOp, "x", x);
  check_dim(kOp, "x", x, 2, "[T, H]");
  check_index(kOp, "row_to_slot", row_to_slot);
  check_dim(kOp, "row_to_slot", row_to_slot, 1, "[N]");
  const int64_t T = x.size(0), H = x.size(1), N = row_to_slot.numel();
  MOE_CHECK(T == 0 ? N == 0 : N % T == 0, kOp,
            ": row_to_slot must hold a whole number of slots for each of the ", T,
            " tokens of x, got ", N, ".");
  const std::vector<int64_t> offsets = checked_offsets(kOp, expert_offsets, N);
  std::vector<int32_t> row_to_token = checked_map(kOp, "row_to_slot", row_to_slot, N);
  const int32_t top_k = T == 0 ? 1 : static_cast<int32_t>(N / T);
  for (int32_t& t : row_to_token) t /= top_k;

  const Tensor src = with_dense_rows(x);
  Tensor rows = empty_cpu({N, H}, x.scalar_type());
  PermuteParams p;
  p.x = src.const_data_ptr();
  p.type = type;
  p.x_stride = row_stride(src);
  p.hidden_size = H;
  p.num_rows = N;
  p.num_valid_rows = offsets.back();
  p.row_to_token = row_to_token.data();
  p.rows = rows.mutable_data_ptr();
  cpu::permute(p, torch_parallel());
  return rows;
}

Tensor permute_bwd(const Tensor& grad_rows, const Tensor& expert_offsets, const Tensor& row_to_slot,
                   int64_t num_tokens) {
  constexpr const char* kOp = "permute_bwd";
  const DType type = check_float(kOp, "grad_rows", grad_rows);
  check_dim(kOp, "grad_rows", grad_rows, 2, "[N, H]");
  check_index(kOp, "row_to_slot", row_to_slot);
  check_dim(kOp, "row_to_slot", row_to_slot, 1, "[N]");
  const int64_t N = grad_rows.size(0), H = grad_rows.size(1), T = num_tokens;
  check_size(kOp, "row_to_slot", row_to_slot, 0, N, "N");
  MOE_CHECK(T >= 0 && (T == 0 ? N == 0 : N % T == 0), kOp,
            ": num_tokens must divide the number of rows ", N, ", got ", T, ".");
  const std::vector<int64_t> offsets = checked_offsets(kOp, expert_offsets, N);
  const std::vector<int32_t> slots = checked_map(kOp, "row_to_slot", row_to_slot, N);
  // A slot that the map leaves out points past the valid rows, and so adds nothing.
  std::vector<int32_t> slot_to_row(static_cast<size_t>(N), static_cast<int32_t>(N));
  for (int64_t r = 0; r < N; ++r) slot_to_row[slots[r]] = static_cast<int32_t>(r);

  const Tensor src = with_dense_rows(grad_rows);
  Tensor grad_x = empty_cpu({T, H}, grad_rows.scalar_type());
  UnpermuteParams p;
  p.rows = src.const_data_ptr();
  p.type = p.y_type = type;
  p.row_stride = row_stride(src);
  p.hidden_size = H;
  p.num_tokens = T;
  p.top_k = T == 0 ? 1 : N / T;
  p.num_valid_rows = offsets.back();
  p.slot_to_row = slot_to_row.data();
  p.topk_weights = nullptr;
  p.y = grad_x.mutable_data_ptr();
  cpu::unpermute(p, torch_parallel());
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) {
  m.impl("permute", MOE_BOX(permute));
  m.impl("permute_bwd", MOE_BOX(permute_bwd));
}

}  // namespace moe_ops::adapter
