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
  with_decoder<E4m3Sums>(rows.codes, [&]<class D>() { arrange_token_for<D>(rows, x, row); });
}

// Multiplies `count` times F rows of weights with M tokens. A run is summed separately, then scaled
// and added; where it has fewer vectors than there are tokens, the vectors are scaled.
template <class D, int F, int M>
void decoded_dot_tile(const CodesDotParams& p) {
  constexpr int W = kLanes<float>, V = kRunVectors<D>;
  constexpr int64_t kLine = 64, kLineBlocks = D::kBytes < kLine ? kLine / D::kBytes : 1;
  constexpr bool kScaleValues = V < M || V == 1;
  const CodeRows rows = p.rows;
  const ScaleRuns how = scale_runs<D>(rows);
  const int shift = how.shift;
  const int64_t k = rows.k, row0 = p.first, row_step = p.step;
  const int64_t ldx = p.x_bytes / static_cast<int64_t>(sizeof(float));
  const int64_t whole = k / D::kBlock, runs = (k + kRunSteps<D> - 1) / kRunSteps<D>;
  const int64_t scratch_step = decoded_scratch(k);
  const auto* x = static_cast<const float*>(p.x);
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

void decoded_dot(const CodesDotParams& p) {
  with_decoder<E4m3Sums>(p.rows.codes, [&]<class D>() {
    with_counts<kGemvFeatures>(p.features, p.tokens,
                               [&]<int F, int M>() { decoded_dot_tile<D, F, M>(p); });
  });
}

#if defined(__AVX512BF16__) && MOE_VEC_BYTES == 64
// --- e4m3 in bfloat16

constexpr int64_t kE4m3Prefetch = 2048;  // bytes, into the L1

// Writes a token in the order of E4m3Decoder.
void e4m3_arrange(int64_t k, const float* x, float* row) {
  constexpr int W = kLanes<float>;
  for (int64_t i = 0; i < 2 * e4m3_row_floats(k); i += 4 * W) {
    const __m512i a = narrow_two(load<float>(x + i), load<float>(x + i + W));
    const __m512i b = narrow_two(load<float>(x + i + 2 * W), load<float>(x + i + 3 * W));
    _mm512_storeu_si512(row + i / 2, _mm512_shuffle_i32x4(a, b, 0x88));
    _mm512_storeu_si512(row + i / 2 + W, _mm512_shuffle_i32x4(a, b, 0xdd));
  }
}

// Multiplies `count` times F rows of weights with M tokens. D: Fp8Codes, whose blocks of 128 are
// summed separately, then scaled and added, by the scales of tokens too (kTokenScales); or
// E4m3Codes with a scale per row.
template <class D, bool kTokenScales, int F, int M>
void e4m3_dot_tile(const CodesDotParams& p) {
  constexpr bool kBlocks = __is_same(D, Fp8Codes);
  constexpr int64_t kSteps = 128;  // of a block, two vectors of codes
  const CodeRows rows = p.rows;
  const int64_t k = rows.k, row0 = p.first, row_step = p.step, whole = k / kSteps;
  const int64_t row_bytes = p.x_bytes;
  const auto* x = static_cast<const char*>(p.x);
  const float* const* x_scale = p.x_scale;
  const E4m3Decoder decode;
  const auto products = [=](int64_t n, Vec<float>(&acc)[F][M]) __attribute__((always_inline)) {
    const uint8_t* w[F];
    const float* scales[F];
#pragma GCC unroll 4
    for (int f = 0; f < F; ++f) {
      const int64_t row = row0 + f * row_step + n;
      w[f] = static_cast<const uint8_t*>(rows.w) + row * rows.ldw;
      scales[f] = reinterpret_cast<const float*>(static_cast<const char*>(rows.scale) +
                                                 (kBlocks ? row / kFp8Block : row) * rows.ld_scale);
#pragma GCC unroll 4
      for (int t = 0; t < M; ++t) acc[f][t] = Vec<float>{};
    }
    const auto add_block = [&](int64_t b, const auto& load_codes) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int f = 0; f < F; ++f) {
        Vec<float> part[M];
#pragma GCC unroll 4
        for (int t = 0; t < M; ++t) part[t] = kBlocks ? Vec<float>{} : acc[f][t];
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const uint8_t* codes = w[f] + b * kSteps + half * 64;
          __builtin_prefetch(codes + kE4m3Prefetch, 0, 3);
          __m512i first, second;
          decode(load_codes(codes, half), first, second);
#pragma GCC unroll 4
          for (int t = 0; t < M; ++t) {
            const char* token = x + t * row_bytes + (b * 2 + half) * 128;
            const auto add = [&](__m512i v, const char* features) {
              part[t] = add_products<float, Pair, 1>(part[t], __builtin_bit_cast(Vec<float>, v),
                                                     load_bytes<Vec<float>>(features));
            };
            add(first, token);
            add(second, token + 64);
          }
        }
        const float of_row = scales[f][kBlocks ? b : 0];
#pragma GCC unroll 4
        for (int t = 0; t < M; ++t) {
          const Vec<float> scale = splat<float>(kTokenScales ? of_row * x_scale[t][b] : of_row);
          acc[f][t] = kBlocks ? add_one_of<float, 1>(acc[f][t], part[t], scale) : part[t];
        }
      }
    };
    for (int64_t b = 0; b < whole; ++b) {
      add_block(b, [](const uint8_t* codes, int)
                       __attribute__((always_inline)) { return load_bytes<__m512i_u>(codes); });
    }
    if (whole * kSteps < k) {
      const int64_t left = k - whole * kSteps;
      add_block(whole, [&](const uint8_t* codes, int half) __attribute__((always_inline)) {
        const int64_t count = left - half * 64;
        return _mm512_maskz_loadu_epi8(first_of_64(count > 0 ? count : 0), codes);
      });
    }
    if constexpr (!kBlocks) {
#pragma GCC unroll 4
      for (int f = 0; f < F; ++f) {
#pragma GCC unroll 4
        for (int t = 0; t < M; ++t) acc[f][t] *= scales[f][0];
      }
    }
  };
  product_sums<float, F, M>(p.count, p.out, p.ldo, p.out_step, products);
}

void e4m3_dot(const CodesDotParams& p) {
  with_counts<kGemvFeatures>(p.features, p.tokens, [&]<int F, int M>() {
    if (p.rows.codes != Codes::kFp8) return e4m3_dot_tile<E4m3Codes, false, F, M>(p);
    p.x_scale != nullptr ? e4m3_dot_tile<Fp8Codes, true, F, M>(p)
                         : e4m3_dot_tile<Fp8Codes, false, F, M>(p);
  });
}
#endif
