// Few rows of tokens times codes of any format, which are decoded in registers: memory delivers the
// bits that are stored, and nothing else is written. Tokens stay float32. Included by
// kernels-inl.h, inside its namespace.

// Prefetch distance of the codes, in bytes.
constexpr int64_t kDecodedPrefetch = 4096;

// A token as decoded_dot reads it: its features, in the order of the decoder's vectors, then for
// each scale of a weight row the sum of the features that meet it. Offsets of the weights are
// multiplied by these sums.
struct ArrangedToken {
  static constexpr int64_t kWhole = 256;  // a multiple of every block
  int64_t sums;
  explicit ArrangedToken(int64_t k) : sums((k + kWhole - 1) / kWhole * kWhole) {}
  int64_t floats() const { return sums + sums / 16 + kLanes<float>; }
};

int64_t arranged_floats(int64_t k) { return ArrangedToken(k).floats(); }

template <class D>
void arrange_token_for(const CodeRows& rows, const float* x, float* row) {
  constexpr int W = kLanes<float>;
  const int64_t k = rows.k;
  const ArrangedToken layout(k);
  for (int64_t i = 0; i < layout.sums; i += 2 * W) {
    Vec<float> a = load<float>(x + i), b = load<float>(x + i + W);
    if constexpr (D::kPairs) deinterleave(a, b);
    store<float>(row + i, a);
    store<float>(row + i + W, b);
  }
  if (!D::kOffsets) return;
  float* sums = row + layout.sums;
  for (int64_t i = 0; i < layout.sums / 16 + W; i += W) store<float>(sums + i, Vec<float>{});
  const int shift = scale_runs<D>(rows).shift;
  for (int64_t run = 0; run * kRunSteps<D> < k; ++run) {
    Vec<float> sum = {};
    for (int64_t i = 0; i < kRunSteps<D>; i += W) sum += load<float>(x + run * kRunSteps<D> + i);
    sums[run >> shift] += horizontal_sum<float>(sum);
  }
}

void arrange_token(const CodeRows& rows, const float* x, float* row) {
  with_decoder<Fp8Sums>(rows.codes, [&]<class D>() { arrange_token_for<D>(rows, x, row); });
}

// Multiplies `count` times F rows of weights with M tokens. A run is summed separately, then scaled
// and added; where it has fewer vectors than there are tokens, the vectors are scaled.
template <class D, int F, int M>
void decoded_dot_tile(const DecodedDotParams& p) {
  constexpr int W = kLanes<float>, V = kRunVectors<D>;
  constexpr int64_t kLine = 64, kLineBlocks = D::kBytes < kLine ? kLine / D::kBytes : 1;
  constexpr bool kScaleValues = V < M || V == 1;
  const CodeRows rows = p.rows;
  const ScaleRuns how = scale_runs<D>(rows);
  const int shift = how.shift;
  const int64_t k = rows.k, ldx = p.ldx, row0 = p.first, row_step = p.step;
  const int64_t whole = k / D::kBlock, runs = (k + kRunSteps<D> - 1) / kRunSteps<D>;
  const int64_t scratch_step = decoded_scratch(k);
  const float* x = p.x;
  const float* x_sums = x + ArrangedToken(k).sums;
  float* scratch = p.scratch;
  const auto products = [=](int64_t n, Vec<float>(&acc)[F][M]) __attribute__((always_inline)) {
    const uint8_t* w[F];
    RunScales scales[F];
#pragma GCC unroll 4
    for (int f = 0; f < F; ++f) {
      const int64_t row = row0 + f * row_step + n;
      w[f] = static_cast<const uint8_t*>(rows.w) + row * rows.ldw;
      float* room = scratch + f * scratch_step;
      scales[f] = D::scales(rows, how, row, 0, runs, room, room + scratch_step / 2);
#pragma GCC unroll 4
      for (int t = 0; t < M; ++t) acc[f][t] = Vec<float>{};
    }
    const auto add_block = [&](int f, const auto& block, int64_t b) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int run = 0; run < D::kRunCount; ++run) {
        const Vec<float> scale = splat<float>(scales[f].scale[(b * D::kRunCount + run) >> shift]);
        Vec<float> sum[M];
#pragma GCC unroll 32
        for (int i = 0; i < V; ++i) {
          Vec<float> value = D::value(block, run, i);
          if constexpr (kScaleValues) value *= scale;
          const float* xv = x + b * D::kBlock + run * kRunSteps<D> + i * W;
#pragma GCC unroll 4
          for (int t = 0; t < M; ++t) {
            const Vec<float> v = load<float>(xv + t * ldx);
            if constexpr (kScaleValues) {
              acc[f][t] = add_one_of<float, 1>(acc[f][t], v, value);
            } else {
              sum[t] = i == 0 ? v * value : add_one_of<float, 1>(sum[t], v, value);
            }
          }
        }
        if constexpr (kScaleValues) continue;
#pragma GCC unroll 4
        for (int t = 0; t < M; ++t) acc[f][t] = add_one_of<float, 1>(acc[f][t], sum[t], scale);
      }
    };
    int64_t b = 0;
    const auto add_blocks = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int f = 0; f < F; ++f) add_block(f, D::block(w[f], b), b);
      ++b;
    };
    while (b + kLineBlocks <= whole) {
#pragma GCC unroll 4
      for (int f = 0; f < F; ++f) {
#pragma GCC unroll 2
        for (int64_t i = 0; i < kLineBlocks * D::kBytes; i += kLine) {
          __builtin_prefetch(w[f] + b * D::kBytes + i + kDecodedPrefetch, 0, 2);
        }
      }
#pragma GCC unroll 4
      for (int64_t i = 0; i < kLineBlocks; ++i) add_blocks();
    }
    while (b < whole) add_blocks();
    if constexpr (D::kRagged) {
      if (b * D::kBlock < k) {
#pragma GCC unroll 4
        for (int f = 0; f < F; ++f) {
          const CodesTail<D> tail(w[f], b, k - b * D::kBlock);
          add_block(f, D::block(tail.bytes, 0), b);
        }
      }
    }
    if (!D::kOffsets || scales[0].offset == nullptr) return;
    const int64_t entries = ((runs - 1) >> shift) + 1;
#pragma GCC unroll 4
    for (int f = 0; f < F; ++f) {
      for (int64_t i = 0; i < entries; i += W) {
        const Vec<float> offset = load<float>(scales[f].offset + i);
#pragma GCC unroll 4
        for (int t = 0; t < M; ++t) {
          const Vec<float> sum = load<float>(x_sums + t * ldx + i);
          acc[f][t] = add_one_of<float, 1>(acc[f][t], offset, sum);
        }
      }
    }
  };
  product_sums<float, F, M>(p.count, p.out, p.ldo, p.out_step, products);
}

void decoded_dot(const DecodedDotParams& p) {
  with_decoder<Fp8Sums>(p.rows.codes, [&]<class D>() {
    with_counts<kGemvFeatures>(p.features, p.tokens,
                               [&]<int F, int M>() { decoded_dot_tile<D, F, M>(p); });
  });
}
