#include "moe_ops/moe_linear_reduce.h"

#include "torch/device.h"
#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

namespace {

DType check_reduce(const Op& op, const Tensor& h, const Tensor& w, const Tensor& topk_weights,
                   const Tensor& topk_ids, const OptTensor& bias) {
  const DType type = check_float(op, "h", h);
  check_dim(op, "h", h, 3, "[T, K, D]");
  check_same_dtype(op, "w", w, "h", h);
  check_dim(op, "w", w, 3, "[E, H, D]");
  check_num_experts(op, w.size(0));
  check_size(op, "w", w, 2, h.size(2), "D");
  check_float(op, "topk_weights", topk_weights);
  check_dim(op, "topk_weights", topk_weights, 2, "[T, K]");
  check_size(op, "topk_weights", topk_weights, 0, h.size(0), "T");
  check_size(op, "topk_weights", topk_weights, 1, h.size(1), "K");
  check_index(op, "topk_ids", topk_ids);
  check_dim(op, "topk_ids", topk_ids, 2, "[T, K]");
  check_size(op, "topk_ids", topk_ids, 0, h.size(0), "T");
  check_size(op, "topk_ids", topk_ids, 1, h.size(1), "K");
  if (bias.has_value()) {
    check_same_dtype(op, "bias", *bias, "h", h);
    check_dim(op, "bias", *bias, 2, "[E, H]");
    check_size(op, "bias", *bias, 0, w.size(0), "E");
    check_size(op, "bias", *bias, 1, w.size(1), "H");
  }
  return type;
}

void check_grad_y(const Op& op, const Tensor& grad_y, const Tensor& h, const Tensor& w) {
  check_same_dtype(op, "grad_y", grad_y, "h", h);
  check_dim(op, "grad_y", grad_y, 2, "[T, H]");
  check_size(op, "grad_y", grad_y, 0, h.size(0), "T");
  check_size(op, "grad_y", grad_y, 1, w.size(1), "H");
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Tensor moe_linear_reduce(const Tensor& h, const Tensor& w, const Tensor& topk_weights,
                         const Tensor& topk_ids, const OptTensor& bias) {
  constexpr const char* kOp = "moe_linear_reduce";
  const DType type = check_reduce(kOp, h, w, topk_weights, topk_ids, bias);
  const SlotIds slots = slot_ids(kOp, topk_ids, w.size(0));
  const Tensor src = dense(h);
  const Weights weights = weights_of(w, type);
  const Bias bias_rows = bias_of(bias, type);
  const Tensor slot_weights = contiguous_as(topk_weights, accumulate_type(h.scalar_type()));
  Tensor y = empty_cpu(kOp, {h.size(0), w.size(1)}, h.scalar_type());
  cpu::moe_linear_reduce(
      {slots.routing, slot_weights.const_data_ptr(), w.size(1), w.size(2), src.const_data_ptr(),
       weights.matrices, bias_rows.vectors, y.mutable_data_ptr()},
      torch_parallel());
  return y;
}

Gradients moe_linear_reduce_bwd(const Tensor& grad_y, const Tensor& h, const Tensor& w,
                                const Tensor& topk_weights, const Tensor& topk_ids,
                                const OptTensor& bias, bool need_h, bool need_w,
                                bool need_topk_weights, bool need_bias) {
  constexpr const char* kOp = "moe_linear_reduce_bwd";
  const DType type = check_reduce(kOp, h, w, topk_weights, topk_ids, bias);
  check_grad_y(kOp, grad_y, h, w);
  const int64_t T = h.size(0), K = h.size(1), E = w.size(0), H = w.size(1), D = w.size(2);
  const ScalarType dtype = h.scalar_type(), acc = accumulate_type(dtype);
  const SlotIds slots = slot_ids(kOp, topk_ids, E);
  const Tensor gy = with_dense_rows(grad_y);
  const Tensor src = dense(h);
  const Weights weights = weights_of(w, type);
  const Bias bias_rows = bias_of(bias, type);
  const Tensor slot_weights = contiguous_as(topk_weights, acc);
  Tensor grad_h = empty_cpu_if(need_h, kOp, {T, K, D}, dtype);
  Tensor grad_w = empty_cpu_if(need_w, kOp, {E, H, D}, dtype);
  Tensor grad_weights = empty_cpu_if(need_topk_weights, kOp, {T, K}, acc);
  Tensor grad_bias = empty_cpu_if(need_bias, kOp, {E, H}, dtype);
  cpu::moe_linear_reduce_bwd(
      {slots.routing, slot_weights.const_data_ptr(), H, D, rows_of(gy, type), src.const_data_ptr(),
       weights.matrices, bias_rows.vectors, data_if(need_h, grad_h), data_if(need_w, grad_w),
       data_if(need_topk_weights, grad_weights), data_if(need_bias, grad_bias)},
      torch_parallel());
  return {grad_h, grad_w, grad_weights, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) {
  m.impl("moe_linear_reduce", MOE_BOX(moe_linear_reduce));
  m.impl("moe_linear_reduce_bwd", MOE_BOX(moe_linear_reduce_bwd));
}

#ifdef MOE_OPS_WITH_CUDA

namespace {

Tensor moe_linear_reduce_cuda(const Tensor& h, const Tensor& w, const Tensor& topk_weights,
                              const Tensor& topk_ids, const OptTensor& bias) {
  const Op op("moe_linear_reduce", h);
  const DType type = check_reduce(op, h, w, topk_weights, topk_ids, bias);
  const SortedSlots slots = device_sorted_slots(op, topk_ids, w.size(0));
  const Tensor src = token_rows(dense(h));
  const Weights weights = weights_of(w, type);
  const Bias bias_rows = bias_of(bias, type);
  const Tensor slot_weights = contiguous_as(topk_weights, accumulate_type(h.scalar_type()));
  Tensor y = device_empty(h, {h.size(0), w.size(1)}, h.scalar_type());
  MoeLinearReduceParams p{slots.routing,     slot_weights.const_data_ptr(), w.size(1),
                          w.size(2),         src.const_data_ptr(),          weights.matrices,
                          bias_rows.vectors, y.mutable_data_ptr()};
  Tensor workspace = device_empty(h, {cuda::moe_linear_reduce_workspace(p)}, ScalarType::Byte);
  p.workspace = workspace.mutable_data_ptr();
  check_status(op, cuda::moe_linear_reduce(p, current_stream(h)));
  return y;
}

Gradients moe_linear_reduce_bwd_cuda(const Tensor& grad_y, const Tensor& h, const Tensor& w,
                                     const Tensor& topk_weights, const Tensor& topk_ids,
                                     const OptTensor& bias, bool need_h, bool need_w,
                                     bool need_topk_weights, bool need_bias) {
  const Op op("moe_linear_reduce_bwd", h);
  const DType type = check_reduce(op, h, w, topk_weights, topk_ids, bias);
  check_grad_y(op, grad_y, h, w);
  const int64_t T = h.size(0), K = h.size(1), E = w.size(0), H = w.size(1), D = w.size(2);
  const ScalarType dtype = h.scalar_type(), acc = accumulate_type(dtype);
  const SortedSlots slots = device_sorted_slots(op, topk_ids, E);
  const Tensor gy = token_rows(grad_y);
  const Tensor src = token_rows(dense(h));
  const Weights weights = weights_of(w, type);
  const Bias bias_rows = bias_of(bias, type);
  const Tensor slot_weights = contiguous_as(topk_weights, acc);
  Tensor grad_h = device_empty_if(need_h, h, {T, K, D}, dtype);
  Tensor grad_w = device_empty_if(need_w, h, {E, H, D}, dtype);
  Tensor grad_weights = device_empty_if(need_topk_weights, h, {T, K}, acc);
  Tensor grad_bias = device_empty_if(need_bias, h, {E, H}, dtype);
  MoeLinearReduceBwdParams p{slots.routing,
                             slot_weights.const_data_ptr(),
                             H,
                             D,
                             rows_of(gy, type),
                             src.const_data_ptr(),
                             weights.matrices,
                             bias_rows.vectors,
                             data_if(need_h, grad_h),
                             data_if(need_w, grad_w),
                             data_if(need_topk_weights, grad_weights),
                             data_if(need_bias, grad_bias)};
  Tensor workspace = device_empty(h, {cuda::moe_linear_reduce_bwd_workspace(p)}, ScalarType::Byte);
  p.workspace = workspace.mutable_data_ptr();
  check_status(op, cuda::moe_linear_reduce_bwd(p, current_stream(h)));
  return {grad_h, grad_w, grad_weights, grad_bias};
}

}  // namespace

MOE_CUDA_LIBRARY(m) {
  m.impl("moe_linear_reduce", MOE_CUDA_BOX(moe_linear_reduce_cuda));
  m.impl("moe_linear_reduce_bwd", MOE_CUDA_BOX(moe_linear_reduce_bwd_cuda));
}

#endif  // MOE_OPS_WITH_CUDA

}  // namespace moe_ops::adapter
