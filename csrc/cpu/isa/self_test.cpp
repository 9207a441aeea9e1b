// Self-test of a target's kernels. A target that fails, because of a faulty compiler, emulator or
// processor, is not used: a build from source must not give wrong results silently. It runs at
// every import, so it takes a few milliseconds, and calls every entry of the tables that an op can
// reach: tests/cpu/test_isa.py breaks one after the other and asks whether it is noticed.
//
// Most kernels belong to GEMMs. Their operands are numbers whose sums are all exact, so one plain
// loop gives the expected result of every algorithm, bitwise. All other kernels run in small calls
// of ops, which are repeated with the portable kernels.
#include "cpu/isa/self_test.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "cpu/gemm/prepack.h"
#include "cpu/kernels/low_rank.h"
#include "moe_ops/add_rms_norm.h"
#include "moe_ops/all_experts_ffn.h"
#include "moe_ops/gated_act.h"
#include "moe_ops/grouped_gemm.h"
#include "moe_ops/grouped_gemm_fp8.h"
#include "moe_ops/mix_expert_outputs.h"
#include "moe_ops/moa_attention.h"
#include "moe_ops/moe_linear_reduce.h"
#include "moe_ops/rotary.h"
#include "moe_ops/router_bwd.h"
#include "moe_ops/router_linear.h"
#include "moe_ops/topk_router.h"
#include "moe_ops/unpermute.h"
#include "moe_ops/weight_format.h"

namespace moe_ops::cpu {

namespace {

constexpr Parallel kAlone;

// Numbers to draw operands from.
constexpr int64_t kPool = 16384;
const std::vector<char>& pool(DType type) {
  static const std::vector<char> pools[] = {
      matrix(DType::kFloat64, 1, kPool, [](int64_t, int64_t i) { return number(i); }),
      matrix(DType::kFloat32, 1, kPool, [](int64_t, int64_t i) { return number(i); }),
      matrix(DType::kBFloat16, 1, kPool, [](int64_t, int64_t i) { return number(i); }),
      matrix(DType::kFloat16, 1, kPool, [](int64_t, int64_t i) { return number(i); })};
  return pools[static_cast<int>(type)];
}

// Small calls of ops with operands of `type`, and what came out.
class Calls {
 public:
  struct Result {
    const char* op;
    DType type;
    bool exact;
    std::vector<char> data;
  };

  explicit Calls(DType type) : type_(type) {
    products();
    rows();
    if (type == DType::kFloat16) return;  // differs from bfloat16 by its conversions alone
    if (type != DType::kFloat64) fp8();
    if (type != DType::kFloat64) codes();
    attention();
    activations();
    mixtures();
    routers();
    small_experts();
    type == DType::kFloat64 ? low_rank<double>() : low_rank<float>();
  }
  std::vector<Result> results;

 private:
  const void* draw(int64_t n) { return draw(type_, n); }
  const void* draw(DType type, int64_t n) {
    seed_ = (seed_ + 1009) % (kPool - n);
    return pool(type).data() + seed_ * dtype_size(type);
  }
  void* out(int64_t n) { return out(type_, n); }
  void* out(DType type, int64_t n, bool exact = false) {
    results.push_back({op_, type, exact, std::vector<char>(n * dtype_size(type))});
    return results.back().data.data();
  }
  int32_t* out_ids(int64_t n) { return static_cast<int32_t*>(out(DType::kFloat32, n, true)); }
  // Returns n bytes aligned to a cache line, followed by zeros as far as a vector that begins in
  // them reaches.
  void* bytes(int64_t n) {
    char* p = operands_.emplace_back(n + 128).data();
    return p + (64 - reinterpret_cast<uintptr_t>(p) % 64);
  }
  int32_t* draw_ids(int64_t n, int32_t most) {
    auto* ids = static_cast<int32_t*>(bytes(n * 4));
    for (int64_t i = 0; i < n; ++i) ids[i] = static_cast<int32_t>((i * 7 + i / most) % most);
    return ids;
  }

