// Products of few tokens with weights as they lie: GEMV, the blocked GEMV and outer products.
// Included by kernels-inl.h, inside its namespace.

// Calls put(f, t, sum of the lanes of sum_of(f, t)) for f < F, t < M.
template <class T, int F, int M, class Sum, class Put>
inline void lane_sums(const Sum& sum_of, const Put& put) {
#pragma GCC unroll 8
  for (int i = 0; i < F * M; i += 4) {
    Vec<T> v[4] = {};
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      if (i + j < F * M) v[j] = sum_of((i + j) / M, (i + j) % M);
    }
    const Four<T> four = sums_of_four<T>(v);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      if (i + j < F * M) put((i + j) / M, (i + j) % M, four.v[j]);
    }
  }
}

// Calls fn<F, M>() with F, kMost or 1, for `features` and M for `tokens`.
template <int kMost, class Fn>
inline void with_counts(int features, int tokens, const Fn& fn) {
  with_count<MOE_DOT_TOKENS>(tokens, [&]<int M>() {
    with_value<kMost, 1>(features, [&]<int F>() { fn.template operator()<F, M>(); });
  });
}

#if defined(__AVX2__) && MOE_VEC_BYTES >= 32
// Sums the products of `count` times F rows of weights, four or fewer, with M tokens: products(i,
// folded) leaves the result of fold_lanes for time i in folded[t]; the sums are stored to out[t *
// ldo + f * out_step + i].
template <int F, int M, class Products>
inline __attribute__((always_inline)) void folded_sums(int64_t count, float* out, int64_t ldo,
                                                       int64_t out_step, const Products& products) {
  for (int64_t i = 0; i < count; i += kFolded) {
    const int64_t times = count - i < kFolded ? count - i : kFolded;
    Floats folded[M][kFolded];
#pragma GCC unroll 1
    for (int64_t j = 0; j < times; ++j) {
      Floats now[M];
      products(i + j, now);
#pragma GCC unroll 4
      for (int t = 0; t < M; ++t) folded[t][j] = now[t];
    }
    for (int t = 0; t < M; ++t) {
      float* first = out + t * ldo + i;
      if (F == 4 && times == kFolded) {
        put_folded(folded[t], first, out_step);
        continue;
      }
      for (int64_t j = 0; j < times; ++j) {
        const Four<float> four = add_quadruples(folded[t][j]);
        for (int f = 0; f < F; ++f) first[f * out_step + j] = four.v[f];
      }
    }
  }
}
#endif

// Sums products in lanes; products(i, acc) leaves them in acc[f][t].
template <class T, int F, int M, class Products>
inline __attribute__((always_inline)) void product_sums(int64_t count, T* out, int64_t ldo,
                                                        int64_t out_step,
                                                        const Products& products) {
#if defined(__AVX2__) && MOE_VEC_BYTES >= 32
  if constexpr (sizeof(T) == 4 && F == 4) {
    folded_sums<F, M>(count, out, ldo, out_step,
                      [=](int64_t i, Floats(&folded)[M]) __attribute__((always_inline)) {
                        Vec<T> acc[F][M];
                        products(i, acc);
#pragma GCC unroll 4
                        for (int t = 0; t < M; ++t) {
                          folded[t] = fold_lanes({acc[0][t], acc[1][t], acc[2][t], acc[3][t]});
                        }
                      });
    return;
  }
#endif
  for (int64_t i = 0; i < count; ++i) {
    Vec<T> acc[F][M];
    products(i, acc);
    lane_sums<T, F, M>([&](int f, int t) { return acc[f][t]; },
                       [&](int f, int t, T sum) { out[t * ldo + f * out_step + i] = sum; });
  }
}

// Returns acc + a * b; a pair adds both of its products. kSums: see add_one_of.
template <class T, class S, int kSums>
inline Vec<T> add_products(Vec<T> acc, Vec<T> a, Vec<T> b) {
#if defined(__AVX512BF16__) && MOE_VEC_BYTES == 64
  if constexpr (__is_same(S, Pair)) {
    return __builtin_bit_cast(Vec<float>, _mm512_dpbf16_ps(__builtin_bit_cast(__m512, acc),
                                                           __builtin_bit_cast(__m512bh, a),
                                                           __builtin_bit_cast(__m512bh, b)));
  }
#endif
  return add_one_of<T, kSums>(acc, a, b);
}

// Vectors of weights as the sums take them: pairs as they are.
template <class T, class S>
inline Vec<T> load_operand(const S* p) {
  if constexpr (__is_same(S, Pair)) {
    return load<T>(reinterpret_cast<const T*>(p));
  } else {
    return load_as(p);
  }
}

