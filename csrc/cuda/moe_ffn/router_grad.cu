// A warp a row: the column tiles' shares of <h, u>, and the bias' share.
#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/moe_ffn/stages.h"
#include "cuda/row_experts.cuh"
#include "cuda/rows.cuh"

namespace moe_ops::cuda {

namespace {

template <class S>
__global__ void ffn_router_grad_kernel(const FfnRouterGradParams p) {
  const int64_t r = warp_row();
  if (r >= p.num_rows) return;
  const int lane = lane_id();
  const int64_t slot = p.row_to_slot[r];
  if (slot < 0 || slot >= p.num_rows) return;
  float sum = 0.f;
  if (r < valid_rows(p.expert_offsets, p.num_experts, p.num_rows)) {
    const float* const partial = p.partial + r * p.num_partials;
    for (int64_t i = lane; i < p.num_partials; i += kWarp) sum += partial[i];
    if (p.b_down.data != nullptr)
      sum +=
          bias_dot<S>(p.b_down, p.grad_y, p.expert_offsets, p.num_experts, r, p.hidden_size, lane);
    sum = warp_sum(sum);
  }
  if (lane == 0) p.grad_topk_weights[slot] = sum;
}

}  // namespace

Status ffn_router_grad(const FfnRouterGradParams& p, Stream stream) {
  if (p.num_rows == 0) return 0;
  const RowGrid g = row_grid(p.num_rows, 1, 1);
  const Launch at{g.grid, g.block, stream};
  return p.grad_y.type == DType::kBFloat16 ? launch_kernel<ffn_router_grad_kernel<bf16>>(at, p)
                                           : launch_kernel<ffn_router_grad_kernel<fp16>>(at, p);
}

}  // namespace moe_ops::cuda