  // Tests kernels that only ops choose: AMX, and weight gradients.
  void products() {
    constexpr int64_t E = 3, N = 40, O = 35, K = 96;
    static constexpr int32_t kOffsets[E + 1] = {0, 1, 6, N};
    op_ = "grouped_gemm";
    GroupedGemmParams p;
    p.expert_offsets = kOffsets;
    p.num_experts = E;
    p.out_features = O;
    p.in_features = K;
    p.a = {draw(N * K), type_, K};
    const void* w = draw(E * O * K);
    void* panels = bytes(E * packed_expert_bytes(type_, O, K, 1));
    pack_panels({w, type_, O * K, K, 1}, E, O, K, 1, panels, kAlone);
    for (const ExpertMatrices& b : {ExpertMatrices{w, type_, O * K, K, 1},
                                    {w, type_, O * K, 1, O},
                                    {w, type_, O * K, K, 1, panels}}) {
      p.b = b;
      p.out = {out(N * O), type_, O};
      grouped_gemm(p, kAlone);
    }
    GroupedWgradParams g;
    g.expert_offsets = kOffsets;
    g.num_experts = E;
    g.out_features = O;
    g.in_features = K;
    g.grad = {draw(N * O), type_, O};
    g.a = p.a;
    g.out_type = type_;
    g.out = out(E * O * K);
    grouped_gemm_wgrad(g, kAlone);
  }

  // Norms, rotations, sums of rows.
  void rows() {
    constexpr int64_t N = 3, H = 69, T = 5, K = 2;
    const void *x = draw(N * H), *more = draw(N * H), *weight = draw(H), *bias = draw(H);
    op_ = "add_rms_norm";
    void *sum = out(N * H), *rstd = out(sums_, N);
    add_rms_norm({x, more, weight, bias, type_, N, H, 1e-6, out(N * H), sum, rstd}, kAlone);
    add_rms_norm_bwd({more, x, sum, weight, rstd, type_, N, H,
                      bytes(add_rms_norm_workspace(N, H, type_)), out(N * H), out(H), out(H)},
                     kAlone);
    op_ = "rotary";
    for (const int64_t half : {2, 4, 8, 19}) {
      rotary({draw(T * 3 * 2 * half), type_, T * 3 * 2 * half, 3 * 2 * half, 1, T, 3, half,
              draw(sums_, T * half), draw(sums_, T * half), 0, true, out(T * 3 * 2 * half)},
             kAlone);
    }
    op_ = "unpermute";
    const int32_t* rows_of = draw_ids(T * K, N);
    const void *weights = draw(sums_, T * K), *grad = draw(T * H);
    unpermute({x, type_, H, H, T, K, N, rows_of, nullptr, weights, out(T * H), type_}, kAlone);
    unpermute_bwd(
        {grad, x, type_, H, H, H, T, K, N, N, rows_of, weights, out(N * H), out(sums_, T * K)},
        kAlone);
  }

