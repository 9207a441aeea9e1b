#include "moe_ops/moe_linear_reduce.h"

#include "torch/routed_rows.h"
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

Tensor moe_linear_reduce(const Tensor& h, const Tensor& w, const Tensor& topk_weights,
                         const Tensor& topk_ids, const OptTensor& bias) {
  constexpr const char* kOp = "moe_linear_reduce";
  const DType type = check_reduce(kOp, h, w, topk_weights, topk_ids, bias);
  const int64_t T = h.size(0), D = h.size(2), E = w.size(0), H = w.size(1);
  const ScalarType acc = accumulate_type(h.scalar_type());
  const Tensor src = dense(h);
  const Weights weights = weights_of(w, type);
  const Bias bias_rows = bias_of(bias, type);
  const Tensor slot_weights = contiguous_as(topk_weights, acc);
  Tensor y = empty_cpu(kOp, {T, H}, h.scalar_type());
  SlotProduct product = slot_product(topk_ids, w);
  if (cpu::takes_slot_product(product, type)) {
    const std::vector<int32_t> ids = normalized_ids(topk_ids, E);
    product.ids = ids.data();
    cpu::moe_linear_reduce({product, src.const_data_ptr(), weights.matrices, bias_rows.vectors,
                            slot_weights.const_data_ptr(), y.mutable_data_ptr()},
                           torch_parallel());
    return y;
  }
  const RoutedRows routing = routed_rows(kOp, topk_ids, E);
  const Tensor rows = empty_cpu(kOp, {routing.valid(), H}, acc);
  multiply_rows(routing, {src.const_data_ptr(), type, D, routing.row_to_slot}, weights.matrices,
                bias_rows.vectors, H, D,
                {rows.mutable_data_ptr(), accumulate_type(type), H, nullptr});
  sum_slots(routing, rows, slot_weights.const_data_ptr(), y, type);
  return y;
}

