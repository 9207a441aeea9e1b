// Products of routed rows and what is summed over them, for the ops that are a sequence of
// launches: moe_ffn, moe_linear_map, moe_linear_reduce.
#pragma once

#include "moe_ops/grouped_gemm.h"
#include "moe_ops/routing.h"
#include "moe_ops/unpermute.h"

namespace moe_ops::cuda {

// Hands out parts of a workspace, or only counts its bytes.
class Workspace {
 public:
  explicit Workspace(void* base = nullptr) : base_(static_cast<char*>(base)) {}
  void* take(int64_t elements, DType type) {
    void* const part = base_ == nullptr ? nullptr : base_ + used_;
    used_ += round_up<int64_t>(elements * dtype_size(type), 256);
    return part;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Return rows in the permuted order: rows [T, features] of tokens, rows [T, K, features] of slots,
// and rows [N, features] that are already in that order.
inline DeviceRows by_token(const Routing& r, const Rows& rows) {
  return {rows.data,   rows.type, rows.stride, r.row_to_slot, static_cast<int32_t>(r.top_k),
          r.num_tokens};
}
inline DeviceRows by_slot(const Routing& r, const void* data, DType type, int64_t features) {
  return {data, type, features, r.row_to_slot, 1, r.num_slots()};
}
inline MutableDeviceRows to_slot(const Routing& r, void* data, DType type, int64_t features) {
  return {data, type, features, r.row_to_slot, 1, r.num_slots()};
}
inline DeviceRows by_row(const Routing& r, const void* data, DType type, int64_t features) {
  return {data, type, features, nullptr, 1, r.num_slots()};
}
inline MutableDeviceRows to_row(const Routing& r, void* data, DType type, int64_t features) {
  return {data, type, features, nullptr, 1, r.num_slots()};
}
// topk_weights: [T, K] in the accumulate type.
inline RowScale routing_scale(const Routing& r, const void* topk_weights) {
  return {topk_weights, r.row_to_slot, r.num_slots()};
}

// Returns the parameters of out = b a.
inline GroupedGemmParams product(const Routing& r, const DeviceRows& a, const ExpertMatrices& b,
                                 int64_t out_features, int64_t in_features,
                                 const MutableDeviceRows& out) {
  GroupedGemmParams g;
  g.expert_offsets = r.expert_offsets;
  g.num_experts = r.num_experts;
  g.num_rows = r.num_slots();
  g.out_features = out_features;
  g.in_features = in_features;
  g.a = a;
  g.b = b;
  g.out = out;
  return g;
}

// Computes y [T, features] of type y_type: the sum of each token's rows [N, features], weighted by
// topk_weights unless nullptr.
inline Status combine(const Routing& r, const void* rows, DType type, int64_t features,
                      const void* topk_weights, void* y, DType y_type, Stream stream) {
  UnpermuteParams u{};
  u.rows = rows;
  u.type = type;
  u.y_type = y_type;
  u.row_stride = u.hidden_size = features;
  u.num_tokens = r.num_tokens;
  u.top_k = r.top_k;
  u.num_rows = r.num_slots();
  u.expert_offsets = r.expert_offsets;
  u.num_experts = r.num_experts;
  u.slot_to_row = {r.slot_to_row, false};
  u.topk_weights = topk_weights;
  u.y = y;
  return unpermute(u, stream);
}

// Where the gradient of matrices [E, out_features, in_features] goes; nowhere with nullptr.
struct WeightGradient {
  void* data;
  DType type;
  bool accumulate = false;  // add to what is there
  bool transposed = false;  // [E, in_features, out_features]
};

// Computes a weight gradient. scale: factors of the rows of either operand.
inline Status weight_gradient(const Routing& r, const DeviceRows& grad, int64_t out_features,
                              const DeviceRows& a, int64_t in_features, const RowScale& scale,
                              WeightGradient out, Stream stream) {
  if (out.data == nullptr) return 0;
  if (out.transposed) {  // the product of the same operands in the other order
    out.transposed = false;
    return weight_gradient(r, a, in_features, grad, out_features, scale, out, stream);
  }
  GroupedWgradParams w;
  w.expert_offsets = r.expert_offsets;
  w.num_experts = r.num_experts;
  w.num_rows = r.num_slots();
  w.out_features = out_features;
  w.in_features = in_features;
  w.grad = grad;
  w.grad_scale = scale;
  w.a = a;
  w.out = out.data;
  w.out_type = out.type;
  w.accumulate = out.accumulate;
  return grouped_gemm_wgrad(w, stream);
}

// Computes the gradient of biases [E, features] unless `out` is nullptr.
inline Status bias_gradient(const Routing& r, const DeviceRows& grad, int64_t features,
                            const RowScale& scale, void* out, Stream stream) {
  if (out == nullptr) return 0;
  GroupedSumParams b;
  b.expert_offsets = r.expert_offsets;
  b.num_experts = r.num_experts;
  b.num_rows = r.num_slots();
  b.features = features;
  b.rows = grad;
  b.scale = scale;
  b.out = out;
  b.out_type = grad.type;
  return grouped_sum(b, stream);
}

}  // namespace moe_ops::cuda
