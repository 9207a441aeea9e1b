#include "moe_ops/grouped_gemm_fp8.h"

#include "moe_ops/batch_invariant.h"
#include "torch/device.h"
#include "torch/fp8.h"
#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

namespace {

constexpr const char* kOp = "grouped_gemm_fp8";

// Checks all but the offsets and returns the type of the result.
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

Tensor grouped_gemm_fp8(const Tensor& a, const Tensor& a_scale, const Tensor& b,
                        const Tensor& b_scale, const Tensor& expert_offsets, ScalarType out_dtype,
                        const OptTensor& bias) {
  const DType out_type = check(kOp, a, a_scale, b, b_scale, bias, out_dtype);
  const Tensor offsets = checked_offsets(kOp, expert_offsets, a.size(0));
  check_size(kOp, "expert_offsets", expert_offsets, 0, b.size(0) + 1, "E+1");
  const Tensor codes = with_dense_rows(a), scales = with_dense_rows(a_scale);
  // Weights may be dense along features, as in the gradient of a layer's input. In batch-invariant
  // mode all rows are GEMVs, which read weights along k.
  const bool turned = b.size(1) > 1 && b.size(2) > 1 && b.stride(1) == 1 && !batch_invariant();
  const Fp8Weights weights = fp8_weights(turned ? torch::stable::transpose(b, 1, 2) : b, b_scale);
  const Bias bias_rows = bias_of(bias, fp8_bias_type(kOp, "bias", bias));
  Tensor out = empty_cpu(kOp, {a.size(0), b.size(1)}, out_dtype);
  GroupedGemmFp8Params p;
  p.expert_offsets = int32_data(offsets);
  p.num_experts = b.size(0);
  p.out_features = b.size(1);
  p.in_features = b.size(2);
  p.a = {static_cast<const uint8_t*>(codes.const_data_ptr()), row_stride(codes),
         static_cast<const float*>(scales.const_data_ptr()), row_stride(scales), nullptr};
  p.b = weights.matrices;
  if (turned) std::swap(p.b.stride_o, p.b_stride_k);
  p.bias = bias_rows.vectors;
  p.out = {out.mutable_data_ptr(), out_type, b.size(1), nullptr};
  cpu::grouped_gemm_fp8(p, torch_parallel());
  zero_rows_from(out, num_valid_rows(offsets));
  return out;
}

constexpr const char* kWgradOp = "grouped_gemm_fp8_wgrad";

// Operands of a weight gradient, quantized by columns.
struct WgradInputs {
  const Tensor& grad;            // [O, 128 G]
  const Tensor& grad_scale;      // [G, O]
  const Tensor& a;               // [K, 128 G]
  const Tensor& a_scale;         // [G, K]
  const Tensor& expert_offsets;  // [E+1]
};

// Checks all but the offsets' values and the type of the result.
void check_wgrad(const Op& op, const WgradInputs& in) {
  const auto& [grad, grad_scale, a, a_scale, expert_offsets] = in;
  check_fp8_columns(op, "grad", "grad_scale", grad, grad_scale, "[O, 128 G]");
  check_fp8_columns(op, "a", "a_scale", a, a_scale, "[K, 128 G]");
  check_size(op, "a_scale", a_scale, 0, grad_scale.size(0), "G");
  check_dim(op, "expert_offsets", expert_offsets, 1, "[E+1]");
  const int64_t E = expert_offsets.numel() - 1;
  MOE_CHECK(E < 1 || a_scale.size(0) >= E, op,
            ": a_scale must have at least one group for each of the ", E, " experts, got ",
            a_scale.size(0), ".");
}

DType check_main_grad(const Op& op, const Tensor& main, int64_t E, int64_t O, int64_t K) {
  const DType type = check_float_to_fp8(op, "main_grad", main);
  check_dim(op, "main_grad", main, 3, "[E, O, K]");
  check_size(op, "main_grad", main, 0, E, "E");
  check_size(op, "main_grad", main, 1, O, "O");
  check_size(op, "main_grad", main, 2, K, "K");
  MOE_CHECK(main.is_contiguous(), op, ": main_grad must be contiguous, got shape ",
            shape_string(main), " with other strides.");
  return type;
}

// Returns the parameters of a call; operands are dense along columns, and `out` is main_grad or the
// result.
GroupedGemmFp8WgradParams wgrad_params(const WgradInputs& in, DType out_type, bool accumulate,
                                       Tensor& out) {
  GroupedGemmFp8WgradParams p;
  p.expert_offsets = int32_data(in.expert_offsets);
  p.num_experts = in.expert_offsets.numel() - 1;
  p.num_groups = in.a_scale.size(0);
  p.out_features = in.grad.size(0);
  p.in_features = in.a.size(0);
  p.grad = fp8_columns(in.grad, in.grad_scale);
  p.a = fp8_columns(in.a, in.a_scale);
  p.out = out.mutable_data_ptr();
  p.out_type = out_type;
  p.accumulate = accumulate;
  return p;
}

// Returns E; the values of the offsets are checked later.
int64_t num_experts_of(const Op& op, const Tensor& expert_offsets) {
  MOE_CHECK(expert_offsets.numel() >= 2, op,
            ": expert_offsets must be [E+1] with at least one expert, got shape ",
            shape_string(expert_offsets), ".");
  return expert_offsets.numel() - 1;
}

int64_t rows_of_groups(const Tensor& scale, const Tensor& expert_offsets) {
  return kFp8Block * (scale.size(0) - expert_offsets.numel() + 1) + kFp8Block - 1;
}

void run_wgrad(const Op& op, const WgradInputs& in, DType type, bool accumulate, Tensor& out) {
  const Tensor offsets =
      checked_offsets(op, in.expert_offsets, rows_of_groups(in.a_scale, in.expert_offsets));
  const Tensor g = with_dense_rows(in.grad), gs = with_dense_rows(in.grad_scale);
  const Tensor b = with_dense_rows(in.a), bs = with_dense_rows(in.a_scale);
  cpu::grouped_gemm_fp8_wgrad(wgrad_params({g, gs, b, bs, offsets}, type, accumulate, out),
                              torch_parallel());
}

Tensor grouped_gemm_fp8_wgrad(const Tensor& grad, const Tensor& grad_scale, const Tensor& a,
                              const Tensor& a_scale, const Tensor& expert_offsets,
                              ScalarType out_dtype) {
  const WgradInputs in = {.grad = grad,
                          .grad_scale = grad_scale,
                          .a = a,
                          .a_scale = a_scale,
                          .expert_offsets = expert_offsets};
  check_wgrad(kWgradOp, in);
  const DType type = check_out_dtype(kWgradOp, out_dtype);
  Tensor out = empty_cpu(
      kWgradOp, {num_experts_of(kWgradOp, expert_offsets), grad.size(0), a.size(0)}, out_dtype);
  run_wgrad(kWgradOp, in, type, false, out);
  return out;
}

Tensor grouped_gemm_fp8_wgrad_accumulate(const Tensor& grad, const Tensor& grad_scale,
                                         const Tensor& a, const Tensor& a_scale,
                                         const Tensor& expert_offsets, Tensor main_grad) {
  const WgradInputs in = {.grad = grad,
                          .grad_scale = grad_scale,
                          .a = a,
                          .a_scale = a_scale,
                          .expert_offsets = expert_offsets};
  check_wgrad(kWgradOp, in);
  const int64_t E = num_experts_of(kWgradOp, expert_offsets);
  const DType type = check_main_grad(kWgradOp, main_grad, E, grad.size(0), a.size(0));
  run_wgrad(kWgradOp, in, type, true, main_grad);
  return empty_cpu(kWgradOp, {0}, main_grad.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) {
  m.impl("grouped_gemm_fp8", MOE_BOX(grouped_gemm_fp8));
  m.impl("grouped_gemm_fp8_wgrad", MOE_BOX(grouped_gemm_fp8_wgrad));
  m.impl("grouped_gemm_fp8_wgrad_accumulate", MOE_BOX(grouped_gemm_fp8_wgrad_accumulate));
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
  const Bias bias_rows = bias_of(bias, fp8_bias_type(op, "bias", bias));
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

static void run_wgrad_cuda(const Op& op, const WgradInputs& in, DType type, bool accumulate,
                           Tensor& out) {
  const Tensor offsets =
      device_offsets(op, in.expert_offsets, rows_of_groups(in.a_scale, in.expert_offsets));
  const Tensor g = with_dense_rows(in.grad), gs = with_dense_rows(in.grad_scale);
  const Tensor b = with_dense_rows(in.a), bs = with_dense_rows(in.a_scale);
  check_status(
      op, cuda::grouped_gemm_fp8_wgrad(wgrad_params({g, gs, b, bs, offsets}, type, accumulate, out),
                                       current_stream(in.grad)));
}

static Tensor grouped_gemm_fp8_wgrad_cuda(const Tensor& grad, const Tensor& grad_scale,
                                          const Tensor& a, const Tensor& a_scale,
                                          const Tensor& expert_offsets, ScalarType out_dtype) {
  const Op op(kWgradOp, grad);
  const WgradInputs in = {.grad = grad,
                          .grad_scale = grad_scale,
                          .a = a,
                          .a_scale = a_scale,
                          .expert_offsets = expert_offsets};
  check_wgrad(op, in);
  const DType type = check_out_dtype(op, out_dtype);
  Tensor out =
      device_empty(grad, {num_experts_of(op, expert_offsets), grad.size(0), a.size(0)}, out_dtype);
  run_wgrad_cuda(op, in, type, false, out);
  return out;
}

static Tensor grouped_gemm_fp8_wgrad_accumulate_cuda(const Tensor& grad, const Tensor& grad_scale,
                                                     const Tensor& a, const Tensor& a_scale,
                                                     const Tensor& expert_offsets,
                                                     Tensor main_grad) {
  const Op op(kWgradOp, grad);
  const WgradInputs in = {.grad = grad,
                          .grad_scale = grad_scale,
                          .a = a,
                          .a_scale = a_scale,
                          .expert_offsets = expert_offsets};
  check_wgrad(op, in);
  const int64_t E = num_experts_of(op, expert_offsets);
  const DType type = check_main_grad(op, main_grad, E, grad.size(0), a.size(0));
  run_wgrad_cuda(op, in, type, true, main_grad);
  return device_empty(grad, {0}, main_grad.scalar_type());
}

MOE_CUDA_LIBRARY(m) {
  m.impl("grouped_gemm_fp8", MOE_CUDA_BOX(grouped_gemm_fp8_cuda));
  m.impl("grouped_gemm_fp8_wgrad", MOE_CUDA_BOX(grouped_gemm_fp8_wgrad_cuda));
  m.impl("grouped_gemm_fp8_wgrad_accumulate", MOE_CUDA_BOX(grouped_gemm_fp8_wgrad_accumulate_cuda));
}

#endif  // MOE_OPS_WITH_CUDA

}  // namespace moe_ops::adapter