  // Tests softmax and stick-breaking, narrow heads and others; non-finite values and sticks of
  // several blocks of keys have code paths of their own.
  void attention() {
    using enum AttentionKind;
    attend(kSoftmax, 6, 21, 0);
    attend(kSoftmax, 16, 21, 0);
    attend(kSoftmax, 20, 21, 3);
    attend(kStickBreaking, 6, 70, 0);
    attend(kStickBreaking, 20, 21, 3);
    attend(kSoftmax, 20, 21, 0, true);
  }
  void attend(AttentionKind kind, int64_t d, int64_t keys, double softcap, bool infinite = false) {
    constexpr int64_t S = 9, K = 2;
    op_ = "moa_attention";
    const auto operand = [&](int64_t tokens, int64_t slots) {
      return AttentionOperand{draw(tokens * slots * d), 0, slots * d, d, d};
    };
    MoaAttentionParams p = {type_,           kind,   1, S, K, 1, d, keys, {}, {}, {}, true, 0.5,
                            d == 16 ? 7 : 0, softcap};
    p.q = operand(S, K);
    p.k = operand(keys, 1);
    p.v = operand(keys, 1);
    p.out = out(S * K * d);
    p.state = out(sums_, S * K);
    if (infinite) {  // the last value, which the last token alone sees
      std::vector<char>& v = operands_.emplace_back(matrix(
          type_, keys, d, [&](int64_t j, int64_t) { return j + 1 < keys ? number(j) : INFINITY; }));
      p.v.data = v.data();
    }
    moa_attention(p, kAlone);
    if (infinite) return;
    moa_attention_bwd({p, operand(S, K), draw(sums_, S * K), bytes(moa_attention_workspace(p)),
                       out(S * K * d), out(keys * d), out(keys * d)},
                      kAlone);
  }

  // Tests experts with 1, 2, 3, ... rows, with a whole block of k and a partial one.
  void fp8() {
    constexpr int64_t E = 6, K = 200, O = 35, kBlocks = 2;
    op_ = "grouped_gemm_fp8";
    static constexpr int32_t kOffsets[E + 1] = {0, 1, 3, 6, 10, 15, 21};
    constexpr int64_t N = kOffsets[E];
    auto* codes = reinterpret_cast<uint8_t*>(out_ids(N * K / 4));
    auto* code_scales = static_cast<float*>(out(DType::kFloat32, N * kBlocks));
    quantize_fp8({{draw(N * K), type_, K}, N, K, codes, code_scales}, kAlone);
    auto* w = static_cast<uint8_t*>(bytes(E * O * K));
    for (int64_t i = 0; i < E * O * K; ++i) w[i] = static_cast<uint8_t>(i % 127 + i % 2 * 128);
    const auto* scales = static_cast<const float*>(draw(DType::kFloat32, E * kBlocks));
    GroupedGemmFp8Params p;
    p.expert_offsets = kOffsets;
    p.num_experts = E;
    p.out_features = O;
    p.in_features = K;
    p.a = {codes, K, code_scales, kBlocks};
    p.b = {w, O * K, K, scales, kBlocks, kBlocks};
    p.out = {out(DType::kFloat32, N * O), DType::kFloat32, O};
    grouped_gemm_fp8(p, kAlone);
    // For rows whose bits must not depend on their number.
    auto *wide = static_cast<float*>(bytes(K * 4)), *row = static_cast<float*>(bytes(K * 4));
    fp8_kernels().decode(w, wide, K);
    fp8_kernels().decode(codes, row, K);
    for (const bool widened : {false, true}) {
      const Fp8DotParams dot = {
          1,   1, K,       widened ? static_cast<const void*>(wide) : w, K, &scales,
          row, K, &scales, static_cast<float*>(out(DType::kFloat32, 1)), 1, 1};
      widened ? fp8_kernels().dot_widened(dot) : fp8_kernels().dot(dot);
    }
  }

