#include "moe_ops/gated_act.h"

#include "cpu/gemm/act_rows.h"
#include "cpu/kernels/activation.h"
#include "cpu/kernels/rows.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/workspace.h"

namespace moe_ops::cpu {

namespace {

template <class T>
void run(const GatedActParams& p, const Parallel& par) {
  const RowKernels<T>& k = row_kernels<T>();
  const ActivationKernels<T>& act = activation_kernels<T>();
  const int64_t I = p.intermediate_size, size = dtype_size(p.type);
  const int64_t width = is_gated(p.act.kind) ? 2 * I : I;
  parallel_range(par, p.num_rows, I * 2.0 + 2, [&](int64_t begin, int64_t end) {
    ScratchScope scratch;
    T* row = scratch.take<T>(Scratch::kTile, 5 * I);
    T* buffer = row + 2 * I;
    T* h = row + 4 * I;
    for (int64_t r = begin; r < end; ++r) {
      k.load_row(p.type, static_cast<const char*>(p.gate_up) + r * width * size, row, width, T(1));
      const GateUp<T> gu = split_row(p.act, row, I, buffer);
      act.forward({p.act.kind, 1, I, T(p.act.alpha), T(p.act.limit), gu.gate, gu.up, 0, h, 0});
      k.store_row(p.type, h, static_cast<char*>(p.h) + r * I * size, I);
    }
  });
}

template <class T>
void run_bwd(const GatedActBwdParams& p, const Parallel& par) {
  const RowKernels<T>& k = row_kernels<T>();
  const ActivationKernels<T>& act = activation_kernels<T>();
  const int64_t I = p.intermediate_size, size = dtype_size(p.type);
  const int64_t width = is_gated(p.act.kind) ? 2 * I : I;
  parallel_range(par, p.num_rows, I * 3.0 + 2, [&](int64_t begin, int64_t end) {
    ScratchScope scratch;
    T* row = scratch.take<T>(Scratch::kTile, 7 * I);
    T* buffer = row + 2 * I;
    T* grad = row + 4 * I;
    T* dh = row + 6 * I;
    for (int64_t r = begin; r < end; ++r) {
      k.load_row(p.type, static_cast<const char*>(p.gate_up) + r * width * size, row, width, T(1));
      k.load_row(p.type, static_cast<const char*>(p.grad_h) + r * I * size, dh, I, T(1));
      const GateUp<T> gu = split_row(p.act, row, I, buffer);
      act.backward({p.act.kind, 1, I, T(p.act.alpha), T(p.act.limit), gu.gate, gu.up, 0, dh, 0,
                    nullptr, nullptr, 0, grad, grad + I, 0, nullptr});
      const bool weave = is_gated(p.act.kind) && p.act.interleaved;
      if (weave) interleave(grad, grad + I, I, row);
      k.store_row(p.type, weave ? row : grad, static_cast<char*>(p.grad_gate_up) + r * width * size,
                  width);
    }
  });
}

}  // namespace

void gated_act(const GatedActParams& p, const Parallel& par) {
  p.type == DType::kFloat64 ? run<double>(p, par) : run<float>(p, par);
}

void gated_act_bwd(const GatedActBwdParams& p, const Parallel& par) {
  p.type == DType::kFloat64 ? run_bwd<double>(p, par) : run_bwd<float>(p, par);
}

}  // namespace moe_ops::cpu
