#include "moe_ops/grouped_gemm.h"

#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

namespace {

Tensor grouped_gemm(const Tensor& a, const Tensor& b, const Tensor& expert_offsets,
                    const OptTensor& bias) {
  constexpr const char* kOp = "grouped_gemm";
  const DType type = check_float(kOp, "a", a);
  check_dim(kOp, "a", a, 2, "[N, K]");
  check_same_dtype(kOp, "b", b, "a", a);
  check_dim(kOp, "b", b, 3, "[E, O, K]");
  check_size(kOp, "b", b, 2, a.size(1), "K");
  const std::vector<int64_t> offsets = checked_offsets(kOp, expert_offsets, a.size(0));
  check_size(kOp, "expert_offsets", expert_offsets, 0, b.size(0) + 1, "E+1");
  if (bias.has_value()) {
    check_same_dtype(kOp, "bias", *bias, "a", a);
    check_dim(kOp, "bias", *bias, 2, "[E, O]");
    check_size(kOp, "bias", *bias, 0, b.size(0), "E");
    check_size(kOp, "bias", *bias, 1, b.size(1), "O");
  }
  const Tensor src = with_dense_rows(a);
  const Weights weights = weights_of(b, type);
  const Bias bias_rows = bias_of(bias, type);
  Tensor out = empty_cpu({a.size(0), b.size(1)}, a.scalar_type());
  GroupedGemmParams p;
  p.expert_offsets = offsets.data();
  p.num_experts = b.size(0);
  p.out_features = b.size(1);
  p.in_features = b.size(2);
  p.a = rows_of(src, type);
  p.b = weights.matrices;
  p.bias = bias_rows.vectors;
  p.out = {out.mutable_data_ptr(), type, b.size(1), nullptr};
  cpu::grouped_gemm(p, torch_parallel());
  zero_rows_from(out, offsets.back());
  return out;
}

Tensor grouped_gemm_wgrad(const Tensor& grad, const Tensor& a, const Tensor& expert_offsets) {
  constexpr const char* kOp = "grouped_gemm_wgrad";
  const DType type = check_float(kOp, "grad", grad);
  check_dim(kOp, "grad", grad, 2, "[N, O]");
  check_same_dtype(kOp, "a", a, "grad", grad);
  check_dim(kOp, "a", a, 2, "[N, K]");
  check_size(kOp, "a", a, 0, grad.size(0), "N");
  const std::vector<int64_t> offsets = checked_offsets(kOp, expert_offsets, grad.size(0));
  const int64_t E = static_cast<int64_t>(offsets.size()) - 1;
  const Tensor grad_rows = with_dense_rows(grad);
  const Tensor a_rows = with_dense_rows(a);
  Tensor out = empty_cpu({E, grad.size(1), a.size(1)}, grad.scalar_type());
  GroupedWgradParams p;
  p.expert_offsets = offsets.data();
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
  constexpr const char* kOp = "grouped_sum";
  const DType type = check_float(kOp, "rows", rows);
  check_dim(kOp, "rows", rows, 2, "[N, O]");
  const std::vector<int64_t> offsets = checked_offsets(kOp, expert_offsets, rows.size(0));
  const int64_t E = static_cast<int64_t>(offsets.size()) - 1;
  const Tensor src = with_dense_rows(rows);
  Tensor out = empty_cpu({E, rows.size(1)}, rows.scalar_type());
  GroupedSumParams p;
  p.expert_offsets = offsets.data();
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

}  // namespace moe_ops::adapter
