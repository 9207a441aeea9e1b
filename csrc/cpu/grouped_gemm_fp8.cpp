#include "moe_ops/grouped_gemm_fp8.h"

#include "cpu/gemm/fp8.h"

namespace moe_ops::cpu {

void grouped_gemm_fp8(const GroupedGemmFp8Params& p, const Parallel& par) {
  Fp8Desc d;
  d.expert_offsets = p.expert_offsets;
  d.num_experts = p.num_experts;
  d.features = p.out_features;
  d.in_features = p.in_features;
  d.a = p.a;
  d.b = p.b;
  const auto keep = [&](int64_t e, int64_t r, int64_t f, int64_t n, float* values, float*) {
    if (p.bias.data != nullptr) {
      row_kernels<float>().axpy(
          p.bias.type, element(p.bias.data, p.bias.type, e * p.bias.stride_e + f), 1.0f, values, n);
    }
    char* out = static_cast<char*>(p.out.data) + (r * p.out.stride + f) * dtype_size(p.out.type);
    row_kernels<float>().store_row(p.out.type, values, out, n);
  };
  const std::vector<GemmItem> items = gemm_items(d, par.num_threads);
  parallel_items(par, static_cast<int64_t>(items.size()), d.cost(),
                 [&](int64_t i) { run_item(d, items[i], keep); });
}

}  // namespace moe_ops::cpu
