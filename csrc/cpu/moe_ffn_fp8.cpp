// The FFN block of e4m3 weights, in one parallel region: (1) tokens to e4m3; (2) up projection with
// rows gathered by token, bias and activation in cache, activated features to e4m3; (3) down
// projection into rows; (4) weighted sum of a token's rows.
#include "moe_ops/moe_ffn_fp8.h"

#include <cstring>
#include <vector>

#include "cpu/gemm/act_rows.h"
#include "cpu/gemm/fp8.h"
#include "cpu/gemm/quantize_fp8_row.h"
#include "moe_ops/unpermute.h"

namespace moe_ops::cpu {

namespace {

Fp8Desc desc_of(const MoeFfnShape& s, int64_t features, int64_t in_features, const Fp8Rows& a,
                const Fp8Matrices& b) {
  Fp8Desc d;
  d.expert_offsets = s.expert_offsets;
  d.num_experts = s.num_experts;
  d.features = features;
  d.in_features = in_features;
  d.a = a;
  d.b = b;
  return d;
}

void add_bias(const Kernels<float>& k, const ExpertVectors& bias, int64_t e, int64_t f, int64_t n,
              float* values) {
  if (bias.data == nullptr) return;
  k.axpy(bias.type, element(bias.data, bias.type, e * bias.stride_e + f), 1.0f, values, n);
}

}  // namespace

void moe_ffn_fp8(const MoeFfnFp8Params& p, const Parallel& par) {
  const MoeFfnShape& s = p.shape;
  const Kernels<float>& k = kernels<float>();
  const int64_t T = s.num_tokens, I = s.intermediate_size, H = s.hidden_size;
  const int64_t H_blocks = ceil_div(H, kFp8Block), I_blocks = ceil_div(I, kFp8Block);
  const int64_t rows = s.expert_offsets[s.num_experts];
  const bool gated = is_gated(s.act.kind), weave = gated && s.act.interleaved;
  const auto alpha = static_cast<float>(s.act.alpha), limit = static_cast<float>(s.act.limit);
  const auto* slot_weights = static_cast<const float*>(s.topk_weights);

  ScratchScope scratch(ScratchScope::Keep::kUpTo256MiB);
  auto* token = scratch.take<int32_t>(Scratch::kIndex, rows);
  for (int64_t r = 0; r < rows; ++r) token[r] = static_cast<int32_t>(s.row_to_slot[r] / s.top_k);
  Carver carver(scratch, Scratch::kHidden,
                T * H + rows * I + 4 * (T * H_blocks + rows * I_blocks) + 4 * 64);
  auto* x_codes = carver.take<uint8_t>(T * H);
  auto* x_scale = carver.take<float>(T * H_blocks);
  auto* h_codes = carver.take<uint8_t>(rows * I);
  auto* h_scale = carver.take<float>(rows * I_blocks);
  float* out = scratch.take<float>(Scratch::kRows, rows * H);

  Fp8Desc up = desc_of(s, gated && !weave ? I : (weave ? 2 * I : I), H,
                       {x_codes, H, x_scale, H_blocks, token}, p.w_gate_up);
  up.segments = gated && !weave ? 2 : 1;
  // Whole blocks of h, so that an item has all that a scale is made of.
  up.feature_unit = weave ? 2 * kFp8Block : kFp8Block;
  const auto activate = [&](int64_t e, int64_t r, int64_t f, int64_t n, float* v0, float* v1) {
    for (int seg = 0; seg < up.segments; ++seg) {
      float* v = seg == 0 ? v0 : v1;
      if (s.apply_router_weight_on_input) {
        k.load_row(DType::kFloat32, v, v, n, slot_weights[s.row_to_slot[r]]);
      }
      add_bias(k, p.b_gate_up, e, seg * I + f, n, v);
    }
    const int64_t first = weave ? f / 2 : f, count = weave ? n / 2 : n;
    float gate[kFp8Block], other[kFp8Block], h[kFp8Block];
    for (int64_t i = 0; i < count; i += kFp8Block) {
      const int64_t m = std::min(kFp8Block, count - i), at = r * I_blocks + (first + i) / kFp8Block;
      if (weave) {
        deinterleave(v0 + 2 * i, m, gate, other);
        k.act_fwd(s.act.kind, gate, other, h, m, alpha, limit);
      } else {
        k.act_fwd(s.act.kind, v0 + i, v1 + i, h, m, alpha, limit);
      }
      h_scale[at] = k.fp8.quantize(h, m, h_codes + r * I + first + i);
    }
  };

  const Fp8Desc down = desc_of(s, H, I, {h_codes, I, h_scale, I_blocks, nullptr}, p.w_down);
  const auto keep = [&](int64_t e, int64_t r, int64_t f, int64_t n, float* v, float*) {
    add_bias(k, p.b_down, e, f, n, v);
    std::memcpy(out + r * H + f, v, static_cast<size_t>(n) * sizeof(float));
  };

  UnpermuteParams combine;
  combine.rows = out;
  combine.type = DType::kFloat32;
  combine.row_stride = combine.hidden_size = H;
  combine.num_tokens = T;
  combine.top_k = s.top_k;
  combine.num_valid_rows = rows;
  combine.slot_to_row = s.slot_to_row;
  combine.topk_weights = s.apply_router_weight_on_input ? nullptr : s.topk_weights;
  combine.y = p.y;
  combine.y_type = p.x.type;

  const std::vector<Fp8Item> up_items = fp8_items(up, k, par.num_threads);
  const std::vector<Fp8Item> down_items = fp8_items(down, k, par.num_threads);
  const auto num_down = static_cast<int64_t>(down_items.size());
  const double token_cost = static_cast<double>(H) / 4 + 2;
  const int64_t token_chunk = std::max<int64_t>(1, chunk_length(T, token_cost));
  const int64_t sum_chunk = std::max<int64_t>(1, chunk_length(T, unpermute_cost(combine)));
  Countdown tokens_left, down_left;
  tokens_left.add(ceil_div(T, token_chunk));
  down_left.add(num_down);
  std::vector<Countdown> up_left(static_cast<size_t>(s.num_experts));
  for (const Fp8Item& it : up_items) up_left[it.expert].add();
  Stages stages;
  stages.add(ceil_div(T, token_chunk), token_cost * static_cast<double>(T), [&](int64_t i) {
    for (int64_t t = i * token_chunk; t < std::min(T, (i + 1) * token_chunk); ++t) {
      quantize_fp8_row(k, p.x.type, row_of(p.x, t), H, x_codes + t * H, x_scale + t * H_blocks);
    }
    tokens_left.done();
  });
  stages.add(static_cast<int64_t>(up_items.size()), fp8_cost(up), [&](int64_t i) {
    if (!stages.wait(tokens_left)) return;
    run_fp8_item(up, k, up_items[i], activate);
    up_left[up_items[i].expert].done();
  });
  stages.add(num_down, fp8_cost(down), [&](int64_t i) {
    if (!stages.wait(up_left[down_items[i].expert])) return;
    run_fp8_item(down, k, down_items[i], keep);
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
