#include "moe_ops/quantize_fp8.h"

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

std::tuple<Tensor, Tensor> quantize_fp8(const Tensor& x) {
  const DType type = check(kOp, x);
  const int64_t N = x.size(0), D = x.size(1);
  const Tensor src = with_dense_rows(x);
  Tensor q = empty_cpu({N, D}, ScalarType::Float8_e4m3fn);
  Tensor scale = empty_cpu({N, fp8_blocks(D)}, ScalarType::Float);
  QuantizeFp8Params p;
  p.x = rows_of(src, type);
  p.num_rows = N;
  p.row_length = D;
  p.q = static_cast<uint8_t*>(q.mutable_data_ptr());
  p.scale = static_cast<float*>(scale.mutable_data_ptr());
  cpu::quantize_fp8(p, torch_parallel());
  return {q, scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) { m.impl("quantize_fp8", MOE_BOX(quantize_fp8)); }

}  // namespace moe_ops::adapter
