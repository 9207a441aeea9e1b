#include "moe_ops/grouped_gemm.h"
#include "moe_ops/unpermute.h"
#include "torch/routed_rows.h"
#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

namespace {

DType check_map(const char* op, const Tensor& x, const Tensor& w, const Tensor& topk_ids) {
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
  GroupedGemmParams p;
  p.expert_offsets = routing.offsets.data();
  p.num_experts = E;
  p.out_features = O;
  p.in_features = x.size(1);
  p.a = rows_of(src, type, routing.row_to_token.data());
  p.b = weights.matrices;
  p.bias = bias_rows.vectors;
  p.out = {h.mutable_data_ptr(), type, O, routing.row_to_slot};
  cpu::grouped_gemm(p, torch_parallel());
  zero_empty_slots(routing, p.out.data, O * dtype_size(type));
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
    const DType acc_type = check_float(kOp, "rows", rows);
    GroupedGemmParams p;
    p.expert_offsets = routing.offsets.data();
    p.num_experts = E;
    p.out_features = H;
    p.in_features = O;
    p.a = grad_rows;
    p.b = weights.matrices;
    std::swap(p.b.stride_o, p.b.stride_k);
    p.out = {rows.mutable_data_ptr(), acc_type, H, nullptr};
    cpu::grouped_gemm(p, torch_parallel());
    UnpermuteParams u;
    u.rows = rows.const_data_ptr();
    u.type = acc_type;
    u.row_stride = u.hidden_size = H;
    u.num_tokens = T;
    u.top_k = K;
    u.num_valid_rows = routing.valid();
    u.slot_to_row = routing.slot_to_row;
    u.topk_weights = nullptr;
    u.y = grad_x.mutable_data_ptr();
    u.y_type = type;
    cpu::unpermute(u, torch_parallel());
  }
  if (need_w) {
    GroupedWgradParams p;
    p.expert_offsets = routing.offsets.data();
    p.num_experts = E;
    p.out_features = O;
    p.in_features = H;
    p.grad = grad_rows;
    p.a = rows_of(src, type, routing.row_to_token.data());
    p.out = grad_w.mutable_data_ptr();
    p.out_type = type;
    cpu::grouped_gemm_wgrad(p, torch_parallel());
  }
  if (need_bias) {
    GroupedSumParams p;
    p.expert_offsets = routing.offsets.data();
    p.num_experts = E;
    p.features = O;
    p.rows = grad_rows;
    p.out = grad_bias.mutable_data_ptr();
    p.out_type = type;
    cpu::grouped_sum(p, torch_parallel());
  }
  return {grad_x, grad_w, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) {
  m.impl("moe_linear_map", MOE_BOX(moe_linear_map));
  m.impl("moe_linear_map_bwd", MOE_BOX(moe_linear_map_bwd));
}

}  // namespace moe_ops::adapter