  // Tests all formats, with one row of an expert and with many. Tokens are integers of 8 bits, so
  // that rounding them changes nothing.
  void codes() {
    constexpr int64_t E = 2, N = 14, O = 9, K = 256;
    static constexpr int32_t kOffsets[E + 1] = {0, 1, N};
    op_ = "grouped_gemm";
    const char* tokens =
        operands_
            .emplace_back(matrix(type_, N, K,
                                 [](int64_t r, int64_t k) {
                                   return static_cast<double>(
                                              k % 16 == 0 ? 127 : (k * 37 + r * 11) % 255 - 127) /
                                          64;
                                 }))
            .data();
    for (const FormatRow& f : kFormats) {
      const int64_t group = f.codes == Codes::kE4m3 ? K : f.group == 0 ? 64 : f.group;
      const bool in_bytes = f.scale == ScaleKind::kBytes;
      const int64_t row_scales = f.head + K / group * std::max<int64_t>(f.record, 1);
      const int64_t scales = E * O * row_scales;
      auto* w = static_cast<uint8_t*>(bytes(E * O * K * f.bits / 8));
      for (int64_t i = 0; i < E * O * K * f.bits / 8; ++i) w[i] = static_cast<uint8_t>(i % 126);
      auto* records = static_cast<uint8_t*>(bytes(scales));
      for (int64_t i = 0; i < scales; ++i) {
        const int64_t byte = i % row_scales;
        const bool half = f.codes == Codes::kQ4K ? byte < 4 : f.codes == Codes::kQ6K && byte >= 16;
        // Upper bytes of a float16 of 1/16 or of an exponent near zero; behind the float of a head
        // of 1, numbers of e4m3 from 1 on.
        records[i] = static_cast<uint8_t>(!half ? 126 + i % 3 : byte % 2 == 1 ? 0x2c : 0);
        if (f.head != 0) {
          constexpr uint8_t kOne[4] = {0, 0, 0x80, 0x3f};
          records[i] = byte < f.head ? kOne[byte] : static_cast<uint8_t>(56 + i % 3);
        }
      }
      // Products of e4m3 and bfloat16 tokens are exact in that type.
      const bool e4m3 = f.codes == Codes::kE4m3;
      ExpertMatrices b = {w, e4m3 ? type_ : DType::kFloat32, O * K, K, 1};
      b.quant.bits = f.bits;
      b.quant.codes = f.codes;
      b.quant.scale_type = in_bytes ? ScaleType::kBytes : ScaleType::kFloat32;
      b.quant.group = group;
      b.quant.scale_stride_o = row_scales;
      b.quant.scale_stride_e = O * row_scales;
      b.quant.scales = in_bytes ? records : draw(DType::kFloat32, scales);
      b.quant.zero = f.zeros ? w : nullptr;
      b.quant.has_kernels = false;
      GroupedGemmParams p;
      p.expert_offsets = kOffsets;
      p.num_experts = E;
      p.out_features = O;
      p.in_features = K;
      p.a = {tokens, type_, K};
      p.b = b;
      p.out = {out(N * O), type_, O};
      grouped_gemm(p, kAlone);
    }
  }

  // Tests low-rank factors, of a rank and a length that fill no tile.
  template <class T>
  void low_rank() {
    constexpr int64_t N = 3, D = 37, R = 5;
    op_ = "moe_ffn_lora";
    const LowRankKernels<T>& k = low_rank_kernels<T>();
    const void* x[N];
    for (const void*& row : x) row = draw(D);
    const RowPointers rows = {type_, x, N, D};
    const auto* factor = static_cast<const T*>(draw(sums_, R * D));
    const auto sums = [&](int64_t n) { return static_cast<T*>(out(sums_, n)); };
    T* low = sums(N * R);
    k.product(rows, factor, R, low);
    k.gradient(rows, low, R, sums(R * D));
    k.transpose(factor, D, R, D, sums(R * D), R);
  }

  void activations() {
    constexpr int64_t N = 3, I = 37;
    for (int kind = 0; kind <= static_cast<int>(Activation::kRelu2); ++kind) {
      const auto act = static_cast<Activation>(kind);
      const int64_t width = is_gated(act) ? 2 * I : I;
      const void* u = draw(N * width);
      op_ = "gated_act";
      gated_act({u, type_, N, I, {act}, out(N * I)}, kAlone);
      gated_act_bwd({draw(N * I), u, type_, N, I, {act}, out(N * width)}, kAlone);
      if (is_gated(act)) continue;
      op_ = "all_experts_ffn";
      constexpr int64_t T = 17, H = 33, O = 20, E = 2;
      static constexpr int32_t kOrder[E] = {0, 1}, kInput[E] = {0, 0};
      const AllExpertsFfnSizes s = {type_, T,      1,     H, E, I, O, act != Activation::kRelu,
                                    act,   kOrder, kInput};
      const void *x = draw(T * H), *up = draw(E * I * H), *down = draw(E * O * I);
      void* preact = out(sums_, E * T * I);
      all_experts_ffn({s, x, up, down, draw(E * I), draw(E * O), out(T * E * O), preact}, kAlone);
      all_experts_ffn_bwd({s, draw(T * E * O), x, up, down, preact, out(T * H), out(E * I * H),
                           out(E * O * I), out(E * I), out(E * O)},
                          kAlone);
    }
  }

