// The order of launches: x times x_scale, or a copy of x that kernels can read, if need be; the up
// product with its activation; the down product; the weighted sum of a token's rows.
#include "cuda/check.h"
#include "cuda/moe_ffn_quantized/stage.h"
#include "cuda/routed_rows.h"

namespace moe_ops::cuda {

namespace {

using quantized::copy_rows;
using quantized::needs_copy;
using quantized::padded;
using quantized::run_stage;

struct Buffers {
  void* x;  // [T, H] padded, or nullptr
  void* h;  // [N, I] padded
  void* rows;
};

Buffers buffers_of(const MoeFfnQuantizedParams& p, Workspace& w) {
  const Routing& r = p.desc.routing;
  const int64_t H = p.desc.hidden_size, I = p.desc.intermediate_size;
  Buffers b{};
  if (needs_copy(p.x, H, p.x_scale)) b.x = w.take(r.num_tokens * padded(H), p.x.type);
  b.h = w.take(r.num_slots() * padded(I), p.x.type);
  b.rows = w.take(r.num_slots() * H, p.x.type);
  return b;
}

}  // namespace

int64_t moe_ffn_quantized_workspace(const MoeFfnQuantizedParams& p) {
  Workspace w;
  buffers_of(p, w);
  return w.used();
}

Status moe_ffn_quantized(const MoeFfnQuantizedParams& p, Stream stream) {
  const MoeFfnDesc& d = p.desc;
  const Routing& r = d.routing;
  const DType type = p.x.type;
  const int64_t H = d.hidden_size, I = d.intermediate_size;
  Workspace workspace(p.workspace);
  const Buffers buffers = buffers_of(p, workspace);

  Rows x = p.x;
  if (needs_copy(p.x, H, p.x_scale)) {
    MOE_TRY(copy_rows(p.x, p.x_scale, r.num_tokens, H, buffers.x, stream));
    x = {buffers.x, type, padded(H), nullptr};
  }

  QuantStage up;
  up.expert_offsets = r.expert_offsets;
  up.num_experts = r.num_experts;
  up.num_rows = r.num_slots();
  up.num_tokens = r.num_tokens;
  QuantStage down = up;
  up.depth = H;
  up.features = I;
  up.a = by_token(r, x);
  if (d.apply_router_weight_on_input) up.factor = routing_scale(r, d.topk_weights);
  up.w = p.w_gate_up;
  up.bias = p.b_gate_up;
  up.gated = is_gated(d.act.kind);
  up.activate = true;
  up.act = d.act;
  up.out = buffers.h;
  up.out_stride = padded(I);
  MOE_TRY(run_stage(up, stream));

  down.depth = I;
  down.features = H;
  down.a = by_row(r, buffers.h, type, padded(I));
  down.w = p.w_down;
  down.bias = p.b_down;
  down.out = buffers.rows;
  down.out_stride = H;
  MOE_TRY(run_stage(down, stream));
  return combine(r, buffers.rows, type, H,
                 d.apply_router_weight_on_input ? nullptr : d.topk_weights, p.y, type, stream);
}

}  // namespace moe_ops::cuda
