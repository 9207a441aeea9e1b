#include "moe_ops/quantize_fp8.h"

#include "torch/device.h"
#include "torch/fp8.h"
#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

namespace {

constexpr const char* kOp = "quantize_fp8";

DType check(const Op& op, const Tensor& x) {
  const DType type = check_float_to_fp8(op, "x", x);
  check_dim(op, "x", x, 2, "[N, D]");
  return type;
}

QuantizeFp8Params params_of(const Tensor& x, DType type, Tensor& q, Tensor& scale) {
  QuantizeFp8Params p;
  p.x = rows_of(x, type);
  p.num_rows = x.size(0);
  p.row_length = x.size(1);
  p.q = static_cast<uint8_t*>(q.mutable_data_ptr());
  p.scale = static_cast<float*>(scale.mutable_data_ptr());
  return p;
}

std::tuple<Tensor, Tensor> quantize_fp8(const Tensor& x) {
  const DType type = check(kOp, x);
  const int64_t N = x.size(0), D = x.size(1);
  const Tensor src = with_dense_rows(x);
  Tensor q = empty_cpu(kOp, {N, D}, ScalarType::Float8_e4m3fn);
  Tensor scale = empty_cpu(kOp, {N, fp8_blocks(D)}, ScalarType::Float);
  cpu::quantize_fp8(params_of(src, type, q, scale), torch_parallel());
  return {q, scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) { m.impl("quantize_fp8", MOE_BOX(quantize_fp8)); }

#ifdef MOE_OPS_WITH_CUDA

static std::tuple<Tensor, Tensor> quantize_fp8_cuda(const Tensor& x) {
  const Op op(kOp, x);
  const DType type = check(op, x);
  const int64_t N = x.size(0), D = x.size(1);
  const Tensor src = with_dense_rows(x);
  Tensor q = device_empty(x, {N, D}, ScalarType::Float8_e4m3fn);
  Tensor scale = device_empty(x, {N, fp8_blocks(D)}, ScalarType::Float);
  check_status(op, cuda::quantize_fp8(params_of(src, type, q, scale), current_stream(x)));
  return {q, scale};
}

MOE_CUDA_LIBRARY(m) { m.impl("quantize_fp8", MOE_CUDA_BOX(quantize_fp8_cuda)); }

#endif  // MOE_OPS_WITH_CUDA

}  // namespace moe_ops::adapter
