#include "moe_ops/token_cross_entropy.h"

#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

namespace {

constexpr int64_t kIgnored = -100;  // torch's

std::tuple<Tensor, Tensor> token_cross_entropy(const Tensor& logits, const Tensor& targets) {
  constexpr const char* kOp = "token_cross_entropy";
  TokenCrossEntropyParams p;
  p.type = check_float(kOp, "logits", logits);
  check_dim(kOp, "logits", logits, 2, "[T, V]");
  check_index(kOp, "targets", targets);
  check_dim(kOp, "targets", targets, 1, "[T]");
  check_size(kOp, "targets", targets, 0, logits.size(0), "T");
  const int64_t T = logits.size(0), V = logits.size(1);
  const auto at = std::make_unique_for_overwrite<int64_t[]>(static_cast<size_t>(T));
  for_each_index(targets, [&](int64_t t, int64_t target) {
    MOE_CHECK(target == kIgnored || (target >= 0 && target < V), kOp,
              ": targets must hold values from 0 to ", V - 1, ", or -100, got ", target,
              " at position ", t, ".");
    at[t] = target;
  });
  const Tensor src = with_dense_rows(logits);
  Tensor losses = empty_cpu({T}, accumulate_type(logits.scalar_type()));
  Tensor grad = empty_cpu({T, V}, logits.scalar_type());
  p.logits = src.const_data_ptr();
  p.stride = row_stride(src);
  p.num_tokens = T;
  p.vocab = V;
  p.targets = at.get();
  p.losses = losses.mutable_data_ptr();
  p.grad = grad.mutable_data_ptr();
  cpu::token_cross_entropy(p, torch_parallel());
  return {losses, grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) {
  m.impl("token_cross_entropy", MOE_BOX(token_cross_entropy));
}

}  // namespace moe_ops::adapter
