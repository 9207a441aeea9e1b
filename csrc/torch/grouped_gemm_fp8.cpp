#include "moe_ops/grouped_gemm_fp8.h"

#include "cpu/runtime/batch_invariant.h"
#include "torch/device.h"
#include "torch/fp8.h"
#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

namespace {

constexpr const char* kOp = "grouped_gemm_fp8";

DType check_out_dtype(const Op& op, ScalarType out_dtype) {
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
  return check_out_dtype(op, out_dtype);
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
  // In the batch-invariant mode all rows are GEMVs, which read weights along k.
  const Fp8Weights weights = fp8_weights(b, b_scale, !cpu::batch_invariant());
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

constexpr const char* kWgradOp = "grouped_gemm_fp8_wgrad";

// All but the offsets' values; the type of the result, which is main_grad's where that is given.
DType check_wgrad(const Op& op, const Tensor& grad, const Tensor& grad_scale, const Tensor& a,
                  const Tensor& a_scale, const Tensor& expert_offsets, ScalarType out_dtype,
                  const OptTensor& main_grad) {
  check_fp8_columns(op, "grad", "grad_scale", grad, grad_scale, "[O, 128 G]");
  check_fp8_columns(op, "a", "a_scale", a, a_scale, "[K, 128 G]");
  check_size(op, "a_scale", a_scale, 0, grad_scale.size(0), "G");
  const DType type = check_out_dtype(op, out_dtype);
  check_dim(op, "expert_offsets", expert_offsets, 1, "[E+1]");
  const int64_t E = expert_offsets.numel() - 1;
  MOE_CHECK(E < 1 || a_scale.size(0) >= E, op,
            ": a_scale must have at least one group for each of the ", E, " experts, got ",
            a_scale.size(0), ".");
  if (!main_grad.has_value()) return type;
  check_device(op, "main_grad", *main_grad);
  MOE_CHECK(main_grad->scalar_type() == out_dtype, op, ": main_grad must be ",
            dtype_name(out_dtype), " like out_dtype, got ", dtype_name(main_grad->scalar_type()),
            ".");
  check_dim(op, "main_grad", *main_grad, 3, "[E, O, K]");
  check_size(op, "main_grad", *main_grad, 0, E, "E");
  check_size(op, "main_grad", *main_grad, 1, grad.size(0), "O");
  check_size(op, "main_grad", *main_grad, 2, a.size(0), "K");
  MOE_CHECK(main_grad->is_contiguous(), op, ": main_grad must be contiguous, got shape ",
            shape_string(*main_grad), " with other strides.");
  return type;
}

// grad and a, dense along columns; `out` is main_grad or the result.
GroupedGemmFp8WgradParams wgrad_params(const Tensor& grad, const Tensor& grad_scale,
                                       const Tensor& a, const Tensor& a_scale,
                                       const Tensor& offsets, DType out_type, bool accumulate,
                                       Tensor& out) {
  GroupedGemmFp8WgradParams p;
  p.expert_offsets = int32_data(offsets);
  p.num_experts = offsets.numel() - 1;
  p.num_groups = a_scale.size(0);
  p.out_features = grad.size(0);
  p.in_features = a.size(0);
  p.grad = fp8_columns(grad, grad_scale);
  p.a = fp8_columns(a, a_scale);
  p.out = out.mutable_data_ptr();
  p.out_type = out_type;
  p.accumulate = accumulate;
  return p;
}

int64_t rows_of_groups(const Tensor& scale, const Tensor& expert_offsets) {
  return kFp8Block * (scale.size(0) - expert_offsets.numel() + 1) + kFp8Block - 1;
}

Tensor grouped_gemm_fp8_wgrad(const Tensor& grad, const Tensor& grad_scale, const Tensor& a,
                              const Tensor& a_scale, const Tensor& expert_offsets,
                              ScalarType out_dtype, const OptTensor& main_grad) {
  const DType type =
      check_wgrad(kWgradOp, grad, grad_scale, a, a_scale, expert_offsets, out_dtype, main_grad);
  const Tensor offsets =
      checked_offsets(kWgradOp, expert_offsets, rows_of_groups(a_scale, expert_offsets));
  const int64_t E = offsets.numel() - 1;
  const Tensor g = with_dense_rows(grad), gs = with_dense_rows(grad_scale);
  const Tensor b = with_dense_rows(a), bs = with_dense_rows(a_scale);
  Tensor out = main_grad.has_value() ? *main_grad
                                     : empty_cpu(kWgradOp, {E, g.size(0), b.size(0)}, out_dtype);
  cpu::grouped_gemm_fp8_wgrad(wgrad_params(g, gs, b, bs, offsets, type, main_grad.has_value(), out),
                              torch_parallel());
  return main_grad.has_value() ? empty_cpu(kWgradOp, {0}, out_dtype) : out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) {
  m.impl("grouped_gemm_fp8", MOE_BOX(grouped_gemm_fp8));
  m.impl("grouped_gemm_fp8_wgrad", MOE_BOX(grouped_gemm_fp8_wgrad));
}

#ifdef MOE_OPS_WITH_CUDA

static Tensor grouped_gemm_fp8_cuda(const Tensor& a, const Tensor& a_scale, const Tensor& b,
                                    const Tensor& b_scale, const Tensor& expert_offsets,
                                    ScalarType out_dtype, const OptTensor& bias) {
  const Op op(kOp, a);
  const DType out_type = check(op, a, a_scale, b, b_scale, bias, out_dtype);
  const Tensor offsets = device_offsets(op, expert_offsets, a.size(0));
  check_size(op, "expert_offsets", expert_offsets, 0, b.size(0) + 1, "E+1");
  const Tensor codes = with_dense_rows(a), scales = with_dense_rows(a_scale);
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

static Tensor grouped_gemm_fp8_wgrad_cuda(const Tensor& grad, const Tensor& grad_scale,
                                          const Tensor& a, const Tensor& a_scale,
                                          const Tensor& expert_offsets, ScalarType out_dtype,
                                          const OptTensor& main_grad) {
  const Op op(kWgradOp, grad);
  const DType type =
      check_wgrad(op, grad, grad_scale, a, a_scale, expert_offsets, out_dtype, main_grad);
  const Tensor offsets =
      device_offsets(op, expert_offsets, rows_of_groups(a_scale, expert_offsets));
  const int64_t E = offsets.numel() - 1;
  const Tensor g = with_dense_rows(grad), gs = with_dense_rows(grad_scale);
  const Tensor b = with_dense_rows(a), bs = with_dense_rows(a_scale);
  Tensor out =
      main_grad.has_value() ? *main_grad : device_empty(grad, {E, g.size(0), b.size(0)}, out_dtype);
  check_status(op, cuda::grouped_gemm_fp8_wgrad(
                       wgrad_params(g, gs, b, bs, offsets, type, main_grad.has_value(), out),
                       current_stream(grad)));
  return main_grad.has_value() ? device_empty(grad, {0}, out_dtype) : out;
}

MOE_CUDA_LIBRARY(m) {
  m.impl("grouped_gemm_fp8", MOE_CUDA_BOX(grouped_gemm_fp8_cuda));
  m.impl("grouped_gemm_fp8_wgrad", MOE_CUDA_BOX(grouped_gemm_fp8_wgrad_cuda));
}

#endif  // MOE_OPS_WITH_CUDA

}  // namespace moe_ops::adapter
