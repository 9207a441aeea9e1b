#include "moe_ops/moe_linear_map.h"

#include "torch/device.h"
#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

namespace {

DType check_map(const Op& op, const Tensor& x, const Tensor& w, const Tensor& topk_ids) {
  const DType type = check_float(op, "x", x);
  check_dim(op, "x", x, 2, "[T, H]");
  check_same_dtype(op, "w", w, "x", x);
  check_dim(op, "w", w, 3, "[E, O, H]");
  check_num_experts(op, w.size(0));
  check_size(op, "w", w, 2, x.size(1), "H");
  check_index(op, "topk_ids", topk_ids);
  check_dim(op, "topk_ids", topk_ids, 2, "[T, K]");
  check_size(op, "topk_ids", topk_ids, 0, x.size(0), "T");
  return type;
}

void check_bias(const Op& op, const OptTensor& bias, const Tensor& x, const Tensor& w) {
  if (!bias.has_value()) return;
  check_same_dtype(op, "bias", *bias, "x", x);
  check_dim(op, "bias", *bias, 2, "[E, O]");
  check_size(op, "bias", *bias, 0, w.size(0), "E");
  check_size(op, "bias", *bias, 1, w.size(1), "O");
}

void check_grad_h(const Op& op, const Tensor& grad_h, const Tensor& x, const Tensor& w,
                  const Tensor& topk_ids) {
  check_same_dtype(op, "grad_h", grad_h, "x", x);
  check_dim(op, "grad_h", grad_h, 3, "[T, K, O]");
  check_size(op, "grad_h", grad_h, 0, x.size(0), "T");
  check_size(op, "grad_h", grad_h, 1, topk_ids.size(1), "K");
  check_size(op, "grad_h", grad_h, 2, w.size(1), "O");
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

Tensor moe_linear_map(const Tensor& x, const Tensor& w, const Tensor& topk_ids,
                      const OptTensor& bias) {
  constexpr const char* kOp = "moe_linear_map";
  const DType type = check_map(kOp, x, w, topk_ids);
  check_bias(kOp, bias, x, w);
  const SlotIds slots = slot_ids(kOp, topk_ids, w.size(0));
  const Tensor src = with_dense_rows(x);
  const Weights weights = weights_of(w, type);
  const Bias bias_rows = bias_of(bias, type);
  Tensor h = empty_cpu(kOp, {x.size(0), topk_ids.size(1), w.size(1)}, x.scalar_type());
  cpu::moe_linear_map({slots.routing, w.size(1), w.size(2), rows_of(src, type), weights.matrices,
                       bias_rows.vectors, h.mutable_data_ptr()},
                      torch_parallel());
  return h;
}

Gradients moe_linear_map_bwd(const Tensor& grad_h, const Tensor& x, const Tensor& w,
                             const Tensor& topk_ids, bool need_x, bool need_w, bool need_bias) {
  constexpr const char* kOp = "moe_linear_map_bwd";
  const DType type = check_map(kOp, x, w, topk_ids);
  check_grad_h(kOp, grad_h, x, w, topk_ids);
  const int64_t E = w.size(0), O = w.size(1), H = w.size(2);
  const SlotIds slots = slot_ids(kOp, topk_ids, E);
  const Tensor src = with_dense_rows(x);
  const Tensor grad = dense(grad_h);
  const Weights weights = weights_of(w, type);
  Tensor grad_x = empty_cpu_if(need_x, kOp, {x.size(0), H}, x.scalar_type());
  Tensor grad_w = empty_cpu_if(need_w, kOp, {E, O, H}, x.scalar_type());
  Tensor grad_bias = empty_cpu_if(need_bias, kOp, {E, O}, x.scalar_type());
  cpu::moe_linear_map_bwd(
      {slots.routing, O, H, grad.const_data_ptr(), rows_of(src, type), weights.matrices,
       data_if(need_x, grad_x), data_if(need_w, grad_w), data_if(need_bias, grad_bias)},
      torch_parallel());
  return {grad_x, grad_w, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) {
  m.impl("moe_linear_map", MOE_BOX(moe_linear_map));
  m.impl("moe_linear_map_bwd", MOE_BOX(moe_linear_map_bwd));
}

#ifdef MOE_OPS_WITH_CUDA

namespace {

Tensor moe_linear_map_cuda(const Tensor& x, const Tensor& w, const Tensor& topk_ids,
                           const OptTensor& bias) {
  const Op op("moe_linear_map", x);
  const DType type = check_map(op, x, w, topk_ids);
  check_bias(op, bias, x, w);
  const SortedSlots slots = device_sorted_slots(op, topk_ids, w.size(0));
  const Tensor src = token_rows(x);
  const Weights weights = weights_of(w, type);
  const Bias bias_rows = bias_of(bias, type);
  Tensor h = device_empty(x, {x.size(0), topk_ids.size(1), w.size(1)}, x.scalar_type());
  check_status(op, cuda::moe_linear_map({slots.routing, w.size(1), w.size(2), rows_of(src, type),
                                         weights.matrices, bias_rows.vectors, h.mutable_data_ptr()},
                                        current_stream(x)));
  return h;
}

Gradients moe_linear_map_bwd_cuda(const Tensor& grad_h, const Tensor& x, const Tensor& w,
                                  const Tensor& topk_ids, bool need_x, bool need_w,
                                  bool need_bias) {
  const Op op("moe_linear_map_bwd", x);
  const DType type = check_map(op, x, w, topk_ids);
  check_grad_h(op, grad_h, x, w, topk_ids);
  const int64_t E = w.size(0), O = w.size(1), H = w.size(2);
  const SortedSlots slots = device_sorted_slots(op, topk_ids, E);
  const Tensor src = token_rows(x);
  const Tensor grad = token_rows(dense(grad_h));
  const Weights weights = weights_of(w, type);
  Tensor grad_x = device_empty_if(need_x, x, {x.size(0), H}, x.scalar_type());
  Tensor grad_w = device_empty_if(need_w, x, {E, O, H}, x.scalar_type());
  Tensor grad_bias = device_empty_if(need_bias, x, {E, O}, x.scalar_type());
  MoeLinearMapBwdParams p{slots.routing,
                          O,
                          H,
                          grad.const_data_ptr(),
                          rows_of(src, type),
                          weights.matrices,
                          data_if(need_x, grad_x),
                          data_if(need_w, grad_w),
                          data_if(need_bias, grad_bias)};
  Tensor workspace = device_empty(x, {cuda::moe_linear_map_bwd_workspace(p)}, ScalarType::Byte);
  p.workspace = workspace.mutable_data_ptr();
  check_status(op, cuda::moe_linear_map_bwd(p, current_stream(x)));
  return {grad_x, grad_w, grad_bias};
}

}  // namespace

MOE_CUDA_LIBRARY(m) {
  m.impl("moe_linear_map", MOE_CUDA_BOX(moe_linear_map_cuda));
  m.impl("moe_linear_map_bwd", MOE_CUDA_BOX(moe_linear_map_bwd_cuda));
}

#endif  // MOE_OPS_WITH_CUDA

}  // namespace moe_ops::adapter
