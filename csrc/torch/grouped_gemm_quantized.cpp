#include "moe_ops/grouped_gemm.h"
#include "torch/quantized.h"

namespace moe_ops::adapter {

namespace {

Tensor grouped_gemm_quantized(const Tensor& a, const Tensor& b, const Tensor& b_scale,
                              const Tensor& expert_offsets, const OptTensor& bias) {
  constexpr const char* kOp = "grouped_gemm_quantized";
  const DType type = check_float(kOp, "a", a);
  MOE_CHECK(type != DType::kFloat64, kOp, ": a must be float32, bfloat16 or float16, got float64.");
  check_dim(kOp, "a", a, 2, "[N, K]");
  const Quantized weights = quantized_of(kOp, "b", "b_scale", b, b_scale);
  MOE_CHECK(weights.depth == a.size(1), kOp, ": b must have rows of K = ", a.size(1),
            " weights, got ", weights.depth, " (shape ", shape_string(b), ").");
  if (bias.has_value()) {
    check_same_dtype(kOp, "bias", *bias, "a", a);
    check_dim(kOp, "bias", *bias, 2, "[E, O]");
    check_size(kOp, "bias", *bias, 0, weights.experts, "E");
    check_size(kOp, "bias", *bias, 1, weights.features, "O");
  }
  const Tensor offsets = checked_offsets(kOp, expert_offsets, a.size(0));
  check_size(kOp, "expert_offsets", expert_offsets, 0, weights.experts + 1, "E+1");
  const Tensor src = with_dense_rows(a);
  const Bias bias_rows = bias_of(bias, type);
  Tensor out = empty_cpu(kOp, {a.size(0), weights.features}, a.scalar_type());
  GroupedGemmParams p;
  p.expert_offsets = int32_data(offsets);
  p.num_experts = weights.experts;
  p.out_features = weights.features;
  p.in_features = weights.depth;
  p.a = rows_of(src, type);
  p.b = matrices_of(weights.matrices, type);
  p.bias = bias_rows.vectors;
  p.out = {out.mutable_data_ptr(), type, weights.features, nullptr};
  cpu::grouped_gemm(p, torch_parallel());
  zero_rows_from(out, num_valid_rows(offsets));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) {
  m.impl("grouped_gemm_quantized", MOE_BOX(grouped_gemm_quantized));
}

}  // namespace moe_ops::adapter
