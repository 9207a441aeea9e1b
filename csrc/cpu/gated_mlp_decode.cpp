#include "moe_ops/gated_mlp_decode.h"

#include <cmath>

#include "cpu/gemm/dense_layer.h"
#include "cpu/gemm/desc.h"
#include "cpu/kernels/activation.h"
#include "cpu/kernels/rows.h"
#include "cpu/runtime/team.h"
#include "cpu/runtime/workspace.h"
#include "moe_ops/add_rms_norm.h"

namespace moe_ops::cpu {

namespace {

template <class T>
void run(const GatedMlpDecodeParams& p, const Parallel& par) {
  const RowKernels<T>& k = row_kernels<T>();
  const int64_t N = p.num_tokens, H = p.gate.in_features, I = p.gate.out_features;
  const int64_t O = p.down.out_features, size = dtype_size(p.type);
  ScratchScope scratch(ScratchScope::Keep::kUpTo256MiB);
  Arena arena(scratch, Scratch::kHidden,
              N * (H + I) * size + N * (3 * I + O + 1) * static_cast<int64_t>(sizeof(T)) + 64 * 8);
  char* const normed = arena.template take<char>(N * H * size);
  char* const hidden = arena.template take<char>(N * I * size);
  T* const gate = arena.template take<T>(N * I);
  T* const up = arena.template take<T>(N * I);
  T* const act = arena.template take<T>(N * I);
  T* const y = arena.template take<T>(N * O);
  T* const rstd = arena.template take<T>(N);

  Rows x{p.x, p.type, H, nullptr};
  if (p.norm_weight != nullptr) {
    add_rms_norm({p.x, nullptr, p.norm_weight, nullptr, p.type, N, H, p.eps, normed, nullptr, rstd},
                 par);
    x.data = normed;
  }
  multiply({{p.gate, gate}, {p.up, up}}, x, N, kAccumulate<T>, par);
  parallel_range(par, N, I * 2.0 + 2, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      T* const h = act + r * I;
      activation_kernels<T>().forward(
          {p.activation, 1, I, T(1.702), T(7), gate + r * I, up + r * I, 0, h, 0});
      k.store_row(p.type, h, hidden + r * I * size, I);
    }
  });
  multiply(p.down, {hidden, p.type, I, nullptr}, N, y, kAccumulate<T>, par);
  for (int64_t r = 0; r < N; ++r) {
    T factor = static_cast<T>(p.residual_scale);
    if (p.output_gate != nullptr) {
      const T z = k.dot_row(p.type, element(x.data, p.type, r * H), p.type, p.output_gate, H);
      factor /= T(1) + std::exp(-z);
    }
    const void* const residual =
        p.residual == nullptr ? nullptr : element(p.residual, p.type, r * O);
    add_to_residual(y + r * O, factor, residual, p.type, static_cast<char*>(p.y) + r * O * size, O);
  }
}

}  // namespace

void gated_mlp_decode(const GatedMlpDecodeParams& p, const Parallel& par) {
  if (p.num_tokens == 0 || p.down.out_features == 0) return;
  const double weights = static_cast<double>(p.gate.out_features) *
                         static_cast<double>(2 * p.gate.in_features + p.down.out_features);
  Team::run(par, static_cast<double>(p.num_tokens) * weights / 16, [&](const Parallel& team) {
    p.type == DType::kFloat64 ? run<double>(p, team) : run<float>(p, team);
  });
}

}  // namespace moe_ops::cpu
