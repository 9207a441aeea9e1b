// The FFN block of e4m3 weights as a sequence of launches: (1) tokens to e4m3, unless they are; (2)
// pre-activation in fp32, with the rows of tokens gathered through row_to_slot; (3) activation, and
// its result to e4m3; (4) down projection, by rows; (5) weighted sum of a token's rows. On sm_90a,
// SwiGLU at many rows makes (2) and (3) one launch (gate_up.h).
#include "cuda/activation.cuh"
#include "cuda/dispatch.h"
#include "cuda/fp8.cuh"
#include "cuda/gate_up.cuh"
#include "cuda/launch.h"
#include "cuda/moe_ffn_fp8/gate_up.h"
#include "cuda/routed_rows.h"
#include "cuda/rows.cuh"
#include "moe_ops/moe_ffn_fp8.h"

namespace moe_ops::cuda {

namespace {

// A warp makes kStretch blocks of 128 features, as in quantize_fp8.cu.
constexpr int kStretch = 2;

struct ActParams {
  const float* preact;            // [N, P]
  const int32_t* expert_offsets;  // [E+1]; rows from the last one on are left alone
  int64_t num_experts;
  int64_t num_rows;           // N
  int64_t intermediate_size;  // I
  bool interleaved;
  uint8_t* q;    // [N, I]
  float* scale;  // [N, ceil(I / 128)]
};

template <Activation A, bool kAligned>
__global__ void act_fp8_kernel(const ActParams p, ActLimits<float> limits) {
  const int64_t row = warp_row(), I = p.intermediate_size, blocks = ceil_div(I, kFp8Block);
  if (row >= valid_rows(p.expert_offsets, p.num_experts, p.num_rows)) return;
  const float* const preact = p.preact + row * I * (is_gated(A) ? 2 : 1);
  const int64_t first = row_stretch() * kStretch;
  constexpr int V = kAligned ? 4 : 1;
  Wide<float, V> gate[kStretch][4 / V], up[kStretch][4 / V];
#pragma unroll
  for (int i = 0; i < kStretch; ++i) {
#pragma unroll
    for (int j = 0; j < 4 / V; ++j) {
      const int64_t c = (first + i) * kFp8Block + 4 * lane_id() + j * V;
      if (c < I) load_gate_up<A, float, V>(preact, c, I, p.interleaved, gate[i][j], up[i][j]);
    }
  }
#pragma unroll
  for (int i = 0; i < kStretch; ++i) {
    if (first + i >= blocks) return;
    const int64_t c = (first + i) * kFp8Block + 4 * lane_id();
    float h[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      h[j] =
          c + j < I ? act_forward<A>(gate[i][j / V].v[j % V], up[i][j / V].v[j % V], limits) : 0.0f;
    }
    const Fp8Lane lane = quantize_fp8_block(h);
    store_codes<kAligned>(p.q + row * I, c, I, lane.codes);
    if (lane_id() == 0) p.scale[row * blocks + first + i] = lane.scale;
  }
}

Status act_fp8(const ActParams& p, const ActivationParams& act, Stream stream) {
  if (p.num_rows == 0 || p.intermediate_size == 0) return 0;
  const RowGrid g =
      row_grid(p.num_rows, ceil_div(p.intermediate_size, kFp8Block) * kWarp, kStretch);
  return with_activation(act.kind, [&](auto kind) {
    constexpr Activation A = kind;
    const Launch at{g.grid, g.block, stream};
    const auto limits = act_limits<float>(act);
    return p.intermediate_size % 4 == 0 ? launch_kernel<act_fp8_kernel<A, true>>(at, p, limits)
                                        : launch_kernel<act_fp8_kernel<A, false>>(at, p, limits);
  });
}

struct Buffers {
  uint8_t* x;      // [T, H]
  float* x_scale;  // [T, ceil(H / 128)]
  float* preact;   // [N, P]
  uint8_t* h;      // [N, I]
  float* h_scale;  // [N, ceil(I / 128)]
  void* rows;      // [N, H] in y's type, where the pre-activation was
  int64_t bytes;
};

Buffers buffers_of(const MoeFfnFp8Params& p) {
  const MoeFfnDesc& d = p.desc;
  const Routing& r = d.routing;
  const int64_t N = r.num_slots(), H = d.hidden_size, I = d.intermediate_size;
  const int64_t P = d.width(), row = H * dtype_size(p.y_type);
  auto* const base = static_cast<char*>(p.workspace);
  Buffers b{};
  const auto take = [&](int64_t bytes) {
    char* const part = base == nullptr ? nullptr : base + b.bytes;
    b.bytes += round_up<int64_t>(bytes, 256);
    return part;
  };
  const int64_t tokens = p.has_codes ? 0 : r.num_tokens;
  b.x = reinterpret_cast<uint8_t*>(take(tokens * H));
  b.x_scale = reinterpret_cast<float*>(take(tokens * ceil_div(H, kFp8Block) * 4));
  b.h = reinterpret_cast<uint8_t*>(take(N * I));
  b.h_scale = reinterpret_cast<float*>(take(N * ceil_div(I, kFp8Block) * 4));
  b.rows = take(N * (row > 4 * P ? row : 4 * P));
  b.preact = static_cast<float*>(b.rows);
  return b;
}

GroupedGemmFp8Params product(const MoeFfnFp8Params& p, int64_t out_features, int64_t in_features,
                             const Fp8Matrices& w, const ExpertVectors& bias, void* out,
                             DType out_type) {
  const Routing& r = p.desc.routing;
  GroupedGemmFp8Params g;
  g.expert_offsets = r.expert_offsets;
  g.num_experts = r.num_experts;
  g.num_rows = r.num_slots();
  g.out_features = out_features;
  g.in_features = in_features;
  g.b = w;
  g.bias = bias;
  g.out = {out, out_type, out_features, nullptr};
  g.zero_tail = false;  // Nobody reads rows without an expert.
  return g;
}

}  // namespace

int64_t moe_ffn_fp8_workspace(const MoeFfnFp8Params& p) { return buffers_of(p).bytes; }

Status moe_ffn_fp8(const MoeFfnFp8Params& p, Stream stream) {
  const MoeFfnDesc& d = p.desc;
  const Routing& r = d.routing;
  const int64_t N = r.num_slots(), H = d.hidden_size, I = d.intermediate_size, P = d.width();
  const Buffers b = buffers_of(p);

  Fp8Rows x = p.x_codes;
  if (!p.has_codes) {
    QuantizeFp8Params quantize;
    quantize.x = p.x;
    quantize.num_rows = r.num_tokens;
    quantize.row_length = H;
    quantize.q = b.x;
    quantize.scale = b.x_scale;
    MOE_TRY(quantize_fp8(quantize, stream));
    x = {b.x, H, b.x_scale, ceil_div(H, kFp8Block), nullptr};
  }

  GroupedGemmFp8Params up = product(p, P, H, p.w_gate_up, p.b_gate_up, b.preact, DType::kFloat32);
  up.a = {x.data,         x.stride,      x.scale,
          x.scale_stride, r.row_to_slot, static_cast<int32_t>(r.top_k),
          r.num_tokens};
  if (d.apply_router_weight_on_input) up.factor = routing_scale(r, d.topk_weights);
  const sm90::fp8::GateUpParams gate_up{up, b.h, b.h_scale};
  if (d.act.kind == Activation::kSwiglu && !d.act.interleaved && sm90::fp8::supports(gate_up)) {
    MOE_TRY(sm90::fp8::gate_up_swiglu(gate_up, stream));
  } else {
    MOE_TRY(grouped_gemm_fp8(up, stream));
    MOE_TRY(act_fp8(
        {b.preact, r.expert_offsets, r.num_experts, N, I, d.act.interleaved, b.h, b.h_scale}, d.act,
        stream));
  }

  GroupedGemmFp8Params down = product(p, H, I, p.w_down, p.b_down, b.rows, p.y_type);
  down.a = {b.h, I, b.h_scale, ceil_div(I, kFp8Block), nullptr, 1, N};
  MOE_TRY(grouped_gemm_fp8(down, stream));

  const void* const weights = d.apply_router_weight_on_input ? nullptr : d.topk_weights;
  return combine(r, b.rows, p.y_type, H, weights, p.y, p.y_type, stream);
}

}  // namespace moe_ops::cuda
