#include "cpu/gemm/dequant.h"

#include "cpu/gemm/gemm.h"
#include "cpu/kernels/fp8.h"

namespace moe_ops::cpu {

namespace {

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

// Weights of nvfp4 and fp8 without the scales that bfloat16 does not hold exactly: one for each
// `depth` steps of a row. `at_once` times as many are decoded by one call: three calls for as many
// steps of fp8 took 1.5 times as long on AMX.
struct Bf16Codes {
  CodeRows rows;
  int64_t bits, depth, at_once;
  char* scales;  // of nvfp4: those of a row whose float is 1

  Bf16Codes(const ExpertMatrices& b, int64_t e, int64_t k, char* scale_room)
      : rows(code_rows(b, e, k)),
        bits(b.quant.bits),
        depth(rows.codes == Codes::kFp8 ? kFp8Block : 2 * kKc),
        at_once(2 * kKc / depth),
        scales(scale_room) {}
  static int64_t scale_bytes(const ExpertMatrices& b) { return b.quant.scale_stride_o; }

  // Returns the scale of steps [k0, k0 + depth) of a row.
  float factor(int64_t row, int64_t k0) const {
    float found = 0;
    const int64_t block = rows.codes == Codes::kFp8 ? k0 / kFp8Block : 0;
    std::memcpy(&found, row_scales(row) + block * static_cast<int64_t>(sizeof(float)),
                sizeof(found));
    return found;
  }

  // Prefetches steps [k0, k0 + n) of a row, as far as it has them.
  void prefetch(int64_t row, int64_t k0, int64_t n) const {
    const char* begin = static_cast<const char*>(rows.w) + row * rows.ldw;
    const int64_t last = std::min(k0 + n, rows.k) * bits / 8;
    for (int64_t byte = k0 * bits / 8; byte < last; byte += 64) {
      __builtin_prefetch(begin + byte, 0, 2);
    }
  }

  // Decodes steps [k0, k0 + n) of a row to dst.
  void decode(int64_t row, int64_t k0, int64_t n, float* scratch, uint16_t* dst) const {
    if (rows.codes != Codes::kNvfp4) {
      const auto* codes = static_cast<const uint8_t*>(rows.w) + row * rows.ldw + k0;
      return fp8_kernels().decode_bf16(codes, dst, n);
    }
    const float one = 1.0f;
    float values[2 * kKc];
    std::memcpy(scales, row_scales(row), static_cast<size_t>(rows.ld_scale));
    std::memcpy(scales, &one, sizeof(one));
    CodeRows own = rows;
    own.scale = scales;
    own.ld_scale = 0;
    quant_kernels().dequantize(
        {.rows = own, .row = row, .k0 = k0, .n = n, .scratch = scratch, .dst = values});
    row_kernels<float>().store_row(DType::kBFloat16, values, dst, n);
  }

