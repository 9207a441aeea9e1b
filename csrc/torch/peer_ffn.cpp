#include "moe_ops/peer_ffn.h"

#include "torch/activation.h"
#include "torch/device.h"
#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

namespace {

// Vectors along `dim` of a table are dense; a copy where they are not.
Tensor with_dense_vectors(const Tensor& t, int64_t dim) {
  return t.size(dim) <= 1 || t.stride(dim) == 1 ? aligned(t) : contiguous_copy(t);
}

// The operands of a call as kernels take them, and what keeps their memory alive.
struct PeerFfn {
  SlotIds slots;
  Tensor x, w_gate_up, w_down, topk_weights;
  PeerFfnDesc desc;
  ScalarType dtype, acc;
  int64_t T, K, E, G, H;
};

PeerFfn checked(const Op& op, const Tensor& x, const Tensor& w_gate_up, const Tensor& w_down,
                const Tensor& topk_weights, const Tensor& topk_ids, const std::string& activation) {
  const DType type = check_float(op, "x", x);
  check_dim(op, "x", x, 2, "[T, H]");
  const int64_t T = x.size(0), H = x.size(1);
  const Activation act = check_activation(op, activation, false, 1.702, 7.0, false).kind;
  check_same_dtype(op, "w_gate_up", w_gate_up, "x", x);
  check_dim(op, "w_gate_up", w_gate_up, 3, "[E, G, H]");
  const int64_t E = w_gate_up.size(0), G = is_gated(act) ? 2 : 1;
  check_num_experts(op, E);
  check_size(op, "w_gate_up", w_gate_up, 1, G, is_gated(act) ? "gate and up" : "one vector");
  check_size(op, "w_gate_up", w_gate_up, 2, H, "H");
  check_same_dtype(op, "w_down", w_down, "x", x);
  check_dim(op, "w_down", w_down, 3, "[E, H, 1]");
  check_size(op, "w_down", w_down, 0, E, "E");
  check_size(op, "w_down", w_down, 1, H, "H");
  check_size(op, "w_down", w_down, 2, 1, "one neuron");
  check_index(op, "topk_ids", topk_ids);
  check_dim(op, "topk_ids", topk_ids, 2, "[T, K]");
  check_size(op, "topk_ids", topk_ids, 0, T, "T");
  check_float(op, "topk_weights", topk_weights);
  check_dim(op, "topk_weights", topk_weights, 2, "[T, K]");
  check_size(op, "topk_weights", topk_weights, 0, T, "T");
  check_size(op, "topk_weights", topk_weights, 1, topk_ids.size(1), "K");
  const ScalarType acc = accumulate_type(x.scalar_type());
  PeerFfn c{slot_ids(op, topk_ids, E),
            with_dense_rows(x),
            with_dense_vectors(w_gate_up, 2),
            with_dense_vectors(w_down, 1),
            contiguous_as(topk_weights, acc),
            {},
            x.scalar_type(),
            acc,
            T,
            topk_ids.size(1),
            E,
            G,
            H};
  c.desc = {type,
            act,
            c.slots.routing,
            H,
            {c.w_gate_up.const_data_ptr(), c.w_gate_up.stride(0), c.w_gate_up.stride(1)},
            {c.w_down.const_data_ptr(), c.w_down.stride(0), 0},
            c.topk_weights.const_data_ptr(),
            rows_of(c.x, type)};
  return c;
}

// grad_ids [T, K]: the row of the tables' gradients, of num_rows, that a slot adds to.
struct PeerFfnGrads {
  Tensor grad_y, preact;
  SlotIds rows;
};

PeerFfnGrads checked_grads(const Op& op, const PeerFfn& c, const Tensor& grad_y, const Tensor& x,
                           const Tensor& preact, const OptTensor& grad_ids, int64_t num_rows) {
  check_same_dtype(op, "grad_y", grad_y, "x", x);
  check_dim(op, "grad_y", grad_y, 2, "[T, H]");
  check_size(op, "grad_y", grad_y, 0, c.T, "T");
  check_size(op, "grad_y", grad_y, 1, c.H, "H");
  check_float(op, "preact", preact);
  MOE_CHECK(preact.scalar_type() == c.acc, op, ": preact must be ", dtype_name(c.acc), ", got ",
            dtype_name(preact.scalar_type()), ".");
  check_dim(op, "preact", preact, 3, "[T, G, K]");
  check_size(op, "preact", preact, 0, c.T, "T");
  check_size(op, "preact", preact, 1, c.G, "G");
  check_size(op, "preact", preact, 2, c.K, "K");
  if (grad_ids.has_value()) {
    check_index(op, "grad_ids", *grad_ids);
    check_dim(op, "grad_ids", *grad_ids, 2, "[T, K]");
    check_size(op, "grad_ids", *grad_ids, 0, c.T, "T");
    check_size(op, "grad_ids", *grad_ids, 1, c.K, "K");
    MOE_CHECK(num_rows >= 0 && num_rows <= c.E, op, ": num_rows must be in [0, ", c.E, "], got ",
              num_rows, ".");
  } else {
    MOE_CHECK(num_rows == c.E, op, ": num_rows must be E = ", c.E, " without grad_ids, got ",
              num_rows, ".");
  }
  PeerFfnGrads g{with_dense_rows(grad_y), dense(preact), c.slots};
  if (grad_ids.has_value()) {
    g.rows = slot_ids(op, *grad_ids, std::max<int64_t>(num_rows, 1));
    g.rows.routing.num_experts = num_rows;
  }
  return g;
}

Tensor forward(const Op& op, const PeerFfn& c, void* preact) {
  Tensor y = empty_cpu(op, {c.T, c.H}, c.dtype);
  cpu::peer_ffn({c.desc, y.mutable_data_ptr(), preact}, torch_parallel());
  return y;
}

Tensor peer_ffn(const Tensor& x, const Tensor& w_gate_up, const Tensor& w_down,
                const Tensor& topk_weights, const Tensor& topk_ids, std::string activation, bool) {
  const Op op("peer_ffn");
  return forward(op, checked(op, x, w_gate_up, w_down, topk_weights, topk_ids, activation),
                 nullptr);
}

std::tuple<Tensor, Tensor> peer_ffn_fwd(const Tensor& x, const Tensor& w_gate_up,
                                        const Tensor& w_down, const Tensor& topk_weights,
                                        const Tensor& topk_ids, std::string activation, bool) {
  const Op op("peer_ffn");
  const PeerFfn c = checked(op, x, w_gate_up, w_down, topk_weights, topk_ids, activation);
  Tensor preact = empty_cpu(op, {c.T, c.G, c.K}, c.acc);
  Tensor y = forward(op, c, preact.mutable_data_ptr());
  return {y, preact};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Gradients peer_ffn_bwd(const Tensor& grad_y, const Tensor& x, const Tensor& w_gate_up,
                       const Tensor& w_down, const Tensor& topk_weights, const Tensor& topk_ids,
                       const Tensor& preact, const OptTensor& grad_ids, std::string activation,
                       int64_t num_rows, bool need_x, bool need_w_gate_up, bool need_w_down,
                       bool need_topk_weights) {
  const Op op("peer_ffn_bwd");
  const PeerFfn c = checked(op, x, w_gate_up, w_down, topk_weights, topk_ids, activation);
  const PeerFfnGrads g = checked_grads(op, c, grad_y, x, preact, grad_ids, num_rows);
  Tensor grad_x = empty_cpu_if(need_x, op, {c.T, c.H}, c.dtype);
  Tensor grad_gate_up = empty_cpu_if(need_w_gate_up, op, {num_rows, c.G, c.H}, c.dtype);
  Tensor grad_down = empty_cpu_if(need_w_down, op, {num_rows, c.H, 1}, c.dtype);
  Tensor grad_weights = empty_cpu_if(need_topk_weights, op, {c.T, c.K}, c.acc);
  cpu::peer_ffn_bwd({c.desc, rows_of(g.grad_y, c.desc.type), g.preact.const_data_ptr(),
                     g.rows.routing, data_if(need_x, grad_x), data_if(need_w_gate_up, grad_gate_up),
                     data_if(need_w_down, grad_down), data_if(need_topk_weights, grad_weights)},
                    torch_parallel());
  return {grad_x, grad_gate_up, grad_down, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) {
  m.impl("peer_ffn", MOE_BOX(peer_ffn));
  m.impl("peer_ffn_fwd", MOE_BOX(peer_ffn_fwd));
  m.impl("peer_ffn_bwd", MOE_BOX(peer_ffn_bwd));
}

#ifdef MOE_OPS_WITH_CUDA

namespace {

std::tuple<Tensor, Tensor> run_on_device(const Op& op, const Tensor& x, const Tensor& w_gate_up,
                                         const Tensor& w_down, const Tensor& topk_weights,
                                         const Tensor& topk_ids, const std::string& activation) {
  const PeerFfn c = checked(op, x, w_gate_up, w_down, topk_weights, topk_ids, activation);
  Tensor y = device_empty(x, {c.T, c.H}, c.dtype);
  Tensor preact = device_empty(x, {c.T, c.G, c.K}, c.acc);
  Tensor factors = device_empty(x, {c.T, c.K}, c.acc);
  check_status(op, cuda::peer_ffn({c.desc, y.mutable_data_ptr(), preact.mutable_data_ptr(),
                                   factors.mutable_data_ptr()},
                                  current_stream(x)));
  return {y, preact};
}

Tensor peer_ffn_cuda(const Tensor& x, const Tensor& w_gate_up, const Tensor& w_down,
                     const Tensor& topk_weights, const Tensor& topk_ids, std::string activation,
                     bool) {
  const Op op("peer_ffn", x);
  return std::get<0>(run_on_device(op, x, w_gate_up, w_down, topk_weights, topk_ids, activation));
}

std::tuple<Tensor, Tensor> peer_ffn_fwd_cuda(const Tensor& x, const Tensor& w_gate_up,
                                             const Tensor& w_down, const Tensor& topk_weights,
                                             const Tensor& topk_ids, std::string activation, bool) {
  const Op op("peer_ffn", x);
  return run_on_device(op, x, w_gate_up, w_down, topk_weights, topk_ids, activation);
}

Gradients peer_ffn_bwd_cuda(const Tensor& grad_y, const Tensor& x, const Tensor& w_gate_up,
                            const Tensor& w_down, const Tensor& topk_weights,
                            const Tensor& topk_ids, const Tensor& preact, const OptTensor& grad_ids,
                            std::string activation, int64_t num_rows, bool need_x,
                            bool need_w_gate_up, bool need_w_down, bool need_topk_weights) {
  const Op op("peer_ffn_bwd", x);
  const PeerFfn c = checked(op, x, w_gate_up, w_down, topk_weights, topk_ids, activation);
  const PeerFfnGrads g = checked_grads(op, c, grad_y, x, preact, grad_ids, num_rows);
  Tensor grad_x = device_empty_if(need_x, x, {c.T, c.H}, c.dtype);
  Tensor grad_gate_up = device_empty_if(need_w_gate_up, x, {num_rows, c.G, c.H}, c.dtype);
  Tensor grad_down = device_empty_if(need_w_down, x, {num_rows, c.H, 1}, c.dtype);
  Tensor grad_weights = device_empty_if(need_topk_weights, x, {c.T, c.K}, c.acc);
  Tensor factors = device_empty(x, {c.T, c.G + 1, c.K}, c.acc);
  PeerFfnBwdParams p{c.desc,
                     rows_of(g.grad_y, c.desc.type),
                     g.preact.const_data_ptr(),
                     {},
                     data_if(need_x, grad_x),
                     data_if(need_w_gate_up, grad_gate_up),
                     data_if(need_w_down, grad_down),
                     data_if(need_topk_weights, grad_weights),
                     factors.mutable_data_ptr()};
  std::optional<SortedSlots> sorted;
  if ((need_w_gate_up || need_w_down) && num_rows > 0) {
    sorted = device_sorted_slots(op, g.rows.topk_ids, num_rows);
    p.rows = sorted->routing;
  }
  check_status(op, cuda::peer_ffn_bwd(p, current_stream(x)));
  return {grad_x, grad_gate_up, grad_down, grad_weights};
}

}  // namespace

MOE_CUDA_LIBRARY(m) {
  m.impl("peer_ffn", MOE_CUDA_BOX(peer_ffn_cuda));
  m.impl("peer_ffn_fwd", MOE_CUDA_BOX(peer_ffn_fwd_cuda));
  m.impl("peer_ffn_bwd", MOE_CUDA_BOX(peer_ffn_bwd_cuda));
}

#endif  // MOE_OPS_WITH_CUDA

}  // namespace moe_ops::adapter
