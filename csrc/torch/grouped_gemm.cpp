#include "moe_ops/grouped_gemm.h"

#include "torch/device.h"
#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

namespace {

DType check_gemm(const Op& op, const Tensor& a, const Tensor& b, const OptTensor& bias) {
  const DType type = check_float(op, "a", a);
  check_dim(op, "a", a, 2, "[N, K]");
  check_same_dtype(op, "b", b, "a", a);
  check_dim(op, "b", b, 3, "[E, O, K]");
  check_size(op, "b", b, 2, a.size(1), "K");
  if (bias.has_value()) {
    check_same_dtype(op, "bias", *bias, "a", a);
    check_dim(op, "bias", *bias, 2, "[E, O]");
    check_size(op, "bias", *bias, 0, b.size(0), "E");
    check_size(op, "bias", *bias, 1, b.size(1), "O");
  }
  return type;
}

DType check_wgrad(const Op& op, const Tensor& grad, const Tensor& a) {
  const DType type = check_float(op, "grad", grad);
  check_dim(op, "grad", grad, 2, "[N, O]");
  check_same_dtype(op, "a", a, "grad", grad);
  check_dim(op, "a", a, 2, "[N, K]");
  check_size(op, "a", a, 0, grad.size(0), "N");
  return type;
}

DType check_sum(const Op& op, const Tensor& rows) {
  const DType type = check_float(op, "rows", rows);
  check_dim(op, "rows", rows, 2, "[N, O]");
  return type;
}

Tensor grouped_gemm(const Tensor& a, const Tensor& b, const Tensor& expert_offsets,
                    const OptTensor& bias) {
  const Op op("grouped_gemm");
  const DType type = check_gemm(op, a, b, bias);
  const Tensor offsets = checked_offsets(op, expert_offsets, a.size(0));
  check_size(op, "expert_offsets", expert_offsets, 0, b.size(0) + 1, "E+1");
  const Tensor src = with_dense_rows(a);
  const Weights weights = weights_of(b, type);
  const Bias bias_rows = bias_of(bias, type);
  Tensor out = empty_cpu(op, {a.size(0), b.size(1)}, a.scalar_type());
  GroupedGemmParams p;
  p.expert_offsets = int32_data(offsets);
  p.num_experts = b.size(0);
  p.out_features = b.size(1);
  p.in_features = b.size(2);
  p.a = rows_of(src, type);
  p.b = weights.matrices;
  p.bias = bias_rows.vectors;
  p.out = {out.mutable_data_ptr(), type, b.size(1), nullptr};
  cpu::grouped_gemm(p, torch_parallel());
  zero_rows_from(out, num_valid_rows(offsets));
  return out;
}

Tensor grouped_gemm_wgrad(const Tensor& grad, const Tensor& a, const Tensor& expert_offsets) {
  const Op op("grouped_gemm_wgrad");
  const DType type = check_wgrad(op, grad, a);
  const Tensor offsets = checked_offsets(op, expert_offsets, grad.size(0));
  const int64_t E = offsets.numel() - 1;
  const Tensor grad_rows = with_dense_rows(grad);
  const Tensor a_rows = with_dense_rows(a);
  Tensor out = empty_cpu(op, {E, grad.size(1), a.size(1)}, grad.scalar_type());
  GroupedWgradParams p;
  p.expert_offsets = int32_data(offsets);
  p.num_experts = E;
  p.out_features = grad.size(1);
  p.in_features = a.size(1);
  p.grad = rows_of(grad_rows, type);
  p.a = rows_of(a_rows, type);
  p.out = out.mutable_data_ptr();
  p.out_type = type;
  cpu::grouped_gemm_wgrad(p, torch_parallel());
  return out;
}

Tensor grouped_sum(const Tensor& rows, const Tensor& expert_offsets) {
  const Op op("grouped_sum");
  const DType type = check_sum(op, rows);
  const Tensor offsets = checked_offsets(op, expert_offsets, rows.size(0));
  const int64_t E = offsets.numel() - 1;
  const Tensor src = with_dense_rows(rows);
  Tensor out = empty_cpu(op, {E, rows.size(1)}, rows.scalar_type());
  GroupedSumParams p;
  p.expert_offsets = int32_data(offsets);
  p.num_experts = E;
  p.features = rows.size(1);
  p.rows = rows_of(src, type);
  p.out = out.mutable_data_ptr();
  p.out_type = type;
  cpu::grouped_sum(p, torch_parallel());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) {
  m.impl("grouped_gemm", MOE_BOX(grouped_gemm));
  m.impl("grouped_gemm_wgrad", MOE_BOX(grouped_gemm_wgrad));
  m.impl("grouped_sum", MOE_BOX(grouped_sum));
}

#ifdef MOE_OPS_WITH_CUDA

namespace {

Tensor grouped_gemm_cuda(const Tensor& a, const Tensor& b, const Tensor& expert_offsets,
                         const OptTensor& bias) {
  const Op op("grouped_gemm", a);
  const DType type = check_gemm(op, a, b, bias);
  const Tensor offsets = device_offsets(op, expert_offsets, a.size(0));
  check_size(op, "expert_offsets", expert_offsets, 0, b.size(0) + 1, "E+1");
  const Tensor src = token_rows(a);
  const Weights weights = weights_of(b, type);
  const Bias bias_rows = bias_of(bias, type);
  Tensor out = device_empty(a, {a.size(0), b.size(1)}, a.scalar_type());
  cuda::GroupedGemmParams p;
  p.expert_offsets = int32_data(offsets);
  p.num_experts = b.size(0);
  p.num_rows = a.size(0);
  p.out_features = b.size(1);
  p.in_features = b.size(2);
  p.a = device_rows(src, type);
  p.b = weights.matrices;
  p.bias = bias_rows.vectors;
  p.out = mutable_device_rows(out, type);
  check_status(op, cuda::grouped_gemm(p, current_stream(a)));
  return out;
}

Tensor grouped_gemm_wgrad_cuda(const Tensor& grad, const Tensor& a, const Tensor& expert_offsets) {
  const Op op("grouped_gemm_wgrad", grad);
  const DType type = check_wgrad(op, grad, a);
  const Tensor offsets = device_offsets(op, expert_offsets, grad.size(0));
  const Tensor grad_rows = with_dense_rows(grad);
  const Tensor a_rows = with_dense_rows(a);
  cuda::GroupedWgradParams p;
  p.expert_offsets = int32_data(offsets);
  p.num_experts = offsets.size(0) - 1;
  p.num_rows = grad.size(0);
  p.out_features = grad.size(1);
  p.in_features = a.size(1);
  Tensor out =
      device_empty(grad, {p.num_experts, p.out_features, p.in_features}, grad.scalar_type());
  p.grad = device_rows(grad_rows, type);
  p.a = device_rows(a_rows, type);
  p.out = out.mutable_data_ptr();
  p.out_type = type;
  check_status(op, cuda::grouped_gemm_wgrad(p, current_stream(grad)));
  return out;
}

Tensor grouped_sum_cuda(const Tensor& rows, const Tensor& expert_offsets) {
  const Op op("grouped_sum", rows);
  const DType type = check_sum(op, rows);
  const Tensor offsets = device_offsets(op, expert_offsets, rows.size(0));
  const Tensor src = with_dense_rows(rows);
  cuda::GroupedSumParams p;
  p.expert_offsets = int32_data(offsets);
  p.num_experts = offsets.size(0) - 1;
  p.num_rows = rows.size(0);
  p.features = rows.size(1);
  Tensor out = device_empty(rows, {p.num_experts, p.features}, rows.scalar_type());
  p.rows = device_rows(src, type);
  p.out = out.mutable_data_ptr();
  p.out_type = type;
  check_status(op, cuda::grouped_sum(p, current_stream(rows)));
  return out;
}

}  // namespace

MOE_CUDA_LIBRARY(m) {
  m.impl("grouped_gemm", MOE_CUDA_BOX(grouped_gemm_cuda));
  m.impl("grouped_gemm_wgrad", MOE_CUDA_BOX(grouped_gemm_wgrad_cuda));
  m.impl("grouped_sum", MOE_CUDA_BOX(grouped_sum_cuda));
}

#endif  // MOE_OPS_WITH_CUDA

}  // namespace moe_ops::adapter