  void mixtures() {
    constexpr int64_t T = 4, E = 9, O = 37, M = 5;
    op_ = "mix_expert_outputs";
    for (int act = 0; act <= static_cast<int>(MixActivation::kSigmoid); ++act) {
      const void *outputs = draw(T * E * O), *weights = draw(T * M * E), *factor = draw(T * M * O);
      const auto sums = [&] { return act > 0 ? out(sums_, E * O) : nullptr; };
      MixNorm norm = {nullptr, nullptr, nullptr, nullptr, 1e-5, false};
      if (act > 0) norm = {draw(sums_, E * O), draw(sums_, E * O), sums(), sums(), 1e-5, true};
      mix_expert_outputs({type_, MixActivation(act), T, E, O, M, outputs, weights, factor, 1, norm,
                          out(T * M * O)},
                         kAlone);
      mix_expert_outputs_bwd({type_, MixActivation(act), T, E, O, M, draw(T * M * O), outputs,
                              weights, factor, 1, norm, out(T * E * O), bytes(T * E * O * 8),
                              out(T * M * E), out(T * M * O), sums(), sums()},
                             kAlone);
    }
  }

  // Tests few experts, with and without code of their own, and rows with and without maxima of
  // blocks.
  void routers() {
    constexpr int64_t T = 9, H = 37;
    for (const auto& [E, K] :
         {std::pair<int64_t, int64_t>{4, 2}, {8, 2}, {6, 3}, {30, 4}, {100, 5}}) {
      const void *x = draw(T * H), *w = draw(E * H), *logits = draw(T * E);
      op_ = "router_linear";
      router_linear({x, w, draw(E), type_, H, T, H, E, out(sums_, T * E), sums_}, kAlone);
      router_linear_bwd(
          {draw(sums_, T * E), sums_, x, w, type_, H, T, H, E, out(T * H), out(E * H), out(E)},
          kAlone);
      op_ = "topk_router";
      for (int call = 0; call < 4 * kScoreFuncs; ++call) {
        const auto score = static_cast<ScoreFunc>(call / 4);
        const bool first = call & 1, renormalize = call & 2;
        int32_t* ids = out_ids(T * K);
        topk_router({logits, type_, E, T, E, K, score, first, renormalize, 1.5, nullptr, 1, 1,
                     GroupScore::kMax, out(sums_, T * K), ids},
                    kAlone);
        router_bwd({draw(sums_, T * K), logits, type_, E, ids, T, E, K, score, first, renormalize,
                    1.5, out(T * E)},
                   kAlone);
      }
    }
  }

  // Tests experts so small that a block of tokens goes through all of them.
  void small_experts() {
    constexpr int64_t T = 40, K = 2, E = 3, R = 24, C = 33;
    op_ = "moe_linear_reduce";
    Routing r;
    r.num_tokens = T;
    r.top_k = K;
    r.num_experts = E;
    r.topk_ids = {draw_ids(T * K, E), false};
    const Rows y = {draw(T * R), type_, R};
    const ExpertMatrices w = {draw(E * R * C), type_, R * C, C, 1};
    const ExpertVectors bias = {draw(E * R), type_, R};
    const void *h = draw(T * K * C), *weights = draw(sums_, T * K);
    moe_linear_reduce({r, weights, R, C, h, w, bias, out(T * R)}, kAlone);
    moe_linear_reduce_bwd({r, weights, R, C, y, h, w, bias, out(T * K * C), out(E * R * C),
                           out(sums_, T * K), out(E * R)},
                          kAlone);
  }

