#include "moe_ops/permute.h"

#include "torch/device.h"
#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

namespace {

DType check_permute(const Op& op, const Tensor& x, const Tensor& row_to_slot) {
  const DType type = check_float(op, "x", x);
  check_dim(op, "x", x, 2, "[T, H]");
  check_index(op, "row_to_slot", row_to_slot);
  check_dim(op, "row_to_slot", row_to_slot, 1, "[N]");
  const int64_t T = x.size(0), N = row_to_slot.numel();
  check_num_slots(op, "row_to_slot", N);
  MOE_CHECK(T == 0 ? N == 0 : N % T == 0, op,
            ": row_to_slot must hold a whole number of slots for each of the ", T,
            " tokens of x, got ", N, ".");
  return type;
}

DType check_permute_bwd(const Op& op, const Tensor& grad_rows, const Tensor& row_to_slot,
                        int64_t num_tokens) {
  const DType type = check_float(op, "grad_rows", grad_rows);
  check_dim(op, "grad_rows", grad_rows, 2, "[N, H]");
  check_index(op, "row_to_slot", row_to_slot);
  check_dim(op, "row_to_slot", row_to_slot, 1, "[N]");
  const int64_t N = grad_rows.size(0), T = num_tokens;
  check_size(op, "row_to_slot", row_to_slot, 0, N, "N");
  check_num_slots(op, "row_to_slot", N);
  MOE_CHECK(T >= 0 && (T == 0 ? N == 0 : N % T == 0), op,
            ": num_tokens must divide the number of rows ", N, ", got ", T, ".");
  return type;
}

Tensor permute(const Tensor& x, const Tensor& expert_offsets, const Tensor& row_to_slot) {
  constexpr const char* kOp = "permute";
  const DType type = check_permute(kOp, x, row_to_slot);
  const int64_t T = x.size(0), H = x.size(1), N = row_to_slot.numel();
  const Tensor offsets = checked_offsets(kOp, expert_offsets, N);
  const Tensor map = checked_map(kOp, "row_to_slot", row_to_slot, N);

  const Tensor src = with_dense_rows(x);
  Tensor rows = empty_cpu(kOp, {N, H}, x.scalar_type());
  PermuteParams p;
  p.x = src.const_data_ptr();
  p.type = type;
  p.x_stride = row_stride(src);
  p.hidden_size = H;
  p.num_rows = N;
  p.num_valid_rows = num_valid_rows(offsets);
  p.row_to_slot = int32_data(map);
  p.top_k = T == 0 ? 1 : N / T;
  p.rows = rows.mutable_data_ptr();
  cpu::permute(p, torch_parallel());
  return rows;
}

Tensor permute_bwd(const Tensor& grad_rows, const Tensor& expert_offsets, const Tensor& row_to_slot,
                   int64_t num_tokens) {
  constexpr const char* kOp = "permute_bwd";
  const DType type = check_permute_bwd(kOp, grad_rows, row_to_slot, num_tokens);
  const int64_t N = grad_rows.size(0), H = grad_rows.size(1), T = num_tokens;
  const Tensor offsets = checked_offsets(kOp, expert_offsets, N);
  const Tensor map = checked_map(kOp, "row_to_slot", row_to_slot, N);
  const Tensor src = with_dense_rows(grad_rows);
  Tensor grad_x = empty_cpu(kOp, {T, H}, grad_rows.scalar_type());
  PermuteBwdParams p;
  p.grad_rows = src.const_data_ptr();
  p.type = type;
  p.grad_stride = row_stride(src);
  p.hidden_size = H;
  p.num_tokens = T;
  p.num_rows = N;
  p.num_valid_rows = num_valid_rows(offsets);
  p.row_to_slot = int32_data(map);
  p.grad_x = grad_x.mutable_data_ptr();
  cpu::permute_bwd(p, torch_parallel());
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) {
  m.impl("permute", MOE_BOX(permute));
  m.impl("permute_bwd", MOE_BOX(permute_bwd));
}

#ifdef MOE_OPS_WITH_CUDA

static Tensor permute_cuda(const Tensor& x, const Tensor& expert_offsets,
                           const Tensor& row_to_slot) {
  const Op op("permute", x);
  cuda::PermuteParams p;
  p.type = check_permute(op, x, row_to_slot);
  const Tensor offsets = device_offsets(op, expert_offsets, row_to_slot.numel());
  const DeviceIndex map = device_index(op, "row_to_slot", row_to_slot);
  const Tensor src = with_dense_rows(x);
  Tensor rows = device_empty(x, {row_to_slot.numel(), x.size(1)}, x.scalar_type());
  p.x = src.const_data_ptr();
  p.x_stride = row_stride(src);
  p.hidden_size = x.size(1);
  p.num_tokens = x.size(0);
  p.num_rows = row_to_slot.numel();
  p.expert_offsets = int32_data(offsets);
  p.num_experts = offsets.numel() - 1;
  p.row_to_slot = {map.data, map.is_64};
  p.rows = rows.mutable_data_ptr();
  check_status(op, cuda::permute(p, current_stream(x)));
  return rows;
}

static Tensor permute_bwd_cuda(const Tensor& grad_rows, const Tensor& expert_offsets,
                               const Tensor& row_to_slot, int64_t num_tokens) {
  const Op op("permute_bwd", grad_rows);
  cuda::PermuteBwdParams p;
  p.type = check_permute_bwd(op, grad_rows, row_to_slot, num_tokens);
  const int64_t N = grad_rows.size(0), H = grad_rows.size(1);
  const Tensor offsets = device_offsets(op, expert_offsets, N);
  const DeviceIndex map = device_index(op, "row_to_slot", row_to_slot);
  const Tensor src = with_dense_rows(grad_rows);
  Tensor named = device_empty(grad_rows, {2, N}, ScalarType::Int);
  Tensor grad_x = device_empty(grad_rows, {num_tokens, H}, grad_rows.scalar_type());
  p.grad_rows = src.const_data_ptr();
  p.grad_stride = row_stride(src);
  p.hidden_size = H;
  p.num_tokens = num_tokens;
  p.num_rows = N;
  p.expert_offsets = int32_data(offsets);
  p.num_experts = offsets.numel() - 1;
  p.row_to_slot = {map.data, map.is_64};
  p.named = static_cast<int32_t*>(named.mutable_data_ptr());
  p.grad_x = grad_x.mutable_data_ptr();
  check_status(op, cuda::permute_bwd(p, current_stream(grad_rows)));
  return grad_x;
}

MOE_CUDA_LIBRARY(m) {
  m.impl("permute", MOE_CUDA_BOX(permute_cuda));
  m.impl("permute_bwd", MOE_CUDA_BOX(permute_bwd_cuda));
}

#endif  // MOE_OPS_WITH_CUDA

}  // namespace moe_ops::adapter