// Multiplies `count` times F weight rows with M tokens, vectors along k: F streams of weights, each
// read once.
template <class T, class S, int F, int M>
void gemv_tiles(const GemvParams<T>& p) {
  constexpr int W = kLanes<T>;
  // By value, because a store through a vector may change what p refers to.
  const auto* w = static_cast<const S*>(p.w);
  const T* x = p.x;
  const int64_t k = p.k, w_step = p.w_step, ldw = p.ldw, ldx = p.ldx;
  [[maybe_unused]] const int64_t distance = p.prefetch_distance;
  const int64_t whole = k / W * W;
  const auto products = [=](int64_t n, Vec<T>(&acc)[F][M]) __attribute__((always_inline)) {
    const S* rows = w + n * w_step;
#pragma GCC unroll 4
    for (int f = 0; f < F; ++f) {
#pragma GCC unroll 4
      for (int t = 0; t < M; ++t) acc[f][t] = Vec<T>{};
    }
    for (int64_t i = 0; i < whole; i += W) {
      Vec<T> xv[M];
#pragma GCC unroll 4
      for (int t = 0; t < M; ++t) xv[t] = load<T>(x + t * ldx + i);
#pragma GCC unroll 4
      for (int f = 0; f < F; ++f) {
        // With one token the core's window reaches far enough ahead by itself.
        if constexpr (M > 1) {
          __builtin_prefetch(reinterpret_cast<const char*>(rows + f * ldw + i) + distance, 0, 2);
        }
        const Vec<T> wv = load_operand<T>(rows + f * ldw + i);
#pragma GCC unroll 4
        for (int t = 0; t < M; ++t) acc[f][t] = add_products<T, S, F * M>(acc[f][t], xv[t], wv);
      }
    }
    if (whole < k) {
      // Unrolled as well: with an index that is not constant, sums would have to lie in memory.
#pragma GCC unroll 4
      for (int f = 0; f < F; ++f) {
        S tail[W] = {};
        for (int64_t i = whole; i < k; ++i) tail[i - whole] = rows[f * ldw + i];
        const Vec<T> wv = load_operand<T>(static_cast<const S*>(tail));
#pragma GCC unroll 4
        for (int t = 0; t < M; ++t) {
          acc[f][t] = add_products<T, S, F * M>(acc[f][t], load<T>(x + t * ldx + whole), wv);
        }
      }
    }
  };
  product_sums<T, F, M>(p.count, p.out, p.ldo, p.out_step, products);
}

template <class T, class S>
void gemv_of(const GemvParams<T>& p) {
  with_counts<kGemvFeatures>(p.features, p.tokens,
                             [&]<int F, int M>() { gemv_tiles<T, S, F, M>(p); });
}

template <class T>
void gemv(const GemvParams<T>& p) {
  with_type<T>(p.w_type, p.w, [&]<class S>(const S*) { gemv_of<T, S>(p); });
}

// Tokens of a tile of the blocked GEMV: with four weight rows 24 sums, 6 tokens and a vector of
// weights of 32 registers, or 12, 3 and one of 16.
constexpr int kBlockedTokens = MOE_VEC_BYTES == 64 ? 6 : MOE_VEC_BYTES == 32 ? 3 : 2;
// Most rows, and bytes of a row of tokens in a block of k (NOTES.md).
constexpr int64_t kBlockedMaxRows = MOE_VEC_BYTES == 64 ? 64 : 40;
constexpr int64_t kBlockedBytes = MOE_VEC_BYTES == 64 ? 8192 : 3072;