  DType type_, sums_ = accumulate_type(type_);
  int64_t seed_ = 0;
  const char* op_ = nullptr;
  std::vector<std::vector<char>> operands_;
};

template <class T>
bool close(const Calls::Result& found, const Calls::Result& right) {
  if (right.exact || found.data == right.data) return found.data == right.data;
  const bool half = dtype_size(right.type) == 2;
  const T tolerance = static_cast<T>(half                            ? 1.0 / 128
                                     : right.type == DType::kFloat32 ? 1e-4
                                                                     : 1e-11);
  const int64_t n = static_cast<int64_t>(right.data.size()) / dtype_size(right.type);
  std::vector<T> x(2 * n);
  T* y = x.data() + n;
  portable_tables().of<T>().rows.load_row(right.type, found.data.data(), x.data(), n, T(1));
  portable_tables().of<T>().rows.load_row(right.type, right.data.data(), y, n, T(1));
  T most = 1;
  for (int64_t i = 0; i < n; ++i) most = std::isinf(y[i]) ? most : std::max(most, std::abs(y[i]));
  for (int64_t i = 0; i < n; ++i) {
    const bool near = std::abs(x[i] - y[i]) <= tolerance * most;
    if (!near && x[i] != y[i] && !(std::isnan(x[i]) && std::isnan(y[i]))) return false;
  }
  return true;
}

// Replaces a broken entry of a table.
int64_t do_nothing() { return 0; }

intptr_t* words(Tables& tables) { return reinterpret_cast<intptr_t*>(&tables); }

// Returns the name of a kernel for a type that fails, or nullptr.
template <class T>
const char* failing(const Tables& tables, DType type, bool poison) {
  use_tables(&tables);
  const char* name = failing_product(tables.of<T>(), type, poison);
  const std::vector<Calls::Result> found = Calls(type).results;
  use_tables(&portable_tables());
  const std::vector<Calls::Result> right = Calls(type).results;
  use_tables(nullptr);
  for (size_t i = 0; name == nullptr && i < right.size(); ++i) {
    if (!close<T>(found[i], right[i])) name = right[i].op;
  }
  return name;
}

}  // namespace

const char* failing_kernel(Isa isa, int64_t broken) {
  Tables tables = tables_for(isa, tuning());
  if (broken >= 0) words(tables)[broken] = reinterpret_cast<intptr_t>(&do_nothing);
  const char* name = failing<double>(tables, DType::kFloat64, broken >= 0);
  for (const DType type : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    if (name == nullptr) name = failing<float>(tables, type, broken >= 0);
  }
  return name;
}

std::vector<int64_t> kernel_entries(Isa isa) {
  Tables tables = tables_for(isa, tuning());
  // Not those whose absence gives no wrong number: the order of stores, sums that are made again
  // because a number might not be finite, the setting up of AMX (without it, tiles are illegal
  // instructions). multiply_row has no caller with float64.
  tables.f32.rows.stream_fence = tables.f64.rows.stream_fence = nullptr;
  tables.f32.attention.all_finite = nullptr;
  tables.f64.attention.all_finite = nullptr;
  tables.f32.gemm.amx.begin = tables.f32.gemm.amx.end = nullptr;
  tables.f64.rows.multiply_row = nullptr;
  std::vector<int64_t> entries;
  for (int64_t i = 0; i < static_cast<int64_t>(sizeof(Tables) / sizeof(intptr_t)); ++i) {
    // A function lies near others of the library; numbers do not.
    const intptr_t distance = words(tables)[i] - reinterpret_cast<intptr_t>(&do_nothing);
    if (std::abs(distance) < int64_t{1} << 26) entries.push_back(i);
  }
  return entries;
}

}  // namespace moe_ops::cpu
