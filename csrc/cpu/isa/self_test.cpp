#include "cpu/isa/self_test.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "cpu/gemm/prepack.h"
#include "cpu/kernels/rows.h"
#include "moe_ops/add_rms_norm.h"
#include "moe_ops/dense_ffn.h"
#include "moe_ops/expert_choice_router.h"
#include "moe_ops/gated_act.h"
#include "moe_ops/grouped_gemm_fp8.h"
#include "moe_ops/mix_experts.h"
#include "moe_ops/moa_attention.h"
#include "moe_ops/moe_linear_reduce.h"
#include "moe_ops/rotary.h"
#include "moe_ops/router_bwd.h"
#include "moe_ops/router_linear.h"
#include "moe_ops/topk_router.h"
#include "moe_ops/topp_router.h"
#include "moe_ops/unpermute.h"

namespace moe_ops::cpu {

namespace {

constexpr Parallel kAlone;

}  // namespace

void encode(DType type, double v, char* dst) {
  const auto single = static_cast<float>(v);
  if (type == DType::kFloat64) {
    std::memcpy(dst, &v, 8);
  } else if (type == DType::kFloat32) {
    std::memcpy(dst, &single, 4);
  } else {
    uint32_t bits;
    std::memcpy(&bits, &single, 4);
    uint32_t half = bits >> 16;
    if (type == DType::kFloat16 && v != 0) {
      half = (bits >> 16 & 0x8000u) | ((bits & 0x7fffffffu) - (112u << 23)) >> 13;
    }
    std::memcpy(dst, &half, 2);
  }
}

const void* SelfTest::draw(int64_t n) { return draw(type_, n); }

const void* SelfTest::draw(DType type, int64_t n) {
  std::vector<char>& v = operands_.emplace_back(n * dtype_size(type) + 64);
  for (int64_t i = 0; i < n; ++i) {
    state_ = state_ * 1664525u + 1013904223u;
    encode(type, (static_cast<int32_t>(state_ >> 25) - 64) / 64.0, &v[i * dtype_size(type)]);
  }
  return v.data();
}

const int32_t* SelfTest::draw_ids(int64_t n, int32_t most) {
  auto* ids = static_cast<int32_t*>(bytes(n * 4));
  for (int64_t i = 0; i < n; ++i)
    ids[i] = static_cast<int32_t>((i * 7 + i / most) % (most + 1)) - 1;
  return ids;
}

void* SelfTest::bytes(int64_t n) {
  char* p = operands_.emplace_back(n + 128).data();
  return p + (64 - reinterpret_cast<uintptr_t>(p) % 64);
}

void* SelfTest::out(const char* name, int64_t n) { return out(name, type_, n); }

void* SelfTest::out(const char* name, DType type, int64_t n) {
  const double tolerance = type == DType::kFloat64   ? 1e-11
                           : type == DType::kFloat32 ? 1e-4
                                                     : 1.0 / 128;
  results_.push_back({name, type, tolerance, std::vector<char>(n * dtype_size(type))});
  return results_.back().data.data();
}

int32_t* SelfTest::out_ids(const char* name, int64_t n) {
  results_.push_back({name, DType::kFloat32, -1, std::vector<char>(n * 4)});
  return reinterpret_cast<int32_t*>(results_.back().data.data());
}

// Norms, rotations, sums of rows, and rounding to the type.
void SelfTest::rows() {
  constexpr int64_t N = 3, H = 69, T = 5, K = 2;
  const void *x = draw(N * H), *more = draw(N * H), *weight = draw(H), *bias = draw(H);
  void *sum = out("add_rms_norm", N * H), *rstd = out("add_rms_norm", sums_, N);
  add_rms_norm({x, more, weight, bias, type_, N, H, 1e-6, out("add_rms_norm", N * H), sum, rstd},
               kAlone);
  add_rms_norm_bwd(
      {more, x, sum, weight, rstd, type_, N, H, bytes(add_rms_norm_workspace(N, H, type_)),
       out("add_rms_norm_bwd", N * H), out("add_rms_norm_bwd", H), out("add_rms_norm_bwd", H)},
      kAlone);
  for (const int64_t half : {2, 4, 8, 19}) {
    rotary({draw(2 * T * 3 * 2 * half), type_, T * 3 * 2 * half, 3 * 2 * half, 2, T, 3, half,
            draw(sums_, T * half), draw(sums_, T * half), 0, true,
            out("rotary", 2 * T * 3 * 2 * half)},
           kAlone);
  }
  const int32_t* map = draw_ids(T * K, N - 1);
  int32_t* rows_of = static_cast<int32_t*>(bytes(T * K * 4));
  for (int64_t i = 0; i < T * K; ++i) rows_of[i] = std::max(map[i], 0);
  const void *weights = draw(sums_, T * K), *grad = draw(T * H);
  unpermute({x, type_, H, H, T, K, N, rows_of, nullptr, weights, out("unpermute", T * H), type_},
            kAlone);
  unpermute_bwd({grad, x, type_, H, H, H, T, K, N, N, rows_of, weights, out("unpermute_bwd", N * H),
                 out("unpermute_bwd", sums_, T * K)},
                kAlone);
}

// Experts with 1, 2, 3, ... rows go through every kernel of products.
void SelfTest::products() {
  constexpr int64_t E = 15;
  std::vector<int32_t> offsets(E + 1);
  for (int64_t e = 0; e < E; ++e) offsets[e + 1] = offsets[e] + (e < E - 1 ? e + 1 : 25);
  const int64_t N = offsets[E];
  // What is scaled is rounded where bfloat16 is multiplied as such.
  const void* scale = type_ == DType::kBFloat16 ? nullptr : draw(sums_, N);
  // Whole vectors and panels, and parts of them; weights dense along k, along features, packed.
  for (const auto& [O, K] : {std::pair<int64_t, int64_t>{96, 160}, {70, 86}}) {
    GroupedGemmParams p;
    p.expert_offsets = offsets.data();
    p.num_experts = E;
    p.out_features = O;
    p.in_features = K;
    p.a = {draw(N * K), type_, K};
    p.bias = {draw(E * O), type_, O};
    p.b = {draw(E * O * K), type_, O * K, K, 1};
    for (int layout = 0; layout < 3; ++layout) {
      p.b.stride_o = layout == 1 ? 1 : K;
      p.b.stride_k = layout == 1 ? O : 1;
      if (layout == 2) {
        void* panels = bytes(E * packed_expert_bytes(type_, O, K, 1));
        pack_panels(p.b, E, O, K, 1, panels, kAlone);
        p.b.panels = panels;
      }
      p.out = {out("grouped_gemm", sums_, N * O), sums_, O};
      grouped_gemm(p, kAlone);
    }
    GroupedWgradParams g;
    g.expert_offsets = offsets.data();
    g.num_experts = E;
    g.out_features = O;
    g.in_features = K;
    g.grad = {draw(N * O), type_, O};
    g.grad_scale = scale;
    g.a = p.a;
    g.out_type = O == 96 ? type_ : sums_;
    g.out = out("grouped_gemm_wgrad", g.out_type, E * O * K);
    grouped_gemm_wgrad(g, kAlone);
    grouped_sum({offsets.data(), E, O, g.grad, scale, out("grouped_sum", sums_, E * O), sums_},
                kAlone);
  }
}

void SelfTest::quantised_products() {
  constexpr int64_t E = 8, K = 192, O = 70;
  std::vector<int32_t> offsets(E + 1);
  for (int64_t e = 0; e < E; ++e) offsets[e + 1] = offsets[e] + (e < 7 ? e + 1 : 13);
  const int64_t N = offsets[E];
  // Activations of 8 bits are exact: each block of 32 has a 127 / 64 among its 64ths.
  std::vector<char>& x = (draw(DType::kFloat32, N * K), operands_.back());
  for (int64_t i = 0; i < N * K; i += 32) encode(DType::kFloat32, 127 / 64.0, &x[i * 4]);
  std::vector<char> halves(x.size());
  row_kernels<float>().store_row(type_, reinterpret_cast<float*>(x.data()), halves.data(), N * K);
  std::vector<uint8_t> w(E * O * K);
  for (size_t i = 0; i < w.size(); ++i) w[i] = static_cast<uint8_t>((i * 37 + i / 251) % 255 + 129);
  const auto* scales = static_cast<const float*>(draw(DType::kFloat32, E * O * K / 32));
  GroupedGemmParams p;
  p.expert_offsets = offsets.data();
  p.num_experts = E;
  p.out_features = O;
  p.in_features = K;
  p.a = {halves.data(), type_, K};
  for (const int64_t group : {0, 32, 64}) {
    const int64_t groups = group == 0 ? 1 : K / group;
    p.b = {w.data(),
           type_,
           O * K,
           K,
           1,
           nullptr,
           {group == 0 ? 8 : 4, group, scales, O * groups, groups}};
    p.out = {
        out(group == 0 ? "grouped_gemm of int8" : "grouped_gemm of int4", DType::kFloat32, N * O),
        DType::kFloat32, O};
    grouped_gemm(p, kAlone);
  }

  constexpr int64_t kBlocks = 2;
  auto* codes = reinterpret_cast<uint8_t*>(out_ids("quantize_fp8", N * K / 4));
  auto* code_scales = static_cast<float*>(out("quantize_fp8", DType::kFloat32, N * kBlocks));
  quantize_fp8({p.a, N, K, codes, code_scales}, kAlone);
  for (uint8_t& code : w) code = (code & 0x7f) == kFp8Nan ? code - 1 : code;
  GroupedGemmFp8Params f;
  f.expert_offsets = offsets.data();
  f.num_experts = E;
  f.out_features = O;
  f.in_features = K;
  f.a = {codes, K, code_scales, kBlocks};
  f.b = {w.data(), O * K, K, scales, kBlocks, kBlocks};
  f.out = {out("grouped_gemm_fp8", DType::kFloat32, N * O), DType::kFloat32, O};
  grouped_gemm_fp8(f, kAlone);
}

void SelfTest::activations() {
  constexpr int64_t N = 3, I = 69;
  for (int kind = 0; kind <= static_cast<int>(Activation::kRelu2); ++kind) {
    const auto act = static_cast<Activation>(kind);
    const int64_t width = is_gated(act) ? 2 * I : I;
    const void* u = draw(N * width);
    gated_act({u, type_, N, I, {act}, out("gated_act", N * I)}, kAlone);
    gated_act_bwd({draw(N * I), u, type_, N, I, {act}, out("gated_act_bwd", N * width)}, kAlone);
    if (is_gated(act)) continue;
    constexpr int64_t T = 37, H = 33, O = 20, E = 2;
    static constexpr int32_t kOrder[E] = {0, 1}, kInput[E] = {0, 0};
    const DenseFfnSizes s = {
        type_, T, 1, H, E, I, O, kind != static_cast<int>(Activation::kRelu), act, kOrder, kInput};
    const void *x = draw(T * H), *up = draw(E * I * H), *down = draw(E * O * I);
    void* preact = out("dense_ffn", sums_, E * T * I);
    dense_ffn({s, x, up, down, draw(E * I), draw(E * O), out("dense_ffn", T * E * O), preact},
              kAlone);
    dense_ffn_bwd({s, draw(T * E * O), x, up, down, preact, out("dense_ffn_bwd", T * H),
                   out("dense_ffn_bwd", E * I * H), out("dense_ffn_bwd", E * O * I),
                   out("dense_ffn_bwd", E * I), out("dense_ffn_bwd", E * O)},
                  kAlone);
  }
}

void SelfTest::mixtures() {
  constexpr int64_t T = 6, E = 13, O = 37, M = 5;
  for (int act = 0; act <= static_cast<int>(MixActivation::kSigmoid); ++act) {
    const void *outputs = draw(T * E * O), *weights = draw(T * M * E), *factor = draw(T * M * O);
    MixNorm norm = {nullptr, nullptr, nullptr, nullptr, 1e-5, false};
    if (act > 0) {
      norm = {draw(sums_, E * O),
              draw(sums_, E * O),
              out("mix_experts", sums_, E * O),
              out("mix_experts", sums_, E * O),
              1e-5,
              true};
    }
    mix_experts({type_, MixActivation(act), T, E, O, M, outputs, weights, factor, 1, norm,
                 out("mix_experts", T * M * O)},
                kAlone);
    mix_experts_bwd({type_, MixActivation(act), T, E, O, M, draw(T * M * O), outputs, weights,
                     factor, 1, norm, out("mix_experts_bwd", T * E * O), bytes(T * E * O * 8),
                     out("mix_experts_bwd", T * M * E), out("mix_experts_bwd", T * M * O),
                     act > 0 ? out("mix_experts_bwd", sums_, E * O) : nullptr,
                     act > 0 ? out("mix_experts_bwd", sums_, E * O) : nullptr},
                    kAlone);
  }
}

// Softmax and stick-breaking, narrow heads and others; a number that is not finite has its own way.
void SelfTest::attention() {
  constexpr int64_t S = 41, K = 2;
  for (const int64_t d : {6, 16, 20}) {
    for (const double softcap : {0.0, 3.0}) {
      for (const AttentionKind kind : {AttentionKind::kSoftmax, AttentionKind::kStickBreaking}) {
        const auto operand = [&](int64_t slots) {
          return AttentionOperand{draw(S * slots * d), S * slots * d, slots * d, d, d};
        };
        MoaAttentionParams p = {
            type_,  kind,       1,          S,          K,    1,   d,
            S,      operand(K), operand(1), operand(1), true, 0.5, d == 16 ? 7 : 0,
            softcap};
        p.out = out("moa_attention", S * K * d);
        p.state = out("moa_attention", sums_, S * K);
        moa_attention(p, kAlone);
        moa_attention_bwd({p, operand(K), draw(sums_, S * K), bytes(moa_attention_workspace(p)),
                           out("moa_attention_bwd", S * K * d), out("moa_attention_bwd", S * d),
                           out("moa_attention_bwd", S * d)},
                          kAlone);
      }
    }
  }
}

void SelfTest::routers() {
  constexpr int64_t T = 21, H = 37;
  // Few experts, with and without code of their own, and rows with and without maxima of blocks.
  for (const auto& [E, K] :
       {std::pair<int64_t, int64_t>{4, 2}, {8, 2}, {6, 3}, {30, 4}, {150, 9}}) {
    const void *x = draw(T * H), *w = draw(E * H), *logits = draw(T * E);
    router_linear({x, w, draw(E), type_, H, T, H, E, out("router_linear", sums_, T * E), sums_},
                  kAlone);
    router_linear_bwd(
        {draw(sums_, T * E), sums_, x, w, type_, H, T, H, E, out("router_linear_bwd", T * H),
         out("router_linear_bwd", E * H), out("router_linear_bwd", E)},
        kAlone);
    for (int call = 0; call < 4 * kScoreFuncs; ++call) {
      int32_t* ids = out_ids("topk_router", T * K);
      const auto score = static_cast<ScoreFunc>(call / 4);
      const bool first = call & 1, renormalize = call & 2;
      topk_router({logits, type_, E, T, E, K, score, first, renormalize, 1.5, nullptr, 1, 1,
                   GroupScore::kMax, out("topk_router", sums_, T * K), ids},
                  kAlone);
      router_bwd({draw(sums_, T * K), logits, type_, E, ids, T, E, K, score, first, renormalize,
                  1.5, out("router_bwd", T * E)},
                 kAlone);
    }
    topp_router({logits, type_, E, T, E, 0.6, 1, K, true, 1.5, out("topp_router", sums_, T * K),
                 out_ids("topp_router", T * K)},
                kAlone);
    // By the sigmoid, whose order no rounding changes.
    expert_choice_router(
        {logits, type_, E, T, E, 3, ScoreFunc::kSigmoid, 1.5,
         out("expert_choice_router", sums_, T * E), out_ids("expert_choice_router", T * E)},
        kAlone);
  }
}

// Experts so small that a block of tokens goes through all of them.
void SelfTest::small_experts() {
  constexpr int64_t T = 150, K = 2, E = 4, R = 24, C = 33;
  Routing r;
  r.num_tokens = T;
  r.top_k = K;
  r.num_experts = E;
  r.topk_ids = {draw_ids(T * K, E), false};
  const Rows y = {draw(T * R), type_, R};
  const ExpertMatrices w = {draw(E * R * C), type_, R * C, C, 1};
  const ExpertVectors bias = {draw(E * R), type_, R};
  const void *h = draw(T * K * C), *weights = draw(sums_, T * K);
  moe_linear_reduce({r, weights, R, C, h, w, bias, out("moe_linear_reduce", T * R)}, kAlone);
  moe_linear_reduce_bwd(
      {r, weights, R, C, y, h, w, bias, out("moe_linear_reduce_bwd", T * K * C),
       out("moe_linear_reduce_bwd", E * R * C), out("moe_linear_reduce_bwd", sums_, T * K),
       out("moe_linear_reduce_bwd", E * R)},
      kAlone);
}

const std::vector<SelfTest::Result>& SelfTest::run() {
  rows();
  products();
  if (type_ != DType::kFloat64) quantised_products();
  if (type_ == DType::kFloat16) return results_;  // differs from bfloat16 by its conversions alone
  activations();
  mixtures();
  attention();
  routers();
  small_experts();
  return results_;
}

}  // namespace moe_ops::cpu
