#include "moe_ops/permute.h"

#include "torch/device.h"
#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

namespace {

// Returns K if it is given or if there is a row for each of T * K slots.
int64_t check_top_k(const Op& op, int64_t num_tokens, int64_t num_rows, const OptInt& top_k) {
  if (!top_k.has_value()) {
    MOE_CHECK(num_tokens == 0 ? num_rows == 0 : num_rows % num_tokens == 0, op,
              ": row_to_slot must hold a whole number of slots for each of the ", num_tokens,
              " tokens unless top_k is given, got ", num_rows, ".");
    return num_tokens == 0 ? 1 : num_rows / num_tokens;
  }
  MOE_CHECK(*top_k >= 1, op, ": top_k must be at least 1, got ", *top_k, ".");
  MOE_CHECK(num_tokens <= std::numeric_limits<int32_t>::max() / *top_k, op,
            ": top_k must leave fewer than 2^31 slots to ", num_tokens, " tokens, got ", *top_k,
            ".");
  return *top_k;
}

// Returns K.
int64_t check_permute(const Op& op, const Tensor& x, const Tensor& row_to_slot,
                      const OptInt& top_k) {
  check_float(op, "x", x);
  check_dim(op, "x", x, 2, "[T, H]");
  check_index(op, "row_to_slot", row_to_slot);
  check_dim(op, "row_to_slot", row_to_slot, 1, "[N]");
  check_num_slots(op, "row_to_slot", row_to_slot.numel());
  return check_top_k(op, x.size(0), row_to_slot.numel(), top_k);
}

int64_t check_permute_bwd(const Op& op, const Tensor& grad_rows, const Tensor& row_to_slot,
                          int64_t num_tokens, const OptInt& top_k) {
  check_float(op, "grad_rows", grad_rows);
  check_dim(op, "grad_rows", grad_rows, 2, "[N, H]");
  check_index(op, "row_to_slot", row_to_slot);
  check_dim(op, "row_to_slot", row_to_slot, 1, "[N]");
  check_size(op, "row_to_slot", row_to_slot, 0, grad_rows.size(0), "N");
  check_num_slots(op, "row_to_slot", row_to_slot.numel());
  MOE_CHECK(num_tokens >= 0, op, ": num_tokens must not be negative, got ", num_tokens, ".");
  return check_top_k(op, num_tokens, row_to_slot.numel(), top_k);
}

Tensor permute(const Tensor& x, const Tensor& expert_offsets, const Tensor& row_to_slot,
               OptInt top_k) {
  constexpr const char* kOp = "permute";
  const int64_t K = check_permute(kOp, x, row_to_slot, top_k);
  const int64_t T = x.size(0), H = x.size(1), N = row_to_slot.numel();
  const Tensor offsets = checked_offsets(kOp, expert_offsets, N);
  const Tensor map = checked_map(kOp, "row_to_slot", row_to_slot, T * K, -1);

  const Tensor src = with_dense_rows(x);
  Tensor rows = empty_cpu(kOp, {N, H}, x.scalar_type());
  PermuteParams p;
  p.x = src.const_data_ptr();
  p.type = check_float(kOp, "x", x);
  p.x_stride = row_stride(src);
  p.hidden_size = H;
  p.num_rows = N;
  p.num_valid_rows = num_valid_rows(offsets);
  p.row_to_slot = int32_data(map);
  p.top_k = K;
  p.rows = rows.mutable_data_ptr();
  cpu::permute(p, torch_parallel());
  return rows;
}

Tensor permute_bwd(const Tensor& grad_rows, const Tensor& expert_offsets, const Tensor& row_to_slot,
                   int64_t num_tokens, OptInt top_k) {
  constexpr const char* kOp = "permute_bwd";
  const int64_t K = check_permute_bwd(kOp, grad_rows, row_to_slot, num_tokens, top_k);
  const int64_t N = grad_rows.size(0), H = grad_rows.size(1), T = num_tokens;
  const Tensor offsets = checked_offsets(kOp, expert_offsets, N);
  const Tensor map = checked_map(kOp, "row_to_slot", row_to_slot, T * K, -1);
  const Tensor src = with_dense_rows(grad_rows);
  Tensor grad_x = empty_cpu(kOp, {T, H}, grad_rows.scalar_type());
  PermuteBwdParams p;
  p.grad_rows = src.const_data_ptr();
  p.type = check_float(kOp, "grad_rows", grad_rows);
  p.grad_stride = row_stride(src);
  p.hidden_size = H;
  p.num_tokens = T;
  p.top_k = K;
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

static Tensor permute_cuda(const Tensor& x, const Tensor& expert_offsets, const Tensor& row_to_slot,
                           OptInt top_k) {
  const Op op("permute", x);
  cuda::PermuteParams p;
  p.top_k = check_permute(op, x, row_to_slot, top_k);
  p.type = check_float(op, "x", x);
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
                               const Tensor& row_to_slot, int64_t num_tokens, OptInt top_k) {
  const Op op("permute_bwd", grad_rows);
  cuda::PermuteBwdParams p;
  p.top_k = check_permute_bwd(op, grad_rows, row_to_slot, num_tokens, top_k);
  p.type = check_float(op, "grad_rows", grad_rows);
  const int64_t N = grad_rows.size(0), H = grad_rows.size(1);
  const Tensor offsets = device_offsets(op, expert_offsets, N);
  const DeviceIndex map = device_index(op, "row_to_slot", row_to_slot);
  const Tensor src = with_dense_rows(grad_rows);
  Tensor named = device_empty(grad_rows, {2, num_tokens * p.top_k}, ScalarType::Int);
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