template <class T>
void gather_weights(const RoutedRows& routing, const void* slot_weights, void* row_weights) {
  for (int64_t r = 0; r < routing.valid(); ++r) {
    static_cast<T*>(row_weights)[r] = static_cast<const T*>(slot_weights)[routing.row_to_slot[r]];
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_linear_reduce_bwd(
    const Tensor& grad_y, const Tensor& h, const Tensor& w, const Tensor& topk_weights,
    const Tensor& topk_ids, const OptTensor& bias, bool need_h, bool need_w, bool need_topk_weights,
    bool need_bias) {
  constexpr const char* kOp = "moe_linear_reduce_bwd";
  const DType type = check_reduce(kOp, h, w, topk_weights, topk_ids, bias);
  const int64_t T = h.size(0), K = h.size(1), D = h.size(2), E = w.size(0), H = w.size(1);
  check_grad_y(kOp, grad_y, h, w);
  const ScalarType dtype = h.scalar_type(), acc = accumulate_type(dtype);
  const Tensor gy = with_dense_rows(grad_y);
  const Tensor src = dense(h);
  const Bias bias_rows = bias_of(bias, type);
  const Tensor slot_weights = contiguous_as(topk_weights, acc);
  Tensor grad_h = need_h ? empty_cpu(kOp, {T, K, D}, dtype) : empty_cpu(kOp, {0}, dtype);
  Tensor grad_w = need_w ? empty_cpu(kOp, {E, H, D}, dtype) : empty_cpu(kOp, {0}, dtype);
  Tensor grad_weights = need_topk_weights ? empty_cpu(kOp, {T, K}, acc) : empty_cpu(kOp, {0}, acc);
  Tensor grad_bias = need_bias ? empty_cpu(kOp, {E, H}, dtype) : empty_cpu(kOp, {0}, dtype);
  SlotProduct product = slot_product(topk_ids, w);
  if (cpu::takes_slot_product(product, type)) {
    const std::vector<int32_t> ids = normalized_ids(topk_ids, E);
    product.ids = ids.data();
    const Weights weights = weights_of(w, type);
    MoeLinearReduceBlocksBwdParams q;
    q.s = product;
    q.grad_y = rows_of(gy, type);
    q.h = src.const_data_ptr();
    q.w = weights.matrices;
    q.bias = bias_rows.vectors;
    q.topk_weights = slot_weights.const_data_ptr();
    q.grad_h = data_if(need_h, grad_h);
    q.grad_w = data_if(need_w, grad_w);
    q.grad_topk_weights = data_if(need_topk_weights, grad_weights);
    q.grad_bias = data_if(need_bias, grad_bias);
    cpu::moe_linear_reduce_bwd(q, torch_parallel());
    return {grad_h, grad_w, grad_weights, grad_bias};
  }
  const RoutedRows routing = routed_rows(kOp, topk_ids, E);
  const Tensor row_weights = empty_cpu(kOp, {routing.valid()}, acc);
  if (acc == ScalarType::Double) {
    gather_weights<double>(routing, slot_weights.const_data_ptr(), row_weights.mutable_data_ptr());
  } else {
    gather_weights<float>(routing, slot_weights.const_data_ptr(), row_weights.mutable_data_ptr());
  }
  const Rows gy_rows = rows_of(gy, type, routing.row_to_token.data());
  const Rows h_rows = {src.const_data_ptr(), type, D, routing.row_to_slot};
  if (need_h || need_topk_weights) {
    const Weights weights = weights_of(w, type);
    const Tensor u = empty_cpu(kOp, {routing.valid(), D}, acc);
    multiply_rows(routing, gy_rows, transposed(weights.matrices), {}, D, H,
                  {u.mutable_data_ptr(), accumulate_type(type), D, nullptr});
    MoeLinearReduceBwdParams q;
    q.expert_offsets = routing.offsets.data();
    q.num_experts = E;
    q.in_features = D;
    q.hidden_size = H;
    q.u = u.const_data_ptr();
    q.h = h_rows;
    q.grad_y = gy_rows;
    q.bias = bias_rows.vectors;
    q.row_weights = row_weights.const_data_ptr();
    q.row_to_slot = routing.row_to_slot;
    q.grad_h = need_h ? grad_h.mutable_data_ptr() : nullptr;
    q.grad_topk_weights = need_topk_weights ? grad_weights.mutable_data_ptr() : nullptr;
    cpu::moe_linear_reduce_bwd(q, torch_parallel());
    if (need_h) zero_empty_slots(routing, q.grad_h, D * dtype_size(type));
    if (need_topk_weights) {
      zero_empty_slots(routing, q.grad_topk_weights, acc == ScalarType::Double ? 8 : 4);
    }
  }
  const void* scale = row_weights.const_data_ptr();
  if (need_w) weight_gradient(routing, gy_rows, scale, h_rows, grad_w, type);
  if (need_bias) bias_gradient(routing, gy_rows, scale, grad_bias, type);
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
  const int64_t D = h.size(2), H = w.size(1);
  const DeviceRouting routing = device_routing(op, topk_ids, w.size(0));
  const Tensor src = dense(h);
  const Weights weights = weights_of(w, type);
  const Bias bias_rows = bias_of(bias, type);
  const Tensor slot_weights = contiguous_as(topk_weights, accumulate_type(h.scalar_type()));
  Tensor rows = device_empty(h, {routing.num_rows, H}, h.scalar_type());
  Tensor y = device_empty(h, {h.size(0), H}, h.scalar_type());
  cuda::GroupedGemmParams p =
      device_product(routing, routing.by_slot(src, type), weights.matrices, bias_rows.vectors, H, D,
                     mutable_device_rows(rows, type));
  p.zero_tail = false;
  check_status(op, cuda::grouped_gemm(p, current_stream(h)));
  device_sum_slots(op, routing, rows, slot_weights.const_data_ptr(), y, type);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_linear_reduce_bwd_cuda(
    const Tensor& grad_y, const Tensor& h, const Tensor& w, const Tensor& topk_weights,
    const Tensor& topk_ids, const OptTensor& bias, bool need_h, bool need_w, bool need_topk_weights,
    bool need_bias) {
  const Op op("moe_linear_reduce_bwd", h);
  const DType type = check_reduce(op, h, w, topk_weights, topk_ids, bias);
  check_grad_y(op, grad_y, h, w);
  const int64_t T = h.size(0), K = h.size(1), D = h.size(2), E = w.size(0), H = w.size(1);
  const DeviceRouting routing = device_routing(op, topk_ids, E);
  const ScalarType dtype = h.scalar_type(), acc = accumulate_type(dtype);
  const Tensor gy = with_dense_rows(grad_y);
  const Tensor src = dense(h);
  const Bias bias_rows = bias_of(bias, type);
  const Tensor slot_weights = contiguous_as(topk_weights, acc);
  const cuda::RowScale scale = routing.by_slot(slot_weights);
  const cuda::DeviceRows gy_rows = routing.by_token(gy, type);
  const cuda::DeviceRows h_rows = routing.by_slot(src, type);
  Tensor grad_h = need_h ? device_empty(h, {T, K, D}, dtype) : device_empty(h, {0}, dtype);
  Tensor grad_w = need_w ? device_empty(h, {E, H, D}, dtype) : device_empty(h, {0}, dtype);
  Tensor grad_weights =
      need_topk_weights ? device_empty(h, {T, K}, acc) : device_empty(h, {0}, acc);
  Tensor grad_bias = need_bias ? device_empty(h, {E, H}, dtype) : device_empty(h, {0}, dtype);
  if (need_h && !need_topk_weights) {
    // Weighted and put into their slots by the product itself.
    const Weights weights = weights_of(w, type);
    cuda::GroupedGemmParams p = device_product(routing, gy_rows, transposed(weights.matrices), {},
                                               D, H, routing.by_slot(grad_h, type));
    p.a_scale = scale;
    check_status(op, cuda::grouped_gemm(p, current_stream(h)));
  } else if (need_topk_weights) {
    const Weights weights = weights_of(w, type);
    Tensor u = device_empty(h, {routing.num_rows, D}, dtype);
    cuda::GroupedGemmParams p = device_product(routing, gy_rows, transposed(weights.matrices), {},
                                               D, H, mutable_device_rows(u, type));
    p.zero_tail = false;
    check_status(op, cuda::grouped_gemm(p, current_stream(h)));
    cuda::MoeLinearReduceBwdParams q;
    q.expert_offsets = routing.offsets();
    q.num_experts = E;
    q.num_rows = routing.num_rows;
    q.in_features = D;
    q.hidden_size = H;
    q.type = type;
    q.u = u.const_data_ptr();
    q.h = h_rows;
    q.grad_y = gy_rows;
    q.bias = bias_rows.vectors;
    q.topk_weights = slot_weights.const_data_ptr();
    q.row_to_slot = routing.slots();
    q.grad_h = need_h ? grad_h.mutable_data_ptr() : nullptr;
    q.grad_topk_weights = grad_weights.mutable_data_ptr();
    check_status(op, cuda::moe_linear_reduce_bwd(q, current_stream(h)));
  }
  if (need_w) device_weight_gradient(op, routing, gy_rows, scale, h_rows, grad_w);
  if (need_bias) device_bias_gradient(op, routing, gy_rows, scale, grad_bias);
  return {grad_h, grad_w, grad_weights, grad_bias};
}

}  // namespace

MOE_CUDA_LIBRARY(m) {
  m.impl("moe_linear_reduce", MOE_CUDA_BOX(moe_linear_reduce_cuda));
  m.impl("moe_linear_reduce_bwd", MOE_CUDA_BOX(moe_linear_reduce_bwd_cuda));
}

#endif  // MOE_OPS_WITH_CUDA

}  // namespace moe_ops::adapter