 private:
  const char* row_scales(int64_t row) const {
    return static_cast<const char*>(rows.scale) + row / rows.scale_rows * rows.ld_scale;
  }
};

// Computes an item in bfloat16, which holds the codes exactly. Weight rows, decoded once for all
// tokens of the item, are A, and tokens are packed as B.
void bf16_codes_item(const GemmDesc<float>& d, const GemmKernels<float>& k, const GemmItem& it,
                     const DequantEpilogue& fn) {
  constexpr int64_t W = 16;  // tokens of a panel
  const bool amx = it.config.operand == Operand::kAmx;
  const int64_t K = d.in_features, padded_k = round_up<int64_t>(K, 32);
  const int64_t m = it.row_end - it.row_begin, padded_m = round_up(m, W);
  const int64_t n = it.feature_end - it.feature_begin, total = n * d.segments;
  const int64_t padded_n = round_up(total, W), height = amx ? 16 : k.mr1;
  ScratchScope scratch;
  Arena arena(scratch, Scratch::kDequant,
              kMaxMr * kLda * 4 + kMaxMr * padded_m * 4 + padded_m * 4 + decoded_scratch(K) * 4 +
                  Bf16Codes::scale_bytes(d.b) + 5 * 64);
  auto* a = arena.take<float>(kMaxMr * kLda);
  auto* partial = arena.take<float>(kMaxMr * padded_m);
  auto* ones = arena.take<float>(padded_m);
  auto* decoding = arena.take<float>(decoded_scratch(K));
  const Bf16Codes codes(d.b, it.expert, K, arena.take<char>(Bf16Codes::scale_bytes(d.b)));
  std::fill_n(ones, padded_m, 1.0f);
  auto* x = scratch.take<float>(Scratch::kPackB, padded_m * padded_k / 2);
  auto* sums = scratch.take<float>(Scratch::kTile, padded_n * padded_m);
  auto* out =
      scratch.take<float>(Scratch::kTokens, std::max(padded_n * padded_m, W * padded_k / 2));
  for (int64_t t = 0; t < padded_m; t += W) {
    // A line more than a row keeps rows out of one L1 set.
    const int64_t ld = padded_k + 32;
    ScratchScope packing;
    auto* rows = packing.take<uint16_t>(Scratch::kPackA, W * ld);
    for (int64_t i = 0; i < W; ++i) {
      const int64_t r = it.row_begin + t + i, valid = r < it.row_end ? K : 0;
      if (valid > 0) load_bf16_row(d.a.type, row_of(d.a, r), K, 1.0f, nullptr, rows + i * ld);
      std::fill(rows + i * ld + valid, rows + i * ld + padded_k, uint16_t{0});
    }
    k.transpose(reinterpret_cast<const float*>(rows), ld / 2, W, padded_k / 2, x + t * padded_k / 2,
                W);
  }
  if (amx) k.amx.begin();
  for (int64_t i0 = 0; i0 < total; i0 += height) {
    const int64_t count = std::min(height, total - i0);
    const auto row = [&](int64_t i) {
      return (i0 + i) / n * d.features + it.feature_begin + (i0 + i) % n;
    };
    const int64_t whole_depth = codes.depth * codes.at_once;
    for (int64_t k0 = 0; k0 < K; k0 += codes.depth) {
      const int64_t begin = k0 / whole_depth * whole_depth;
      if (k0 == begin) {
        const int64_t depth = std::min(whole_depth, K - k0);
        const int64_t steps = std::min(round_up<int64_t>(depth, 32), padded_k - k0);
        // What is decoded next: the following steps of these rows, or the following rows.
        const bool last = k0 + whole_depth >= K;
        const int64_t next_k = last ? 0 : k0 + whole_depth, next_row = last ? height : 0;
        for (int64_t i = 0; i < height; ++i) {
          auto* dst = reinterpret_cast<uint16_t*>(a + i * kLda);
          if (i0 + i + next_row < total) codes.prefetch(row(i + next_row), next_k, whole_depth);
          if (i < count) codes.decode(row(i), k0, depth, decoding, dst);
          std::fill(dst + (i < count ? depth : 0), dst + steps, uint16_t{0});
        }
      }
      const float* block = a + (k0 - begin) / 2;
      const int64_t depth = std::min(codes.depth, K - k0);
      const int64_t steps = std::min(round_up<int64_t>(depth, 32), padded_k - k0);
      float factors[kMaxMr];
      for (int64_t i = 0; i < count; ++i) factors[i] = codes.factor(row(i), k0);
      for (int64_t t = 0; t < padded_m && amx; t += W * kAmxTokenTiles) {
        const int64_t tiles = std::min<int64_t>((padded_m - t) / W, kAmxTokenTiles);
        k.amx.rows({steps / 32, reinterpret_cast<const uint16_t*>(block), 2 * kLda,
                    reinterpret_cast<const uint16_t*>(x + t * padded_k / 2 + k0 / 2 * W),
                    W * padded_k, static_cast<int>(tiles)},
                   partial + t, padded_m);
      }
      for (int64_t t = 0; t < padded_m && !amx; t += W) {
        TileOptions none;
        k.bf16_row_a[0][count - 1](steps / 2, block, x + t * padded_k / 2 + k0 / 2 * W,
                                   {partial + t, padded_m, false}, none);
      }
      fp8_kernels().promote({.rows = count,
                             .cols = padded_m,
                             .block = partial,
                             .ld_block = padded_m,
                             .row_scale = factors,
                             .col_scale = ones,
                             .sums = sums + i0 * padded_m,
                             .ld_sums = padded_m,
                             .accumulate = k0 > 0});
    }
  }
  if (amx) k.amx.end();
  std::fill(sums + total * padded_m, sums + padded_n * padded_m, 0.0f);
  k.transpose(sums, padded_m, padded_n, m, out, padded_n);
  for (int64_t t = 0; t < m; ++t) {
    fn(it.expert, it.row_begin + t, it.feature_begin, n, out + t * padded_n,
       out + t * padded_n + n);
  }
}

}  // namespace

void dequant_item(const GemmDesc<float>& d, const GemmKernels<float>& k, const GemmItem& it,
                  const DequantEpilogue& fn) {
  if (it.config.operand != Operand::kWide) return bf16_codes_item(d, k, it, fn);
  d.b.quant.transposed ? columns_item(d, k, it, fn) : rows_item(d, k, it, fn);
}

void decoded_gemv_item(const GemmDesc<float>& d, const GemmKernels<float>& k, const GemmItem& it,
                       const DequantEpilogue& fn) {
  const QuantKernels& kernels = quant_kernels();
  const int64_t m = it.row_end - it.row_begin, n = it.feature_end - it.feature_begin;
  const int64_t K = d.in_features, padded_k = round_up<int64_t>(K, 256);
  const bool bf16 = it.config.operand == Operand::kFp8Bf16;
  const int64_t ldx = bf16 ? e4m3_row_floats(K) : kernels.arranged_floats(K), ldo = n * d.segments;
  const CodeRows rows = code_rows(d.b, it.expert, K);
  ScratchScope scratch;
  float* x = scratch.take<float>(Scratch::kPackA, padded_k);
  float* tokens = scratch.take<float>(Scratch::kTokens, m * ldx);
  float* out = scratch.take<float>(Scratch::kTile, m * ldo);
  float* scales = scratch.take<float>(Scratch::kDequant, codes_scratch(K));
  std::fill(x + K, x + padded_k, 0.0f);
  for (int64_t t = 0; t < m; ++t) {
    Wide::load(d, it.row_begin + t, 0, K, x);
    if (bf16) {
      kernels.e4m3_arrange(K, x, tokens + t * ldx);
    } else {
      kernels.arrange_token(rows, x, tokens + t * ldx);
    }
  }
  // Four long streams, as in gemv_item; with more tokens than a pass takes, four rows at a time.
  const int64_t quarter = n / kGemvFeatures, rest = n % kGemvFeatures;
  const int64_t num_passes = ceil_div<int64_t>(m, k.gemv.max_tokens);
  const BalancedPartition passes(m, num_passes);
  const int64_t at_once = num_passes == 1 ? quarter : 1;
  for (int s = 0; s < d.segments; ++s) {
    // `count` times `features` features from `first` on, `step` apart.
    const auto run = [&](int features, int64_t count, int64_t first, int64_t step) {
      if (count == 0) return;
      for (int64_t i = 0; i < num_passes; ++i) {
        const int64_t t = passes.begin(i), next = passes.begin(i + 1);
        const CodesDotParams p = {.rows = rows,
                                  .first = s * d.features + it.feature_begin + first,
                                  .step = step,
                                  .features = features,
                                  .count = count,
                                  .tokens = static_cast<int>(next - t),
                                  .x = tokens + t * ldx,
                                  .x_bytes = ldx * static_cast<int64_t>(sizeof(float)),
                                  .scratch = scales,
                                  .out = out + t * ldo + s * n + first,
                                  .ldo = ldo,
                                  .out_step = step};
        bf16 ? kernels.e4m3_dot(p) : kernels.decoded_dot(p);
      }
    };
    for (int64_t f = 0; f < quarter; f += at_once) run(kGemvFeatures, at_once, f, quarter);
    run(1, rest, kGemvFeatures * quarter, 1);
  }
  for (int64_t t = 0; t < m; ++t) {
    fn(it.expert, it.row_begin + t, it.feature_begin, n, out + t * ldo, out + t * ldo + n);
  }
}

}  // namespace moe_ops::cpu
