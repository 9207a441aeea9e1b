#include "moe_ops/grouped_gemm.h"

#include <span>
#include <utility>
#include <vector>

#include "cpu/gemm/dense_layer.h"
#include "cpu/gemm/gemm.h"
#include "cpu/gemm/wgrad.h"

namespace moe_ops::cpu {

namespace {

template <class T>
GemmDesc<T> desc_of(const GroupedGemmParams& p) {
  GemmDesc<T> d;
  d.expert_offsets = p.expert_offsets;
  d.num_experts = p.num_experts;
  d.features = p.out_features;
  d.in_features = p.in_features;
  d.a = p.a;
  d.a_scale = static_cast<const T*>(p.a_scale);
  d.b = p.b;
  d.one_chain = p.one_chain;
  return d;
}

// Returns the epilogue that adds the bias and stores the sums.
template <class T>
auto store_to(const GroupedGemmParams& p) {
  return [&p](int64_t e, int64_t r, int64_t f, int64_t n, T* values, T*) {
    const RowKernels<T>& k = row_kernels<T>();
    if (p.bias.data != nullptr) {
      k.axpy(p.bias.type, element(p.bias.data, p.bias.type, e * p.bias.stride_e + f), T(1), values,
             n);
    }
    const int64_t row = p.out.index != nullptr ? p.out.index[r] : r;
    char* out = static_cast<char*>(p.out.data) + (row * p.out.stride + f) * dtype_size(p.out.type);
    k.store_row(p.out.type, values, out, n);
  };
}

template <class T>
void run_gemms(std::span<const GroupedGemmParams> all, const Parallel& par) {
  if (all.size() == 1) return gemm(desc_of<T>(all[0]), par, store_to<T>(all[0]));
  TaskGraph loop;
  for (const GroupedGemmParams& p : all) {
    const GemmDesc<T> d = desc_of<T>(p);
    std::vector<GemmItem> items = gemm_items(d, par.num_threads);
    const auto count = static_cast<int64_t>(items.size());
    loop.add(count, d.cost(), [&p, &par, d, items = std::move(items)](int64_t i) {
      run_item(d, gemm_kernels<T>(), items[i], next_item(items, i, par), store_to<T>(p));
    });
  }
  loop.run(par);
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

void grouped_gemm(const GroupedGemmParams& p, const Parallel& par) { grouped_gemms({&p, 1}, par); }

void grouped_gemms(std::span<const GroupedGemmParams> all, const Parallel& par) {
  all[0].b.type == DType::kFloat64 ? run_gemms<double>(all, par) : run_gemms<float>(all, par);
}

void grouped_gemm_wgrad(const GroupedWgradParams& p, const Parallel& par) {
  p.grad.type == DType::kFloat64 ? run_wgrad<double>(p, par) : run_wgrad<float>(p, par);
}

void grouped_sum(const GroupedSumParams& p, const Parallel& par) {
  p.rows.type == DType::kFloat64 ? run_sum<double>(p, par) : run_sum<float>(p, par);
}

}  // namespace moe_ops::cpu
