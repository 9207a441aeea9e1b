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
  d.b_stride_k = p.b_stride_k;
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

void grouped_gemm_fp8_wgrad(const GroupedGemmFp8WgradParams& p, const Parallel& par) {
  const int64_t O = p.out_features, K = p.in_features;
  if (O == 0 || K == 0) return;
  const GemmKernels<float>& k = gemm_kernels<float>();
  GemmShape shape;
  shape.b = GemmShape::B::kFp8;
  shape.features = shape.range = K;
  shape.in_features = kFp8Block;
  const GemmConfig config = choose_config(shape, k, quant_kernels(), std::max(O, kFp8GemvRows + 1));
  const int64_t rows = balanced(O, config.rows, config.row_unit);
  const int64_t features = balanced(K, config.features, config.feature_unit);
  const int64_t row_blocks = ceil_div(O, rows), feature_blocks = ceil_div(K, features);
  const double cost =
      static_cast<double>(O * K) * (static_cast<double>(p.expert_offsets[p.num_experts]) / 16 +
                                    static_cast<double>(p.num_experts));
  const auto keep = [&](int64_t e, int64_t o, int64_t f, int64_t n, float* values, float*) {
    void* out = static_cast<char*>(p.out) + ((e * O + o) * K + f) * dtype_size(p.out_type);
    if (p.accumulate) row_kernels<float>().axpy(p.out_type, out, 1.0f, values, n);
    row_kernels<float>().store_row(p.out_type, values, out, n);
  };
  parallel_items(par, p.num_experts * row_blocks * feature_blocks, cost, [&](int64_t i) {
    const int64_t e = i / (row_blocks * feature_blocks), r = i / feature_blocks % row_blocks * rows,
                  f = i % feature_blocks * features;
    const GemmItem it{config, e, r, std::min(O, r + rows), f, std::min(K, f + features)};
    const Fp8WgradDesc d(p, e);
    if (d.in_features == 0) {
      if (!p.accumulate) zero_item<float>(it, keep);
    } else {
      fp8_pack_tokens_item<false>(d, k, it, keep);
    }
  });
}

}  // namespace moe_ops::cpu
