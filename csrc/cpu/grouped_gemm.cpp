#include "moe_ops/grouped_gemm.h"

#include "cpu/gemm/gemm.h"
#include "cpu/gemm/wgrad.h"

namespace moe_ops::cpu {

namespace {

template <class T>
void run_gemm(const GroupedGemmParams& p, const Parallel& par) {
  const RowKernels<T>& k = row_kernels<T>();
  GemmDesc<T> d;
  d.expert_offsets = p.expert_offsets;
  d.num_experts = p.num_experts;
  d.features = p.out_features;
  d.in_features = p.in_features;
  d.a = p.a;
  d.a_scale = static_cast<const T*>(p.a_scale);
  d.b = p.b;
  gemm(d, par, [&](int64_t e, int64_t r, int64_t f, int64_t n, T* values, T*) {
    if (p.bias.data != nullptr) {
      k.axpy(p.bias.type, element(p.bias.data, p.bias.type, e * p.bias.stride_e + f), T(1), values,
             n);
    }
    const int64_t row = p.out.index != nullptr ? p.out.index[r] : r;
    char* out = static_cast<char*>(p.out.data) + (row * p.out.stride + f) * dtype_size(p.out.type);
    k.store_row(p.out.type, values, out, n);
  });
}

template <class T>
void run_wgrad(const GroupedWgradParams& p, const Parallel& par) {
  const GemmKernels<T>& k = gemm_kernels<T>();
  const WgradPlan plan = wgrad_plan(p, par.num_threads);
  parallel_items(par, plan.count, plan.cost, [&](int64_t i) { run_wgrad_item(p, k, plan, i); });
}

template <class T>
void run_sum(const GroupedSumParams& p, const Parallel& par) {
  parallel_items(par, sum_items(p), sum_cost(p), [&](int64_t i) { run_sum_item<T>(p, i); });
}

}  // namespace

void grouped_gemm(const GroupedGemmParams& p, const Parallel& par) {
  p.b.type == DType::kFloat64 ? run_gemm<double>(p, par) : run_gemm<float>(p, par);
}

void grouped_gemm_wgrad(const GroupedWgradParams& p, const Parallel& par) {
  p.grad.type == DType::kFloat64 ? run_wgrad<double>(p, par) : run_wgrad<float>(p, par);
}

void grouped_sum(const GroupedSumParams& p, const Parallel& par) {
  p.rows.type == DType::kFloat64 ? run_sum<double>(p, par) : run_sum<float>(p, par);
}

}  // namespace moe_ops::cpu
