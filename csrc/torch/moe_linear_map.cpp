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

Tensor moe_linear_map(const Tensor& x, const Tensor& w, const Tensor& topk_ids,
                      const OptTensor& bias) {
  constexpr const char* kOp = "moe_linear_map";
  const DType type = check_map(kOp, x, w, topk_ids);
  const int64_t E = w.size(0), O = w.size(1);
  if (bias.has_value()) {
    check_same_dtype(kOp, "bias", *bias, "x", x);
    check_dim(kOp, "bias", *bias, 2, "[E, O]");
    check_size(kOp, "bias", *bias, 0, E, "E");
    check_size(kOp, "bias", *bias, 1, O, "O");
  }
  const RoutedRows routing = routed_rows(kOp, topk_ids, E);
  const Tensor src = with_dense_rows(x);
  const Weights weights = weights_of(w, type);
  const Bias bias_rows = bias_of(bias, type);
  Tensor h = empty_cpu({x.size(0), topk_ids.size(1), O}, x.scalar_type());
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
  const int64_t T = x.size(0), H = x.size(1), E = w.size(0), O = w.size(1), K = topk_ids.size(1);
  check_same_dtype(kOp, "grad_h", grad_h, "x", x);
  check_dim(kOp, "grad_h", grad_h, 3, "[T, K, O]");
  check_size(kOp, "grad_h", grad_h, 0, T, "T");
  check_size(kOp, "grad_h", grad_h, 1, K, "K");
  check_size(kOp, "grad_h", grad_h, 2, O, "O");
  const RoutedRows routing = routed_rows(kOp, topk_ids, E);
  const ScalarType dtype = x.scalar_type(), acc = accumulate_type(dtype);
  const Tensor src = with_dense_rows(x);
  const Tensor grad = dense(grad_h);
  const Rows grad_rows = {grad.const_data_ptr(), type, O, routing.row_to_slot};
  Tensor grad_x = need_x ? empty_cpu({T, H}, dtype) : empty_cpu({0}, dtype);
  Tensor grad_w = need_w ? empty_cpu({E, O, H}, dtype) : empty_cpu({0}, dtype);
  Tensor grad_bias = need_bias ? empty_cpu({E, O}, dtype) : empty_cpu({0}, dtype);
  if (need_x) {
    const Weights weights = weights_of(w, type);
    const Tensor rows = empty_cpu({routing.valid(), H}, acc);
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

}  // namespace moe_ops::adapter
