// moe_linear_map as a sequence of launches: a product whose rows are read by token and written by
// slot. Its backward multiplies by slot and sums a token's rows.
#include "cuda/check.h"
#include "cuda/routed_rows.h"
#include "moe_ops/moe_linear_map.h"

namespace moe_ops::cuda {

int64_t moe_linear_map_bwd_workspace(const MoeLinearMapBwdParams& p) {
  Workspace w;
  if (p.grad_x != nullptr) w.take(p.routing.num_slots() * p.in_features, p.x.type);
  return w.used();
}

Status moe_linear_map(const MoeLinearMapParams& p, Stream stream) {
  const Routing& r = p.routing;
  GroupedGemmParams g = product(r, by_token(r, p.x), p.w, p.out_features, p.in_features,
                                to_slot(r, p.h, p.x.type, p.out_features));
  g.bias = p.bias;
  return grouped_gemm(g, stream);
}

Status moe_linear_map_bwd(const MoeLinearMapBwdParams& p, Stream stream) {
  const Routing& r = p.routing;
  const DType type = p.x.type;
  const int64_t O = p.out_features, H = p.in_features;
  const DeviceRows grad = by_slot(r, p.grad_h, type, O);
  if (p.grad_x != nullptr) {
    void* const rows = Workspace(p.workspace).take(r.num_slots() * H, type);
    GroupedGemmParams g = product(r, grad, transposed(p.w), H, O, to_row(r, rows, type, H));
    g.zero_tail = false;  // Nobody reads rows without an expert.
    MOE_TRY(grouped_gemm(g, stream));
    MOE_TRY(combine(r, rows, type, H, nullptr, p.grad_x, type, stream));
  }
  MOE_TRY(weight_gradient(r, grad, O, by_token(r, p.x), H, {}, {p.grad_w, type}, stream));
  return bias_gradient(r, grad, O, {}, p.grad_bias, stream);
}

}  // namespace moe_ops::cuda
