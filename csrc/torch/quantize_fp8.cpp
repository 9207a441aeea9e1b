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

constexpr const char* kColumnsOp = "quantize_fp8_columns";

// Checks all but the offsets and the map's values; returns x's type.
DType check_columns(const Op& op, const Tensor& x, const OptTensor& row_to_slot,
                    const OptTensor& topk_weights) {
  const DType type = check_float_to_fp8(op, "x", x);
  check_dim(op, "x", x, 2, row_to_slot.has_value() ? "[T, D]" : "[N, D]");
  const int64_t T = x.size(0);
  int64_t top_k = 1;
  if (row_to_slot.has_value()) {
    check_device(op, "row_to_slot", *row_to_slot);
    check_index(op, "row_to_slot", *row_to_slot);
    check_dim(op, "row_to_slot", *row_to_slot, 1, "[N]");
    const int64_t N = row_to_slot->numel();
    check_num_slots(op, "row_to_slot", N);
    MOE_CHECK(T == 0 ? N == 0 : N % T == 0, op,
              ": row_to_slot must hold a whole number of slots for each of the ", T,
              " tokens of x, got ", N, ".");
    top_k = T == 0 ? 1 : N / T;
  }
  if (topk_weights.has_value()) {
    MOE_CHECK(row_to_slot.has_value(), op,
              ": topk_weights must come with row_to_slot, got it alone.");
    check_float(op, "topk_weights", *topk_weights);
    check_dim(op, "topk_weights", *topk_weights, 2, "[T, K]");
    check_size(op, "topk_weights", *topk_weights, 0, T, "T");
    if (T > 0) check_size(op, "topk_weights", *topk_weights, 1, top_k, "K");
  }
  return type;
}

// offsets, map and weights are what the kernels read; outputs are allocated by the caller.
QuantizeFp8ColumnsParams columns_params(const Tensor& x, DType type, const Tensor& offsets,
                                        const OptTensor& map, const OptTensor& weights, Tensor& q,
                                        Tensor& scale) {
  QuantizeFp8ColumnsParams p;
  p.expert_offsets = int32_data(offsets);
  p.num_experts = offsets.numel() - 1;
  p.num_rows = map.has_value() ? map->numel() : x.size(0);
  p.row_length = x.size(1);
  p.x = rows_of(x, type);
  p.num_source_rows = x.size(0);
  if (map.has_value()) {
    p.row_to_slot = int32_data(*map);
    p.top_k = x.size(0) == 0 ? 1 : map->numel() / x.size(0);
  }
  if (weights.has_value()) p.topk_weights = static_cast<const float*>(weights->const_data_ptr());
  p.q = static_cast<uint8_t*>(q.mutable_data_ptr());
  p.scale = static_cast<float*>(scale.mutable_data_ptr());
  return p;
}

std::tuple<Tensor, Tensor> quantize_fp8_columns(const Tensor& x, const Tensor& expert_offsets,
                                                const OptTensor& row_to_slot,
                                                const OptTensor& topk_weights) {
  const DType type = check_columns(kColumnsOp, x, row_to_slot, topk_weights);
  const int64_t N = row_to_slot.has_value() ? row_to_slot->numel() : x.size(0), D = x.size(1);
  const Tensor offsets = checked_offsets(kColumnsOp, expert_offsets, N);
  OptTensor map;
  if (row_to_slot.has_value()) map = checked_map(kColumnsOp, "row_to_slot", *row_to_slot, N);
  const OptTensor weights = contiguous_as(topk_weights, ScalarType::Float);
  const Tensor src = with_dense_rows(x);
  const int64_t G = fp8_groups(N, offsets.numel() - 1);
  Tensor q = empty_cpu(kColumnsOp, {D, G * kFp8Block}, ScalarType::Float8_e4m3fn);
  Tensor scale = empty_cpu(kColumnsOp, {G, D}, ScalarType::Float);
  cpu::quantize_fp8_columns(columns_params(src, type, offsets, map, weights, q, scale),
                            torch_parallel());
  return {q, scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) {
  m.impl("quantize_fp8", MOE_BOX(quantize_fp8));
  m.impl("quantize_fp8_columns", MOE_BOX(quantize_fp8_columns));
}

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

static std::tuple<Tensor, Tensor> quantize_fp8_columns_cuda(const Tensor& x,
                                                            const Tensor& expert_offsets,
                                                            const OptTensor& row_to_slot,
                                                            const OptTensor& topk_weights) {
  const Op op(kColumnsOp, x);
  const DType type = check_columns(op, x, row_to_slot, topk_weights);
  const int64_t N = row_to_slot.has_value() ? row_to_slot->numel() : x.size(0), D = x.size(1);
  const Tensor offsets = device_offsets(op, expert_offsets, N);
  const OptTensor map = contiguous_as(row_to_slot, ScalarType::Int);
  const OptTensor weights = contiguous_as(topk_weights, ScalarType::Float);
  const Tensor src = with_dense_rows(x);
  const int64_t G = fp8_groups(N, offsets.numel() - 1);
  Tensor q = device_empty(x, {D, G * kFp8Block}, ScalarType::Float8_e4m3fn);
  Tensor scale = device_empty(x, {G, D}, ScalarType::Float);
  check_status(
      op, cuda::quantize_fp8_columns(columns_params(src, type, offsets, map, weights, q, scale),
                                     current_stream(x)));
  return {q, scale};
}

MOE_CUDA_LIBRARY(m) {
  m.impl("quantize_fp8", MOE_CUDA_BOX(quantize_fp8_cuda));
  m.impl("quantize_fp8_columns", MOE_CUDA_BOX(quantize_fp8_columns_cuda));
}

#endif  // MOE_OPS_WITH_CUDA

}  // namespace moe_ops::adapter
