#include "moe_ops/grouped_gemm.h"

#include "cpu/gemm/gemm.h"
#include "cpu/gemm/wgrad.h"

namespace moe_ops::cpu {

namespace {

template <class T>
void run_gemm(const GroupedGemmParams& p, const Parallel& par) {
  const Kernels<T>& k = kernels<T>();
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
void run_sum(const GroupedSumParams& p, const Parallel& par) {
  const Kernels<T>& k = kernels<T>();
  constexpr int64_t kBlock = 512;
  const int64_t O = p.features, blocks = ceil_div(O, kBlock);
  const auto* scale = static_cast<const T*>(p.scale);
  const double cost =
      static_cast<double>(p.expert_offsets[p.num_experts] + p.num_experts) * O / 8.0;
  parallel_items(par, p.num_experts * blocks, cost, [&](int64_t item) {
    const int64_t e = item / blocks, f = item % blocks * kBlock, n = std::min(kBlock, O - f);
    T* sum = scratch<T>(Scratch::kTile, n);
    std::fill(sum, sum + n, T(0));
    for (int64_t r = p.expert_offsets[e]; r < p.expert_offsets[e + 1]; ++r) {
      k.axpy(p.rows.type, element(row_of(p.rows, r), p.rows.type, f), scale ? scale[r] : T(1), sum,
             n);
    }
    k.store_row(p.out_type, sum, static_cast<char*>(p.out) + (e * O + f) * dtype_size(p.out_type),
                n);
  });
}

}  // namespace

void grouped_gemm(const GroupedGemmParams& p, const Parallel& par) {
  p.b.type == DType::kFloat64 ? run_gemm<double>(p, par) : run_gemm<float>(p, par);
}

void grouped_gemm_wgrad(const GroupedWgradParams& p, const Parallel& par) {
  p.grad.type == DType::kFloat64 ? wgrad<double>(p, par) : wgrad<float>(p, par);
}

void grouped_sum(const GroupedSumParams& p, const Parallel& par) {
  p.rows.type == DType::kFloat64 ? run_sum<double>(p, par) : run_sum<float>(p, par);
}

}  // namespace moe_ops::cpu
