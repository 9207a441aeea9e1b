#include "cpu/gemm/dequant.h"

#include "cpu/gemm/gemm.h"

namespace moe_ops::cpu {

namespace {

// Returns the stored rows of expert e's weights, k per row.
CodeRows code_rows(const ExpertMatrices& m, int64_t e, int64_t k) {
  const QuantFormat& q = m.quant;
  const int64_t scale = e * q.scale_stride_e, size = scale_size(q.scale_type);
  return {.codes = q.codes,
          .k = k,
          .scale_type = q.scale_type,
          .group = q.group,
          .w = static_cast<const char*>(m.data) + e * m.stride_e * q.bits / 8,
          .ldw = (q.transposed ? m.stride_k : m.stride_o) * q.bits / 8,
          .scale = static_cast<const char*>(q.scales) + scale * size,
          .ld_scale = q.scale_stride_o * size,
          .scale_rows = q.scale_rows,
          .zero = q.zero == nullptr ? nullptr : q.zero + scale,
          .ld_zero = q.scale_stride_o};
}

// Returns the number of float32 rows or columns that fit kDequantBytes.
int64_t count_at_once(int64_t length, int64_t n) {
  const int64_t fitting = kDequantBytes / (length * static_cast<int64_t>(sizeof(float))) / 16 * 16;
  return std::clamp<int64_t>(fitting, 16, round_up<int64_t>(n, 16));
}

// Computes an item whose sum over k runs along stored rows: some features at a time.
void rows_item(const GemmDesc<float>& d, const GemmKernels<float>& k, const GemmItem& it,
               const DequantEpilogue& fn) {
  const int64_t K = d.in_features, n = it.feature_end - it.feature_begin;
  // A padded row: those of a power of two would all meet in the same few sets of an L1.
  const int64_t ld = round_up<int64_t>(K, 16) + 16;
  const int64_t part = count_at_once(ld * d.segments, n);
  ScratchScope scratch;
  Arena arena(
      scratch, Scratch::kDequant,
      (part * d.segments * ld + decoded_scratch(K)) * static_cast<int64_t>(sizeof(float)) + 128);
  float* w = arena.take<float>(part * d.segments * ld);
  float* scales = arena.take<float>(decoded_scratch(K));
  const CodeRows rows = code_rows(d.b, it.expert, K);
  GemmDesc<float> inner = d;
  inner.b = {w, DType::kFloat32, 0, ld, 1};
  inner.features = part;
  const GemmConfig config = choose_config(inner, it.row_end - it.row_begin);
  for (int64_t f0 = 0; f0 < n; f0 += part) {
    const int64_t count = std::min(part, n - f0), first = it.feature_begin + f0;
    for (int64_t s = 0; s < d.segments; ++s) {
      for (int64_t i = 0; i < count; ++i) {
        quant_kernels().dequantize({.rows = rows,
                                    .row = s * d.features + first + i,
                                    .k0 = 0,
                                    .n = K,
                                    .scratch = scales,
                                    .dst = w + (s * part + i) * ld});
      }
    }
    run_dense_item<Wide>(inner, k, {config, it.expert, it.row_begin, it.row_end, 0, count}, nullptr,
                         [&](int64_t e, int64_t r, int64_t f, int64_t m, float* values0,
                             float* values1) { fn(e, r, first + f, m, values0, values1); });
  }
}

// Computes an item whose sum over k runs across stored rows: block by block, each summed
// separately.
void columns_item(const GemmDesc<float>& d, const GemmKernels<float>& k, const GemmItem& it,
                  const DequantEpilogue& fn) {
  const int64_t K = d.in_features, m = it.row_end - it.row_begin;
  const int64_t n = it.feature_end - it.feature_begin, ld = round_up<int64_t>(n, 16) + 16;
  const int64_t row_length = d.features * d.segments;
  // By the widest item and not by this one: bits depend on the depth of blocks.
  const int64_t depth = count_at_once(kDequantFeatures, K);
  ScratchScope scratch;
  Arena arena(
      scratch, Scratch::kDequant,
      (depth * ld + m * n + decoded_scratch(row_length)) * static_cast<int64_t>(sizeof(float)) +
          192);
  float* w = arena.take<float>(depth * ld);
  float* sums = arena.take<float>(m * n);
  float* scales = arena.take<float>(decoded_scratch(row_length));
  const CodeRows rows = code_rows(d.b, it.expert, row_length);
  GemmDesc<float> inner = d;
  inner.b = {w, DType::kFloat32, 0, 1, ld};
  inner.features = n;
  for (int64_t k0 = 0; k0 < K; k0 += depth) {
    inner.in_features = std::min(depth, K - k0);
    for (int64_t i = 0; i < inner.in_features; ++i) {
      quant_kernels().dequantize({.rows = rows,
                                  .row = k0 + i,
                                  .k0 = it.feature_begin,
                                  .n = n,
                                  .scratch = scales,
                                  .dst = w + i * ld});
    }
    inner.a.data = element(d.a.data, d.a.type, k0);
    if (d.k_scale != nullptr) inner.k_scale = d.k_scale + k0;
    run_dense_item<Wide>(
        inner, k, {choose_config(inner, m), it.expert, it.row_begin, it.row_end, 0, n}, nullptr,
        [&](int64_t, int64_t r, int64_t f, int64_t count, float* values, float*) {
          float* sum = sums + (r - it.row_begin) * n + f;
          if (k0 == 0) {
            std::copy_n(values, count, sum);
          } else {
            for (int64_t i = 0; i < count; ++i) sum[i] += values[i];
          }
        });
  }
  for (int64_t r = 0; r < m; ++r) {
    fn(it.expert, it.row_begin + r, it.feature_begin, n, sums + r * n, sums + (r + 1) * n);
  }
}

}  // namespace

void dequant_item(const GemmDesc<float>& d, const GemmKernels<float>& k, const GemmItem& it,
                  const DequantEpilogue& fn) {
  d.b.quant.transposed ? columns_item(d, k, it, fn) : rows_item(d, k, it, fn);
}

void decoded_gemv_item(const GemmDesc<float>& d, const GemmItem& it, const DequantEpilogue& fn) {
  const QuantKernels& kernels = quant_kernels();
  const int64_t m = it.row_end - it.row_begin, n = it.feature_end - it.feature_begin;
  const int64_t K = d.in_features, padded_k = round_up<int64_t>(K, 256);
  const int64_t ldx = kernels.arranged_floats(K), ldo = n * d.segments;
  const CodeRows rows = code_rows(d.b, it.expert, K);
  ScratchScope scratch;
  float* x = scratch.take<float>(Scratch::kPackA, padded_k);
  float* tokens = scratch.take<float>(Scratch::kTokens, m * ldx);
  float* out = scratch.take<float>(Scratch::kTile, m * ldo);
  float* scales = scratch.take<float>(Scratch::kDequant, kGemvFeatures * decoded_scratch(K));
  std::fill(x + K, x + padded_k, 0.0f);
  for (int64_t t = 0; t < m; ++t) {
    Wide::load(d, it.row_begin + t, 0, K, x);
    kernels.arrange_token(rows, x, tokens + t * ldx);
  }
  // Four long streams, as in gemv_item.
  const int64_t quarter = n / kGemvFeatures, rest = n % kGemvFeatures;
  for (int s = 0; s < d.segments; ++s) {
    // `count` times `features` features from `first` on, `step` apart.
    const auto run = [&](int features, int64_t count, int64_t first, int64_t step) {
      if (count == 0) return;
      kernels.decoded_dot({.rows = rows,
                           .first = s * d.features + it.feature_begin + first,
                           .step = step,
                           .features = features,
                           .count = count,
                           .tokens = static_cast<int>(m),
                           .x = tokens,
                           .ldx = ldx,
                           .scratch = scales,
                           .out = out + s * n + first,
                           .ldo = ldo,
                           .out_step = step});
    };
    run(kGemvFeatures, quarter, 0, quarter);
    run(1, rest, kGemvFeatures * quarter, 1);
  }
  for (int64_t t = 0; t < m; ++t) {
    fn(it.expert, it.row_begin + t, it.feature_begin, n, out + t * ldo, out + t * ldo + n);
  }
}

}  // namespace moe_ops::cpu
