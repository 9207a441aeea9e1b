// The FFN block of e4m3 weights, in one parallel region: (1) tokens to e4m3; (2) up projection with
// rows gathered by token, bias and activation in cache, activated features to e4m3; (3) down
// projection into rows; (4) weighted sum of a token's rows.
#include "moe_ops/moe_ffn_fp8.h"

#include <cstring>
#include <vector>

#include "cpu/gemm/act_rows.h"
#include "cpu/gemm/fp8.h"
#include "cpu/gemm/quantize_fp8_row.h"
#include "cpu/gemm/routed_rows.h"
#include "cpu/kernels/activation.h"

namespace moe_ops::cpu {

namespace {

Fp8Desc desc_of(const MoeFfnDesc& s, int64_t features, int64_t in_features, const Fp8Rows& a,
                const Fp8Matrices& b) {
  Fp8Desc d;
  d.expert_offsets = s.routing.expert_offsets;
  d.num_experts = s.routing.num_experts;
  d.features = features;
  d.in_features = in_features;
  d.a = a;
  d.b = b;
  return d;
}

void add_bias(const ExpertVectors& bias, int64_t e, int64_t f, int64_t n, float* values) {
  if (bias.data == nullptr) return;
  row_kernels<float>().axpy(bias.type, element(bias.data, bias.type, e * bias.stride_e + f), 1.0f,
                            values, n);
}

}  // namespace

void moe_ffn_fp8(const MoeFfnFp8Params& p, const Parallel& par) {
  ScratchScope scratch(ScratchScope::Keep::kUpTo256MiB);
  MoeFfnDesc s = p.desc;
  s.routing = sorted(scratch, s.routing);
  const int64_t T = s.routing.num_tokens, I = s.intermediate_size, H = s.hidden_size;
  const int64_t H_blocks = ceil_div(H, kFp8Block), I_blocks = ceil_div(I, kFp8Block);
  const int64_t rows = s.routing.num_valid_rows();
  const bool gated = is_gated(s.act.kind), weave = gated && s.act.interleaved;
  const auto alpha = static_cast<float>(s.act.alpha), limit = static_cast<float>(s.act.limit);

  const RowMaps<float> maps = row_maps<float>(scratch, s.routing, s.topk_weights);
  const int64_t tokens = p.has_codes ? 0 : T;  // that become codes here
  Arena arena(scratch, Scratch::kHidden,
              tokens * H + rows * I + 4 * (tokens * H_blocks + rows * I_blocks) + 4 * 64);
  auto* x_codes = arena.take<uint8_t>(tokens * H);
  auto* x_scale = arena.take<float>(tokens * H_blocks);
  Fp8Rows x = p.has_codes ? p.x_codes : Fp8Rows{x_codes, H, x_scale, H_blocks, nullptr};
  x.index = maps.token;
  auto* h_codes = arena.take<uint8_t>(rows * I);
  auto* h_scale = arena.take<float>(rows * I_blocks);
  float* out = scratch.take<float>(Scratch::kRows, rows * H);

  Fp8Desc up = desc_of(s, gated && !weave ? I : (weave ? 2 * I : I), H, x, p.w_gate_up);
  up.segments = gated && !weave ? 2 : 1;
  // Whole blocks of h, so that an item has all that a scale is made of.
  up.feature_unit = weave ? 2 * kFp8Block : kFp8Block;
  const auto activate = [&](int64_t e, int64_t r, int64_t f, int64_t n, float* v0, float* v1) {
    for (int seg = 0; seg < up.segments; ++seg) {
      float* v = seg == 0 ? v0 : v1;
      if (s.apply_router_weight_on_input) {
        row_kernels<float>().load_row(DType::kFloat32, v, v, n, maps.weight[r]);
      }
      add_bias(p.b_gate_up, e, seg * I + f, n, v);
    }
    const int64_t first = weave ? f / 2 : f, count = weave ? n / 2 : n;
    float gate[kFp8Block], other[kFp8Block], h[kFp8Block];
    for (int64_t i = 0; i < count; i += kFp8Block) {
      const int64_t m = std::min(kFp8Block, count - i), at = r * I_blocks + (first + i) / kFp8Block;
      if (weave) {
        deinterleave(v0 + 2 * i, m, gate, other);
        activation_kernels<float>().forward({s.act.kind, 1, m, alpha, limit, gate, other, 0, h, 0});
      } else {
        activation_kernels<float>().forward(
            {s.act.kind, 1, m, alpha, limit, v0 + i, v1 + i, 0, h, 0});
      }
      h_scale[at] = fp8_kernels().quantize(h, m, h_codes + r * I + first + i);
    }
  };

  const Fp8Desc down = desc_of(s, H, I, {h_codes, I, h_scale, I_blocks, nullptr}, p.w_down);
  const auto keep = [&](int64_t e, int64_t r, int64_t f, int64_t n, float* v, float*) {
    add_bias(p.b_down, e, f, n, v);
    std::memcpy(out + r * H + f, v, static_cast<size_t>(n) * sizeof(float));
  };

  const UnpermuteParams combine =
      combination(s.routing, out, DType::kFloat32, H,
                  s.apply_router_weight_on_input ? nullptr : s.topk_weights, p.y, p.y_type);
  const std::vector<GemmItem> up_items = gemm_items(up, par.num_threads);
  const std::vector<GemmItem> down_items = gemm_items(down, par.num_threads);
  const auto num_down = static_cast<int64_t>(down_items.size());
  const double token_cost = static_cast<double>(H) / 4 + 2;
  const int64_t token_chunk = std::max<int64_t>(1, chunk_length(tokens, token_cost));
  const int64_t sum_chunk = std::max<int64_t>(1, chunk_length(T, unpermute_cost(combine)));
  Latch tokens_left, down_left;
  tokens_left.add(ceil_div(tokens, token_chunk));
  down_left.add(num_down);
  std::vector<Latch> up_left(static_cast<size_t>(s.routing.num_experts));
  for (const GemmItem& it : up_items) up_left[it.expert].add();
  TaskGraph stages;
  stages.add(
      ceil_div(tokens, token_chunk), token_cost * static_cast<double>(tokens), [&](int64_t i) {
        for (int64_t t = i * token_chunk; t < std::min(tokens, (i + 1) * token_chunk); ++t) {
          quantize_fp8_row(p.x.type, row_of(p.x, t), H, x_codes + t * H, x_scale + t * H_blocks);
        }
        tokens_left.done();
      });
  stages.add(static_cast<int64_t>(up_items.size()), up.cost(), [&](int64_t i) {
    if (!stages.wait(tokens_left)) return;
    run_item(up, up_items[i], activate);
    up_left[up_items[i].expert].done();
  });
  stages.add(num_down, down.cost(), [&](int64_t i) {
    if (!stages.wait(up_left[down_items[i].expert])) return;
    run_item(down, down_items[i], keep);
    down_left.done();
  });
  stages.add(ceil_div(T, sum_chunk), unpermute_cost(combine) * static_cast<double>(T),
             [&](int64_t i) {
               if (!stages.wait(down_left)) return;
               unpermute_tokens(combine, i * sum_chunk, std::min(T, (i + 1) * sum_chunk));
             });
  stages.run(par);
}

}  // namespace moe_ops::cpu
