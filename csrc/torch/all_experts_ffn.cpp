#include "moe_ops/all_experts_ffn.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "torch/activation.h"
#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

namespace {

struct Plan {
  AllExpertsFfnSizes size;
  Tensor input_of;
  std::vector<int32_t> order;
};

// Sets the activation, which must not be gated, or none.
void set_activation(const Op& op, const std::string& name, AllExpertsFfnSizes& s) {
  s.has_act = name != "none";
  s.act = Activation::kRelu;
  if (!s.has_act) return;
  for (const auto& [known, kind] : kActivations) {
    if (name != known || is_gated(kind)) continue;
    s.act = kind;
    return;
  }
  fail(op, ": activation must be one of none, silu, gelu, gelu_tanh, relu, relu2, got '", name,
       "'.");
}

Plan plan_of(const Op& op, const Tensor& x, const Tensor& w_up, const Tensor& w_down,
             const Tensor& input_ids, const std::string& activation) {
  Plan plan;
  AllExpertsFfnSizes& s = plan.size;
  s.type = check_float(op, "x", x);
  check_dim(op, "x", x, 3, "[T, G, H]");
  check_same_dtype(op, "w_up", w_up, "x", x);
  check_dim(op, "w_up", w_up, 3, "[E, I, H]");
  check_num_experts(op, w_up.size(0));
  check_size(op, "w_up", w_up, 2, x.size(2), "H");
  check_same_dtype(op, "w_down", w_down, "x", x);
  check_dim(op, "w_down", w_down, 3, "[E, O, I]");
  check_size(op, "w_down", w_down, 0, w_up.size(0), "E");
  check_size(op, "w_down", w_down, 2, w_up.size(1), "I");
  check_index(op, "input_ids", input_ids);
  check_dim(op, "input_ids", input_ids, 1, "[E]");
  check_size(op, "input_ids", input_ids, 0, w_up.size(0), "E");
  set_activation(op, activation, s);
  s.num_tokens = x.size(0);
  s.num_inputs = x.size(1);
  s.hidden_size = x.size(2);
  s.num_experts = w_up.size(0);
  s.intermediate_size = w_up.size(1);
  s.out_size = w_down.size(1);
  plan.input_of = checked_map(op, "input_ids", input_ids, s.num_inputs);
  const int32_t* input_of = int32_data(plan.input_of);
  plan.order.resize(static_cast<size_t>(s.num_experts));
  std::iota(plan.order.begin(), plan.order.end(), 0);
  std::sort(plan.order.begin(), plan.order.end(), [&](int32_t a, int32_t b) {
    return std::pair(input_of[a], a) < std::pair(input_of[b], b);
  });
  s.input_of = input_of;
  s.order = plan.order.data();
  return plan;
}

void check_bias(const Op& op, const char* name, const OptTensor& bias, const Tensor& x,
                int64_t experts, int64_t features, const char* shape) {
  if (!bias.has_value()) return;
  check_same_dtype(op, name, *bias, "x", x);
  check_dim(op, name, *bias, 2, shape);
  check_size(op, name, *bias, 0, experts, "E");
  check_size(op, name, *bias, 1, features, "its expert's features");
}

// Arguments of a forward call.
struct Inputs {
  const Tensor& x;          // [T, G, H]
  const Tensor& w_up;       // [E, I, H]
  const Tensor& w_down;     // [E, O, I]
  const Tensor& input_ids;  // [E]
  const OptTensor& b_up;    // [E, I] or none
  const OptTensor& b_down;  // [E, O] or none
  const std::string& activation;
};

// Runs the forward. preact: kept for a backward; nullptr in inference.
Tensor forward(const Op& op, const Inputs& in, Tensor* preact) {
  const auto& [x, w_up, w_down, input_ids, b_up, b_down, activation] = in;
  const Plan plan = plan_of(op, x, w_up, w_down, input_ids, activation);
  const AllExpertsFfnSizes& s = plan.size;
  check_bias(op, "b_up", b_up, x, s.num_experts, s.intermediate_size, "[E, I]");
  check_bias(op, "b_down", b_down, x, s.num_experts, s.out_size, "[E, O]");
  const Tensor dense_x = dense(x), up = dense(w_up), down = dense(w_down);
  const OptTensor bias_up = contiguous_as(b_up, x.scalar_type());
  const OptTensor bias_down = contiguous_as(b_down, x.scalar_type());
  Tensor y = empty_cpu(op, {s.num_tokens, s.num_experts, s.out_size}, x.scalar_type());
  AllExpertsFfnParams p;
  p.size = s;
  p.x = dense_x.const_data_ptr();
  p.w_up = up.const_data_ptr();
  p.w_down = down.const_data_ptr();
  p.b_up = bias_up.has_value() ? bias_up->const_data_ptr() : nullptr;
  p.b_down = bias_down.has_value() ? bias_down->const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  p.preact = preact == nullptr ? nullptr : preact->mutable_data_ptr();
  cpu::all_experts_ffn(p, torch_parallel());
  return y;
}

Tensor all_experts_ffn(const Tensor& x, const Tensor& w_up, const Tensor& w_down,
                       const Tensor& input_ids, const OptTensor& b_up, const OptTensor& b_down,
                       std::string activation) {
  return forward("all_experts_ffn", {x, w_up, w_down, input_ids, b_up, b_down, activation},
                 nullptr);
}

std::tuple<Tensor, Tensor> all_experts_ffn_fwd(const Tensor& x, const Tensor& w_up,
                                               const Tensor& w_down, const Tensor& input_ids,
                                               const OptTensor& b_up, const OptTensor& b_down,
                                               std::string activation) {
  constexpr const char* kOp = "all_experts_ffn";
  plan_of(kOp, x, w_up, w_down, input_ids, activation);  // checks before memory
  Tensor preact =
      empty_cpu(kOp, {w_up.size(0), x.size(0), w_up.size(1)}, accumulate_type(x.scalar_type()));
  Tensor y = forward(kOp, {x, w_up, w_down, input_ids, b_up, b_down, activation}, &preact);
  return {y, preact};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> all_experts_ffn_bwd(
    const Tensor& grad_y, const Tensor& x, const Tensor& w_up, const Tensor& w_down,
    const Tensor& input_ids, const Tensor& preact, std::string activation, bool need_x,
    bool need_w_up, bool need_w_down, bool need_b_up, bool need_b_down) {
  constexpr const char* kOp = "all_experts_ffn_bwd";
  const Plan plan = plan_of(kOp, x, w_up, w_down, input_ids, activation);
  const AllExpertsFfnSizes& s = plan.size;
  const int64_t E = s.num_experts, I = s.intermediate_size, O = s.out_size;
  check_same_dtype(kOp, "grad_y", grad_y, "x", x);
  check_dim(kOp, "grad_y", grad_y, 3, "[T, E, O]");
  check_size(kOp, "grad_y", grad_y, 0, s.num_tokens, "T");
  check_size(kOp, "grad_y", grad_y, 1, E, "E");
  check_size(kOp, "grad_y", grad_y, 2, O, "O");
  const ScalarType dtype = x.scalar_type();
  check_float(kOp, "preact", preact);
  MOE_CHECK(preact.scalar_type() == accumulate_type(dtype), kOp, ": preact must be ",
            dtype_name(accumulate_type(dtype)), ", got ", dtype_name(preact.scalar_type()), ".");
  check_dim(kOp, "preact", preact, 3, "[E, T, I]");
  check_size(kOp, "preact", preact, 0, E, "E");
  check_size(kOp, "preact", preact, 1, s.num_tokens, "T");
  check_size(kOp, "preact", preact, 2, I, "I");
  const Tensor grad = dense(grad_y), dense_x = dense(x), up = dense(w_up), down = dense(w_down);
  const Tensor u = dense(preact);
  const auto made = [&](bool wanted, std::initializer_list<int64_t> shape) {
    return wanted ? empty_cpu(kOp, shape, dtype) : empty_cpu(kOp, {0}, dtype);
  };
  Tensor grad_x = made(need_x, {s.num_tokens, s.num_inputs, s.hidden_size});
  Tensor grad_up = made(need_w_up, {E, I, s.hidden_size});
  Tensor grad_down = made(need_w_down, {E, O, I});
  Tensor grad_b_up = made(need_b_up, {E, I});
  Tensor grad_b_down = made(need_b_down, {E, O});
  const auto out = [](bool wanted, Tensor& t) { return wanted ? t.mutable_data_ptr() : nullptr; };
  AllExpertsFfnBwdParams p;
  p.size = s;
  p.grad_y = grad.const_data_ptr();
  p.x = dense_x.const_data_ptr();
  p.w_up = up.const_data_ptr();
  p.w_down = down.const_data_ptr();
  p.preact = u.const_data_ptr();
  p.grad_x = out(need_x, grad_x);
  p.grad_w_up = out(need_w_up, grad_up);
  p.grad_w_down = out(need_w_down, grad_down);
  p.grad_b_up = out(need_b_up, grad_b_up);
  p.grad_b_down = out(need_b_down, grad_b_down);
  cpu::all_experts_ffn_bwd(p, torch_parallel());
  return {grad_x, grad_up, grad_down, grad_b_up, grad_b_down};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) {
  m.impl("all_experts_ffn", MOE_BOX(all_experts_ffn));
  m.impl("all_experts_ffn_fwd", MOE_BOX(all_experts_ffn_fwd));
  m.impl("all_experts_ffn_bwd", MOE_BOX(all_experts_ffn_bwd));
}

}  // namespace moe_ops::adapter
