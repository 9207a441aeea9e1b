// The order of launches: x times x_scale, or a copy of x that kernels can read, if need be; the up
// product with its activation; the down product; the weighted sum of a token's rows.
#include <cstdlib>
#include <string_view>

#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/moe_ffn_quantized/stage.h"
#include "cuda/overlap.cuh"
#include "cuda/routed_rows.h"
#include "cuda/rows.cuh"
#include "moe_ops/batch_invariant.h"

namespace moe_ops::cuda {

namespace {

// --- x as kernels read it

struct CopyParams {
  Rows x;                // [T, H]
  const float* x_scale;  // [H] or nullptr
  int64_t num_rows, size, stride;
  void* out;  // [T, H] rows `stride` elements apart, zeros between them
};

template <class S>
__global__ void copy_rows_kernel(const CopyParams p) {
  await_previous_kernel();
  const int64_t row = warp_row();
  if (row >= p.num_rows) return;
  const S* const from = static_cast<const S*>(p.x.data) + row * p.x.stride;
  S* const to = static_cast<S*>(p.out) + row * p.stride;
  constexpr int kStretch = 4;
#pragma unroll
  for (int i = 0; i < kStretch; ++i) {
    const int64_t c = lane_access<kStretch>() + i * kWarp;
    if (c >= p.stride) return;
    float v = c < p.size ? widen(from[c]) : 0.0f;
    if (p.x_scale != nullptr && c < p.size) v *= p.x_scale[c];
    to[c] = narrow<S>(v);
  }
}

Status copy_rows(const CopyParams& p, Stream stream) {
  if (p.num_rows == 0 || p.stride == 0) return 0;
  const auto launch = [&](auto type) {
    using S = typename decltype(type)::type;
    const RowGrid g = row_grid(p.num_rows, p.stride, 4);
    Launch at{g.grid, g.block, stream};
    at.overlaps = true;
    return launch_kernel<copy_rows_kernel<S>>(at, p);
  };
  switch (p.x.type) {
    case DType::kBFloat16:
      return launch(TypeTag<bf16>{});
    case DType::kFloat16:
      return launch(TypeTag<fp16>{});
    default:
      return launch(TypeTag<float>{});
  }
}

// --- the block

// Returns the stride, in elements, of rows that kernels read 16 at a time.
int64_t padded(int64_t size) { return round_up<int64_t>(size, 16); }

bool needs_copy(const MoeFfnQuantizedParams& p) {
  return p.x_scale != nullptr || p.desc.hidden_size % 16 != 0 ||
         !rows_aligned(p.x.data, p.x.stride * dtype_size(p.x.type), 16);
}

struct Buffers {
  void* x;  // [T, H] padded, or nullptr
  void* h;  // [N, I] padded
  void* rows;
};

Buffers buffers_of(const MoeFfnQuantizedParams& p, Workspace& w) {
  const Routing& r = p.desc.routing;
  const int64_t H = p.desc.hidden_size, I = p.desc.intermediate_size;
  Buffers b{};
  if (needs_copy(p)) b.x = w.take(r.num_tokens * padded(H), p.x.type);
  b.h = w.take(r.num_slots() * padded(I), p.x.type);
  b.rows = w.take(r.num_slots() * H, p.x.type);
  return b;
}

// Returns whether the kernel for few tokens runs; MOE_OPS_QUANT_KERNEL=few or tiles selects a
// kernel independently of the number of tokens, for tests and benchmarks.
bool takes_few(const QuantStage& s) {
  const char* const forced = std::getenv("MOE_OPS_QUANT_KERNEL");
  if (forced != nullptr && std::string_view(forced) == "few") return true;
  if (forced != nullptr && std::string_view(forced) == "tiles") return false;
  if (batch_invariant()) return false;
  return s.num_tokens <= kQuantFewTokens || s.num_rows <= kQuantFewRows * s.num_experts;
}

Status run(const QuantStage& s, Stream stream) {
  if (s.num_rows == 0 || s.features == 0) return 0;
  // Kernels count in 32 bits, up to a tile past the end.
  constexpr int64_t kMost = INT32_MAX - 4096;
  if (s.num_rows > kMost || s.num_experts > kMost || s.depth > kMost || 2 * s.features > kMost)
    return cudaErrorInvalidValue;
  const bool few = takes_few(s);
  switch (s.a.type) {
    case DType::kBFloat16:
      return few ? quantized::few_bf16(s, stream) : quantized::tiles_bf16(s, stream);
    case DType::kFloat16:
      return few ? quantized::few_fp16(s, stream) : quantized::tiles_fp16(s, stream);
    default:
      return few ? quantized::few_fp32(s, stream) : quantized::tiles_fp32(s, stream);
  }
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
  if (needs_copy(p)) {
    MOE_TRY(copy_rows({p.x, p.x_scale, r.num_tokens, H, padded(H), buffers.x}, stream));
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
  MOE_TRY(run(up, stream));

  down.depth = I;
  down.features = H;
  down.a = by_row(r, buffers.h, type, padded(I));
  down.w = p.w_down;
  down.bias = p.b_down;
  down.out = buffers.rows;
  down.out_stride = H;
  MOE_TRY(run(down, stream));
  return combine(r, buffers.rows, type, H,
                 d.apply_router_weight_on_input ? nullptr : d.topk_weights, p.y, type, stream);
}

}  // namespace moe_ops::cuda
