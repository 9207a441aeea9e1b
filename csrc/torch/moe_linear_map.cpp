#include "moe_ops/moe_linear_map.h"

#include "torch/routed_rows.h"
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

Tensor moe_linear_map(const Tensor& x, const Tensor& w, const Tensor& topk_ids,
                      const OptTensor& bias) {
  constexpr const char* kOp = "moe_linear_map";
  const DType type = check_map(kOp, x, w, topk_ids);
  check_bias(kOp, bias, x, w);
  const int64_t E = w.size(0), O = w.size(1);
  const Tensor src = with_dense_rows(x);
  const Weights weights = weights_of(w, type);
  const Bias bias_rows = bias_of(bias, type);
  Tensor h = empty_cpu(kOp, {x.size(0), topk_ids.size(1), O}, x.scalar_type());
  SlotProduct product = slot_product(topk_ids, w);
  if (cpu::takes_slot_product(product, type)) {
    const std::vector<int32_t> ids = normalized_ids(topk_ids, E);
    product.ids = ids.data();
    cpu::moe_linear_map(
        {product, rows_of(src, type), weights.matrices, bias_rows.vectors, h.mutable_data_ptr()},
        torch_parallel());
    return h;
  }
  const RoutedRows routing = routed_rows(kOp, topk_ids, E);
  const MutableRows out = {h.mutable_data_ptr(), type, O, routing.row_to_slot};
  multiply_rows(routing, rows_of(src, type, routing.row_to_token.data()), weights.matrices,
                bias_rows.vectors, O, x.size(1), out);
  zero_empty_slots(routing, out.data, O * dtype_size(type));
  return h;
}

std::tuple<Tensor, Tensor, Tensor> moe_linear_map_bwd(const Tensor& grad_h, const Tensor& x,
                                                      const Tensor& w, const Tensor& topk_ids,
                                                      bool need_x, bool need_w, bool need_bias) {
  constexpr const char* kOp = "moe_linear_map_bwd";
  const DType type = check_map(kOp, x, w, topk_ids);
  check_grad_h(kOp, grad_h, x, w, topk_ids);
  const int64_t T = x.size(0), H = x.size(1), E = w.size(0), O = w.size(1);
  const ScalarType dtype = x.scalar_type(), acc = accumulate_type(dtype);
  const Tensor src = with_dense_rows(x);
  const Tensor grad = dense(grad_h);
  Tensor grad_x = need_x ? empty_cpu(kOp, {T, H}, dtype) : empty_cpu(kOp, {0}, dtype);
  Tensor grad_w = need_w ? empty_cpu(kOp, {E, O, H}, dtype) : empty_cpu(kOp, {0}, dtype);
  Tensor grad_bias = need_bias ? empty_cpu(kOp, {E, O}, dtype) : empty_cpu(kOp, {0}, dtype);
  SlotProduct product = slot_product(topk_ids, w);
  if (cpu::takes_slot_product(product, type)) {
    const std::vector<int32_t> ids = normalized_ids(topk_ids, E);
    product.ids = ids.data();
    const Weights weights = weights_of(w, type);
    cpu::moe_linear_map_bwd(
        {product, grad.const_data_ptr(), rows_of(src, type), weights.matrices,
         data_if(need_x, grad_x), data_if(need_w, grad_w), data_if(need_bias, grad_bias)},
        torch_parallel());
    return {grad_x, grad_w, grad_bias};
  }
  const RoutedRows routing = routed_rows(kOp, topk_ids, E);
  const Rows grad_rows = {grad.const_data_ptr(), type, O, routing.row_to_slot};
  if (need_x) {
    const Weights weights = weights_of(w, type);
    const Tensor rows = empty_cpu(kOp, {routing.valid(), H}, acc);
    multiply_rows(routing, grad_rows, transposed(weights.matrices), {}, H, O,
                  {rows.mutable_data_ptr(), accumulate_type(type), H, nullptr});
    sum_slots(routing, rows, nullptr, grad_x, type);
  }
  if (need_w) {
    weight_gradient(routing, grad_rows, nullptr, rows_of(src, type, routing.row_to_token.data()),
                    grad_w, type);
  }
  if (need_bias) bias_gradient(routing, grad_rows, nullptr, grad_bias, type);
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
  const int64_t O = w.size(1);
  const DeviceRouting routing = device_routing(op, topk_ids, w.size(0));
  const Tensor src = with_dense_rows(x);
  const Weights weights = weights_of(w, type);
  const Bias bias_rows = bias_of(bias, type);
  Tensor h = device_empty(x, {x.size(0), topk_ids.size(1), O}, x.scalar_type());
  check_status(op, cuda::grouped_gemm(
                       device_product(routing, routing.by_token(src, type), weights.matrices,
                                      bias_rows.vectors, O, x.size(1), routing.by_slot(h, type)),
                       current_stream(x)));
  return h;
}

std::tuple<Tensor, Tensor, Tensor> moe_linear_map_bwd_cuda(const Tensor& grad_h, const Tensor& x,
                                                           const Tensor& w, const Tensor& topk_ids,
                                                           bool need_x, bool need_w,
                                                           bool need_bias) {
  const Op op("moe_linear_map_bwd", x);
  const DType type = check_map(op, x, w, topk_ids);
  check_grad_h(op, grad_h, x, w, topk_ids);
  const int64_t T = x.size(0), H = x.size(1), E = w.size(0), O = w.size(1);
  const DeviceRouting routing = device_routing(op, topk_ids, E);
  const ScalarType dtype = x.scalar_type();
  const Tensor src = with_dense_rows(x);
  const Tensor grad = dense(grad_h);
  const cuda::DeviceRows grad_rows = routing.by_slot(grad, type);
  Tensor grad_x = need_x ? device_empty(x, {T, H}, dtype) : device_empty(x, {0}, dtype);
  Tensor grad_w = need_w ? device_empty(x, {E, O, H}, dtype) : device_empty(x, {0}, dtype);
  Tensor grad_bias = need_bias ? device_empty(x, {E, O}, dtype) : device_empty(x, {0}, dtype);
  if (need_x) {
    const Weights weights = weights_of(w, type);
    Tensor rows = device_empty(x, {routing.num_rows, H}, dtype);
    cuda::GroupedGemmParams p = device_product(routing, grad_rows, transposed(weights.matrices), {},
                                               H, O, mutable_device_rows(rows, type));
    p.zero_tail = false;
    check_status(op, cuda::grouped_gemm(p, current_stream(x)));
    device_sum_slots(op, routing, rows, nullptr, grad_x, type);
  }
  if (need_w) {
    device_weight_gradient(op, routing, grad_rows, {}, routing.by_token(src, type), grad_w);
  }
  if (need_bias) device_bias_gradient(op, routing, grad_rows, {}, grad_bias);
  return {grad_x, grad_w, grad_bias};
}

}  // namespace

MOE_CUDA_LIBRARY(m) {
  m.impl("moe_linear_map", MOE_CUDA_BOX(moe_linear_map_cuda));
  m.impl("moe_linear_map_bwd", MOE_CUDA_BOX(moe_linear_map_bwd_cuda));
}

#endif  // MOE_OPS_WITH_CUDA

}  // namespace moe_ops::adapter
