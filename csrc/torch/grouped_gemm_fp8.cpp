#include "moe_ops/grouped_gemm_fp8.h"

#include "torch/device.h"
#include "torch/fp8.h"
#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

namespace {

constexpr const char* kOp = "grouped_gemm_fp8";

// All but the offsets; the type of the result.
DType check(const Op& op, const Tensor& a, const Tensor& a_scale, const Tensor& b,
            const Tensor& b_scale, const OptTensor& bias, ScalarType out_dtype) {
  check_fp8(op, "a", a);
  check_dim(op, "a", a, 2, "[N, K]");
  check_fp8_scale(op, "a_scale", a_scale);
  check_dim(op, "a_scale", a_scale, 2, "[N, ceil(K / 128)]");
  check_size(op, "a_scale", a_scale, 0, a.size(0), "N");
  check_size(op, "a_scale", a_scale, 1, fp8_blocks(a.size(1)), "the blocks of 128 inputs");
  check_fp8_weights(op, "b", "b_scale", b, b_scale, "[E, O, K]");
  check_size(op, "b", b, 2, a.size(1), "K");
  if (bias.has_value()) {
    check_float_to_fp8(op, "bias", *bias);
    check_dim(op, "bias", *bias, 2, "[E, O]");
    check_size(op, "bias", *bias, 0, b.size(0), "E");
    check_size(op, "bias", *bias, 1, b.size(1), "O");
  }
  switch (out_dtype) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      fail(op, ": out_dtype must be float32, bfloat16 or float16, got ", dtype_name(out_dtype),
           ".");
  }
}

DType bias_type(const Op& op, const OptTensor& bias) {
  return bias.has_value() ? check_float(op, "bias", *bias) : DType::kFloat32;
}

Tensor grouped_gemm_fp8(const Tensor& a, const Tensor& a_scale, const Tensor& b,
                        const Tensor& b_scale, const Tensor& expert_offsets, ScalarType out_dtype,
                        const OptTensor& bias) {
  const DType out_type = check(kOp, a, a_scale, b, b_scale, bias, out_dtype);
  const Tensor offsets = checked_offsets(kOp, expert_offsets, a.size(0));
  check_size(kOp, "expert_offsets", expert_offsets, 0, b.size(0) + 1, "E+1");
  const Tensor codes = with_dense_rows(a), scales = with_dense_rows(a_scale);
  const Fp8Weights weights = fp8_weights(b, b_scale);
  const Bias bias_rows = bias_of(bias, bias_type(kOp, bias));
  Tensor out = empty_cpu(kOp, {a.size(0), b.size(1)}, out_dtype);
  GroupedGemmFp8Params p;
  p.expert_offsets = int32_data(offsets);
  p.num_experts = b.size(0);
  p.out_features = b.size(1);
  p.in_features = b.size(2);
  p.a = {static_cast<const uint8_t*>(codes.const_data_ptr()), row_stride(codes),
         static_cast<const float*>(scales.const_data_ptr()), row_stride(scales), nullptr};
  p.b = weights.matrices;
  p.bias = bias_rows.vectors;
  p.out = {out.mutable_data_ptr(), out_type, b.size(1), nullptr};
  cpu::grouped_gemm_fp8(p, torch_parallel());
  zero_rows_from(out, num_valid_rows(offsets));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) {
  m.impl("grouped_gemm_fp8", MOE_BOX(grouped_gemm_fp8));
}

#ifdef MOE_OPS_WITH_CUDA

static Tensor grouped_gemm_fp8_cuda(const Tensor& a, const Tensor& a_scale, const Tensor& b,
                                    const Tensor& b_scale, const Tensor& expert_offsets,
                                    ScalarType out_dtype, const OptTensor& bias) {
  const Op op(kOp, a);
  const DType out_type = check(op, a, a_scale, b, b_scale, bias, out_dtype);
  const Tensor offsets = device_offsets(op, expert_offsets, a.size(0));
  check_size(op, "expert_offsets", expert_offsets, 0, b.size(0) + 1, "E+1");
  const Tensor codes = token_rows(a), scales = with_dense_rows(a_scale);
  const Fp8Weights weights = fp8_weights(b, b_scale);
  const Bias bias_rows = bias_of(bias, bias_type(op, bias));
  Tensor out = device_empty(a, {a.size(0), b.size(1)}, out_dtype);
  cuda::GroupedGemmFp8Params p;
  p.expert_offsets = int32_data(offsets);
  p.num_experts = b.size(0);
  p.num_rows = a.size(0);
  p.out_features = b.size(1);
  p.in_features = b.size(2);
  p.a.data = static_cast<const uint8_t*>(codes.const_data_ptr());
  p.a.stride = row_stride(codes);
  p.a.scale = static_cast<const float*>(scales.const_data_ptr());
  p.a.scale_stride = row_stride(scales);
  p.a.limit = a.size(0);
  p.b = weights.matrices;
  p.bias = bias_rows.vectors;
  p.out = {out.mutable_data_ptr(), out_type, b.size(1), nullptr};
  check_status(op, cuda::grouped_gemm_fp8(p, current_stream(a)));
  return out;
}

MOE_CUDA_LIBRARY(m) { m.impl("grouped_gemm_fp8", MOE_CUDA_BOX(grouped_gemm_fp8_cuda)); }

#endif  // MOE_OPS_WITH_CUDA

}  // namespace moe_ops::adapter