// add_products in tiles that need every register.
template <class T, class S, int kSums>
inline Vec<T> add_in_place(Vec<T> acc, Vec<T> a, Vec<T> b) {
#if defined(__AVX2__) && MOE_VEC_BYTES == 32
  if constexpr (sizeof(T) == 4) {
    asm("vfmadd231ps %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b));  // See add_product.
    return acc;
  }
#endif
  return add_products<T, S, kSums>(acc, a, b);
}

// Multiplies a tile of a blocked GEMV. D: the type of the weights. Weights of a half type are also
// written to `wide`, of which the other tokens' tiles read them: between multiply-adds widening
// costs half of what it does alone.
template <class T, class S, class D, int F, int M>
void blocked_gemv_tile(const BlockedGemvParams<T>& p, TilePrefetch& prefetch) {
  constexpr int W = kLanes<T>;
  const auto* w = static_cast<const D*>(p.w);
  const T* x = p.x;
  [[maybe_unused]] T* wide = p.wide;
  T* sums = p.sums;
  const int64_t k = p.k, ldw = p.ldw, ldx = p.ldx;
  [[maybe_unused]] const int64_t ld_wide = p.ld_wide;
  const bool accumulate = p.accumulate;
  Vec<T> acc[M][F];
#pragma GCC unroll 6
  for (int t = 0; t < M; ++t) {
#pragma GCC unroll 4
    for (int f = 0; f < F; ++f) {
      acc[t][f] = accumulate ? load<T>(sums + (t * F + f) * W) : Vec<T>{};
    }
  }
  const auto step = [&](const D* row, int64_t ld) {
    Vec<T> xv[M];
#pragma GCC unroll 6
    for (int t = 0; t < M; ++t) xv[t] = load<T>(x + t * ldx);
#pragma GCC unroll 4
    for (int f = 0; f < F; ++f) {
      Vec<T> wv;
      if constexpr (sizeof(D) == sizeof(T)) {
        wv = load<T>(row + f * ld);
      } else {
        wv = load_as(row + f * ld);
        store<T>(wide + f * ld_wide, wv);
      }
#pragma GCC unroll 6
      for (int t = 0; t < M; ++t) acc[t][f] = add_in_place<T, S, F * M>(acc[t][f], xv[t], wv);
    }
    x += W;
    if constexpr (sizeof(D) != sizeof(T)) wide += W;
  };
  int64_t i = 0;
  for (; i + kPrefetchStep * W <= k; i += kPrefetchStep * W) {
    prefetch_step(prefetch);
#pragma GCC unroll 2
    for (int64_t j = 0; j < kPrefetchStep; ++j) step(w + i + j * W, ldw);
  }
  for (; i + W <= k; i += W) step(w + i, ldw);
  if (i < k) {
    D tail[F][W] = {};
    for (int f = 0; f < F; ++f) __builtin_memcpy(tail[f], w + f * ldw + i, (k - i) * sizeof(D));
    step(tail[0], W);
  }
#pragma GCC unroll 6
  for (int t = 0; t < M; ++t) {
#pragma GCC unroll 4
    for (int f = 0; f < F; ++f) store<T>(sums + (t * F + f) * W, acc[t][f]);
  }
}

// Runs a blocked GEMV. D: see above; S: the type that is multiplied.
template <class T, class S, class D = T>
void blocked_gemv(const BlockedGemvParams<T>& p, TilePrefetch& prefetch) {
  with_count<kBlockedTokens>(p.tokens, [&]<int M>() {
    with_value<int{kGemvFeatures}, 1>(
        p.features, [&]<int F>() { blocked_gemv_tile<T, S, D, F, M>(p, prefetch); });
  });
}

inline void blocked_gemv_widening(const BlockedGemvParams<float>& p, TilePrefetch& prefetch) {
  with_type<float>(p.w_type, p.w,
                   [&]<class D>(const D*) { blocked_gemv<float, float, D>(p, prefetch); });
}

template <class T>
void reduce_lanes(int features, int64_t tokens, const T* sums, T* out, int64_t ldo) {
  constexpr int W = kLanes<T>;
  for (int64_t t = 0; t < tokens; ++t) {
    const T* s = sums + t * features * W;
    if (features == kGemvFeatures) {
      const Vec<T> v[4] = {load<T>(s), load<T>(s + W), load<T>(s + 2 * W), load<T>(s + 3 * W)};
      const Four<T> four = sums_of_four<T>(v);
      __builtin_memcpy(out + t * ldo, four.v, sizeof(four));
    } else {
      // The order is that of lane_sums for one product.
      for (int f = 0; f < features; ++f) {
        const Vec<T> v[4] = {load<T>(s + f * W), Vec<T>{}, Vec<T>{}, Vec<T>{}};
        out[t * ldo + f] = sums_of_four<T>(v).v[0];
      }
    }
  }
}

// The weights of an operand in memory: those of pairs lie in two rows.
template <class S>
struct WeightOf {
  using Type = S;
};
template <>
struct WeightOf<Pair> {
  using Type = Bf16;
};

// Loads step r of R weight rows as operands, two vectors of pairs, interleaved on the way; the
// missing half of the last pair is zero.
template <class T, class S, int R, int NV>
inline void load_rows_of_operand(const typename WeightOf<S>::Type* rows, int64_t ld, int r,
                                 Vec<T> (&out)[NV]) {
  if constexpr (NV == 1) {
    out[0] = load_as(rows + r * ld);
  } else {
#if defined(__AVX512BF16__) && MOE_VEC_BYTES == 64
    const __m512i even = _mm512_loadu_si512(rows + 2 * r * ld);
    const __m512i odd =
        2 * r + 1 < R ? _mm512_loadu_si512(rows + (2 * r + 1) * ld) : _mm512_setzero_si512();
    out[0] = __builtin_bit_cast(Vec<T>, first_pairs(even, odd));
    out[1] = __builtin_bit_cast(Vec<T>, last_pairs(even, odd));
#endif
  }
}

// Multiplies R weight rows, dense along the output, with M tokens: the sums pass through registers
// once in R steps of k, and each weight row is read in one run.
template <class T, class S, int M, int R>
void outer_tile(const OuterParams<T>& p, int64_t token, int64_t row, bool accumulate) {
  using Weight = typename WeightOf<S>::Type;
  constexpr bool kPairs = __is_same(S, Pair);
  constexpr int W = kLanes<T>, NV = kPairs ? 2 : 1, kSteps = kPairs ? (R + 1) / 2 : R;
  const Weight* w = static_cast<const Weight*>(p.w) + row * p.ldw;
  const T* a = p.a + token * p.lda + row / NV;
  T* c = p.c + token * p.ldc;
  const int64_t ldw = p.ldw, lda = p.lda, ldc = p.ldc, n = p.n, ahead = p.ahead;
  Vec<T> av[M][kSteps];
#pragma GCC unroll 4
  for (int t = 0; t < M; ++t) {
#pragma GCC unroll 4
    for (int r = 0; r < kSteps; ++r) {
      if constexpr (kPairs) {
        // Arithmetic on the bits as a float might change them.
        const auto bits = load_bytes<uint32_t>(a + t * lda + r);
        av[t][r] = __builtin_bit_cast(Vec<T>, Simd<float>::Uint{} + bits);
      } else {
        av[t][r] = splat<T>(a[t * lda + r]);
      }
    }
  }
  const auto block = [&](const Weight* rows, int64_t ld, T* out, int64_t ldo) {
    Vec<T> acc[M][NV];
#pragma GCC unroll 4
    for (int t = 0; t < M; ++t) {
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) {
        acc[t][v] = accumulate ? load<T>(out + t * ldo + v * W) : Vec<T>{};
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kSteps; ++r) {
      Vec<T> wv[NV];
      load_rows_of_operand<T, S, R>(rows, ld, r, wv);
#pragma GCC unroll 4
      for (int t = 0; t < M; ++t) {
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) {
          acc[t][v] = add_products<T, S, 2>(acc[t][v], av[t][r], wv[v]);
        }
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < M; ++t) {
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) store<T>(out + t * ldo + v * W, acc[t][v]);
    }
  };
  int64_t j = 0;
  for (; j + NV * W <= n; j += NV * W) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) __builtin_prefetch(w + r * ldw + ahead + j, 0, 2);
    block(w + j, ldw, c + j, ldc);
  }
  if (j < n) {
    Weight tail[R][NV * W] = {};
    T out[M][NV * W] = {};
    for (int r = 0; r < R; ++r) {
      for (int64_t i = j; i < n; ++i) tail[r][i - j] = w[r * ldw + i];
    }
    for (int t = 0; t < M && accumulate; ++t) {
      for (int64_t i = j; i < n; ++i) out[t][i - j] = c[t * ldc + i];
    }
    block(tail[0], NV * W, out[0], NV * W);
    for (int t = 0; t < M; ++t) {
      for (int64_t i = j; i < n; ++i) c[t * ldc + i] = out[t][i - j];
    }
  }
}

template <class T, class S>
void outer_of(const OuterParams<T>& p) {
  // R rows at a time from `first` on; the number of those that are done.
  const auto all = [&]<int R>(int64_t first) {
    const int64_t end = first + (p.rows - first) / R * R;
    for (int64_t t = 0; t < p.tokens; t += MOE_DOT_TOKENS) {
      const int64_t left = p.tokens - t;
      with_count<MOE_DOT_TOKENS>(static_cast<int>(left < MOE_DOT_TOKENS ? left : MOE_DOT_TOKENS),
                                 [&]<int M>() {
                                   for (int64_t r = first; r < end; r += R) {
                                     outer_tile<T, S, M, R>(p, t, r, p.accumulate || r > 0);
                                   }
                                 });
    }
    return end;
  };
  if (p.rows == kOuterRows) {
    all.template operator()<kOuterRows>(0);
    return;
  }
  constexpr int kRows = __is_same(S, Pair) ? 2 : 1;
  const int64_t done = all.template operator()<kRows>(0);
  if (kRows > 1) all.template operator()<1>(done);
}

template <class T>
void outer(const OuterParams<T>& p) {
  with_type<T>(p.w_type, p.w, [&]<class S>(const S*) { outer_of<T, S>(p); });
}
