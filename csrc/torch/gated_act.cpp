#include "moe_ops/gated_act.h"

#include "torch/activation.h"
#include "torch/device.h"
#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

namespace {

// Returns the shape [..., I] for gate_up [..., 2I].
std::vector<int64_t> halved_shape(const Op& op, const Tensor& gate_up) {
  MOE_CHECK(gate_up.dim() >= 1, op, ": gate_up must be [..., 2I], got shape ",
            shape_string(gate_up), ".");
  const auto sizes = gate_up.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  MOE_CHECK(shape.back() % 2 == 0, op,
            ": gate_up must have an even last dimension (gate and up), got shape ",
            shape_string(gate_up), ".");
  shape.back() /= 2;
  return shape;
}

Tensor gated_act(const Tensor& gate_up, std::string activation, bool interleaved, double alpha,
                 double limit) {
  constexpr const char* kOp = "gated_act";
  GatedActParams p;
  p.type = check_float(kOp, "gate_up", gate_up);
  p.act = check_activation(kOp, activation, interleaved, alpha, limit, true);
  const std::vector<int64_t> shape = halved_shape(kOp, gate_up);
  const Tensor src = dense(gate_up);
  Tensor h = empty_cpu(kOp, shape, gate_up.scalar_type());
  p.intermediate_size = shape.back();
  p.num_rows = shape.back() == 0 ? 0 : h.numel() / shape.back();
  p.gate_up = src.const_data_ptr();
  p.h = h.mutable_data_ptr();
  cpu::gated_act(p, torch_parallel());
  return h;
}

void check_grad_h(const Op& op, const Tensor& grad_h, const Tensor& gate_up,
                  const std::vector<int64_t>& shape) {
  check_same_dtype(op, "grad_h", grad_h, "gate_up", gate_up);
  check_dim(op, "grad_h", grad_h, gate_up.dim(), "[..., I]");
  for (int64_t d = 0; d < grad_h.dim(); ++d) {
    check_size(op, "grad_h", grad_h, d, shape[d], d + 1 == grad_h.dim() ? "I" : "gate_up's size");
  }
}

Tensor gated_act_bwd(const Tensor& grad_h, const Tensor& gate_up, std::string activation,
                     bool interleaved, double alpha, double limit) {
  constexpr const char* kOp = "gated_act_bwd";
  GatedActBwdParams p;
  p.type = check_float(kOp, "gate_up", gate_up);
  p.act = check_activation(kOp, activation, interleaved, alpha, limit, true);
  const std::vector<int64_t> shape = halved_shape(kOp, gate_up);
  check_grad_h(kOp, grad_h, gate_up, shape);
  const Tensor src = dense(gate_up);
  const Tensor grad = dense(grad_h);
  const auto sizes = gate_up.sizes();
  Tensor out =
      empty_cpu(kOp, std::vector<int64_t>(sizes.begin(), sizes.end()), gate_up.scalar_type());
  p.intermediate_size = shape.back();
  p.num_rows = shape.back() == 0 ? 0 : grad_h.numel() / shape.back();
  p.grad_h = grad.const_data_ptr();
  p.gate_up = src.const_data_ptr();
  p.grad_gate_up = out.mutable_data_ptr();
  cpu::gated_act_bwd(p, torch_parallel());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) {
  m.impl("gated_act", MOE_BOX(gated_act));
  m.impl("gated_act_bwd", MOE_BOX(gated_act_bwd));
}

#ifdef MOE_OPS_WITH_CUDA

static Tensor gated_act_cuda(const Tensor& gate_up, std::string activation, bool interleaved,
                             double alpha, double limit) {
  const Op op("gated_act", gate_up);
  cuda::GatedActParams p;
  p.type = check_float(op, "gate_up", gate_up);
  p.act = check_activation(op, activation, interleaved, alpha, limit, true);
  const std::vector<int64_t> shape = halved_shape(op, gate_up);
  const Tensor src = dense(gate_up);
  Tensor h = device_empty(gate_up, shape, gate_up.scalar_type());
  p.intermediate_size = shape.back();
  p.num_rows = shape.back() == 0 ? 0 : h.numel() / shape.back();
  p.gate_up = src.const_data_ptr();
  p.h = h.mutable_data_ptr();
  check_status(op, cuda::gated_act(p, current_stream(gate_up)));
  return h;
}

static Tensor gated_act_bwd_cuda(const Tensor& grad_h, const Tensor& gate_up,
                                 std::string activation, bool interleaved, double alpha,
                                 double limit) {
  const Op op("gated_act_bwd", gate_up);
  GatedActBwdParams p;
  p.type = check_float(op, "gate_up", gate_up);
  p.act = check_activation(op, activation, interleaved, alpha, limit, true);
  const std::vector<int64_t> shape = halved_shape(op, gate_up);
  check_grad_h(op, grad_h, gate_up, shape);
  const Tensor src = dense(gate_up);
  const Tensor grad = dense(grad_h);
  const auto sizes = gate_up.sizes();
  Tensor out = device_empty(gate_up, std::vector<int64_t>(sizes.begin(), sizes.end()),
                            gate_up.scalar_type());
  p.intermediate_size = shape.back();
  p.num_rows = shape.back() == 0 ? 0 : grad_h.numel() / shape.back();
  p.grad_h = grad.const_data_ptr();
  p.gate_up = src.const_data_ptr();
  p.grad_gate_up = out.mutable_data_ptr();
  check_status(op, cuda::gated_act_bwd(p, current_stream(gate_up)));
  return out;
}

MOE_CUDA_LIBRARY(m) {
  m.impl("gated_act", MOE_CUDA_BOX(gated_act_cuda));
  m.impl("gated_act_bwd", MOE_CUDA_BOX(gated_act_bwd_cuda));
}

#endif  // MOE_OPS_WITH_CUDA

}  // namespace moe_ops::adapter
