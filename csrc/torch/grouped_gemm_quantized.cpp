#include "moe_ops/grouped_gemm_quantized.h"

#include <utility>

#include "torch/device.h"
#include "torch/quantized.h"

namespace moe_ops::adapter {

namespace {

// Arguments of a call.
struct Inputs {
  const Tensor& a;               // [N, K]; transpose: [N, O]
  const Tensor& b;               // [E, O, K], quantized
  const Tensor& b_scale;         // of its format
  const Tensor& expert_offsets;  // [E+1]
  const std::string& format;     // of b
  const OptTensor& bias;         // [E, O] or none; transpose: [E, K]
  const OptTensor& b_zero;       // zero points of b, or none
  bool exact = false;            // a is not rounded
  bool transpose = false;        // multiply with b transposed
};

// Checked weights and sizes of a call.
struct Call {
  DType type;
  Quantized weights;
  int64_t in, out_features;
};

Call check(const Op& op, const Inputs& given) {
  const auto& [a, b, b_scale, expert_offsets, format, bias, b_zero, exact, transpose] = given;
  const DType type = check_float(op, "a", a);
  MOE_CHECK(type != DType::kFloat64, op, ": a must be float32, bfloat16 or float16, got float64.");
  check_dim(op, "a", a, 2, "[N, K]");
  Quantized weights =
      quantized_of(op, "b", b, b_scale, b_zero, format_of(op, "format", format), format);
  const int64_t in = transpose ? weights.features : weights.depth;
  const int64_t out_features = transpose ? weights.depth : weights.features;
  MOE_CHECK(in == a.size(1), op, ": b must have ", transpose ? "" : "rows of ", "K = ", a.size(1),
            transpose ? " rows" : " weights", ", got ", in, " (shape ", shape_string(b), ").");
  if (bias.has_value()) {
    check_same_dtype(op, "bias", *bias, "a", a);
    check_dim(op, "bias", *bias, 2, "[E, O]");
    check_size(op, "bias", *bias, 0, weights.experts, "E");
    check_size(op, "bias", *bias, 1, out_features, "O");
  }
  return {type, std::move(weights), in, out_features};
}

Tensor run(const Op& op, const Inputs& given) {
  const auto& [a, b, b_scale, expert_offsets, format, bias, b_zero, exact, transpose] = given;
  const auto [type, weights, in, out_features] = check(op, given);
  const Tensor offsets = checked_offsets(op, expert_offsets, a.size(0));
  check_size(op, "expert_offsets", expert_offsets, 0, weights.experts + 1, "E+1");
  const Tensor src = with_dense_rows(a);
  const Bias bias_rows = bias_of(bias, type);
  Tensor out = empty_cpu(op, {a.size(0), out_features}, a.scalar_type());
  GroupedGemmParams p;
  p.expert_offsets = int32_data(offsets);
  p.num_experts = weights.experts;
  p.out_features = out_features;
  p.in_features = in;
  p.a = rows_of(src, type);
  p.b = matrices_of(weights.matrices, type);
  p.b.quant.exact = exact;
  if (transpose) p.b = transposed(p.b);
  p.bias = bias_rows.vectors;
  p.out = {out.mutable_data_ptr(), type, out_features, nullptr};
  cpu::grouped_gemm(p, torch_parallel());
  zero_rows_from(out, num_valid_rows(offsets));
  return out;
}

Tensor grouped_gemm_quantized(const Tensor& a, const Tensor& b, const Tensor& b_scale,
                              const Tensor& expert_offsets, std::string format,
                              const OptTensor& bias, const OptTensor& b_zero) {
  return run("grouped_gemm_quantized", {a, b, b_scale, expert_offsets, format, bias, b_zero});
}

Tensor grouped_gemm_quantized_exact(const Tensor& a, const Tensor& b, const Tensor& b_scale,
                                    const Tensor& expert_offsets, std::string format,
                                    const OptTensor& bias, const OptTensor& b_zero,
                                    bool transposed) {
  return run("grouped_gemm_quantized", {.a = a,
                                        .b = b,
                                        .b_scale = b_scale,
                                        .expert_offsets = expert_offsets,
                                        .format = format,
                                        .bias = bias,
                                        .b_zero = b_zero,
                                        .exact = true,
                                        .transpose = transposed});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) {
  m.impl("grouped_gemm_quantized", MOE_BOX(grouped_gemm_quantized));
  m.impl("grouped_gemm_quantized_exact", MOE_BOX(grouped_gemm_quantized_exact));
}

#ifdef MOE_OPS_WITH_CUDA

static Tensor grouped_gemm_quantized_cuda(const Tensor& a, const Tensor& b, const Tensor& b_scale,
                                          const Tensor& expert_offsets, std::string format,
                                          const OptTensor& bias, const OptTensor& b_zero) {
  const Op op("grouped_gemm_quantized", a);
  Call call = check(op, {a, b, b_scale, expert_offsets, format, bias, b_zero});
  align_records(call.weights);
  const Tensor offsets = device_offsets(op, expert_offsets, a.size(0));
  check_size(op, "expert_offsets", expert_offsets, 0, call.weights.experts + 1, "E+1");
  const Tensor src = with_dense_rows(a);
  const Bias bias_rows = bias_of(bias, call.type);
  Tensor out = device_empty(a, {a.size(0), call.out_features}, a.scalar_type());
  cuda::GroupedGemmQuantizedParams p;
  p.expert_offsets = int32_data(offsets);
  p.num_experts = call.weights.experts;
  p.num_rows = a.size(0);
  p.out_features = call.out_features;
  p.in_features = call.in;
  p.a = rows_of(src, call.type);
  p.b = call.weights.matrices;
  p.bias = bias_rows.vectors;
  p.out = out.mutable_data_ptr();
  Tensor workspace = device_empty(a, {cuda::grouped_gemm_quantized_workspace(p)}, ScalarType::Byte);
  p.workspace = workspace.mutable_data_ptr();
  check_status(op, cuda::grouped_gemm_quantized(p, current_stream(a)));
  return out;
}

MOE_CUDA_LIBRARY(m) { m.impl("grouped_gemm_quantized", MOE_CUDA_BOX(grouped_gemm_quantized_cuda)); }

#endif  // MOE_OPS_WITH_CUDA

}  // namespace moe_ops::adapter
