// Products that read weights as they lie, for few rows. Included by kernels-inl.h, inside its
// namespace.

constexpr int64_t kDotAhead = 2048;  // bytes

// F weight rows and M tokens, vectors along k: F streams of weights, each read once.
template <class T, class S, int F, int M>
void dot_tile(int64_t k, const S* w, int64_t ldw, const T* x, int64_t ldx, T* out, int64_t ldo,
              int64_t out_step) {
  constexpr int W = kLanes<T>;
  Vec<T> acc[F][M];
#pragma GCC unroll 4
  for (int f = 0; f < F; ++f) {
#pragma GCC unroll 4
    for (int t = 0; t < M; ++t) acc[f][t] = Vec<T>{};
  }
  const int64_t whole = k / W * W;
  for (int64_t i = 0; i < whole; i += W) {
    Vec<T> xv[M];
#pragma GCC unroll 4
    for (int t = 0; t < M; ++t) xv[t] = load<T>(x + t * ldx + i);
#pragma GCC unroll 4
    for (int f = 0; f < F; ++f) {
      // With one token the core's window reaches far enough ahead by itself.
      if constexpr (M > 1) __builtin_prefetch(w + f * ldw + i + kDotAhead / sizeof(S), 0, 2);
      const Vec<T> wv = load_as(w + f * ldw + i);
#pragma GCC unroll 4
      for (int t = 0; t < M; ++t) acc[f][t] += wv * xv[t];
    }
  }
  if (whole < k) {
    for (int f = 0; f < F; ++f) {
      S tail[W] = {};
      for (int64_t i = whole; i < k; ++i) tail[i - whole] = w[f * ldw + i];
      const Vec<T> wv = load_as(tail);
      for (int t = 0; t < M; ++t) acc[f][t] += wv * load<T>(x + t * ldx + whole);
    }
  }
#pragma GCC unroll 4
  for (int f = 0; f < F; ++f) {
#pragma GCC unroll 4
    for (int t = 0; t < M; ++t) out[t * ldo + f * out_step] = horizontal_sum<T>(acc[f][t]);
  }
}

template <class T, class S, int F>
void dot_tokens(int tokens, int64_t k, const S* w, int64_t ldw, const T* x, int64_t ldx, T* out,
                int64_t ldo, int64_t out_step) {
  if constexpr (MOE_DOT_TOKENS >= 4) {
    if (tokens == 4) return dot_tile<T, S, F, 4>(k, w, ldw, x, ldx, out, ldo, out_step);
    if (tokens == 3) return dot_tile<T, S, F, 3>(k, w, ldw, x, ldx, out, ldo, out_step);
  }
  if (tokens == 2) return dot_tile<T, S, F, 2>(k, w, ldw, x, ldx, out, ldo, out_step);
  dot_tile<T, S, F, 1>(k, w, ldw, x, ldx, out, ldo, out_step);
}

template <class T>
void dot(DType w_type, int features, int tokens, int64_t k, const void* w, int64_t ldw, const T* x,
         int64_t ldx, T* out, int64_t ldo, int64_t out_step) {
  with_type<T>(w_type, w, [&]<class S>(const S* p) {
    if (features == 4) {
      dot_tokens<T, S, 4>(tokens, k, p, ldw, x, ldx, out, ldo, out_step);
    } else {
      for (int f = 0; f < features; ++f) {
        dot_tokens<T, S, 1>(tokens, k, p + f * ldw, ldw, x, ldx, out + f * out_step, ldo, 0);
      }
    }
  });
}

// R weight rows, dense along the output, and M tokens: the sums pass through registers once in R
// steps of k, and each weight row is read in one run.
template <class T, class S, int M, int R>
void rank_tile(const S* w, int64_t ldw, const T* a, int64_t lda, T* c, int64_t ldc, int64_t n,
               bool accumulate) {
  constexpr int W = kLanes<T>;
  Vec<T> av[M][R];
#pragma GCC unroll 4
  for (int t = 0; t < M; ++t) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) av[t][r] = splat<T>(a[t * lda + r]);
  }
  const auto block = [&](const S* p, int64_t ld, T* out, int64_t ldo) {
    Vec<T> acc[M];
#pragma GCC unroll 4
    for (int t = 0; t < M; ++t) acc[t] = accumulate ? load<T>(out + t * ldo) : Vec<T>{};
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<T> wv = load_as(p + r * ld);
#pragma GCC unroll 4
      for (int t = 0; t < M; ++t) acc[t] += av[t][r] * wv;
    }
#pragma GCC unroll 4
    for (int t = 0; t < M; ++t) store<T>(out + t * ldo, acc[t]);
  };
  int64_t j = 0;
  for (; j + W <= n; j += W) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) __builtin_prefetch(w + (r + R) * ldw + j, 0, 2);
    block(w + j, ldw, c + j, ldc);
  }
  if (j < n) {
    S tail[R][W] = {};
    T out[M][W] = {};
    for (int64_t i = j; i < n; ++i) {
      for (int r = 0; r < R; ++r) tail[r][i - j] = w[r * ldw + i];
      for (int t = 0; t < M && accumulate; ++t) out[t][i - j] = c[t * ldc + i];
    }
    block(tail[0], W, out[0], W);
    for (int64_t i = j; i < n; ++i) {
      for (int t = 0; t < M; ++t) c[t * ldc + i] = out[t][i - j];
    }
  }
}

template <class T>
void rank_update(DType w_type, int rows, int64_t tokens, const void* w, int64_t ldw, const T* a,
                 int64_t lda, T* c, int64_t ldc, int64_t n, bool accumulate) {
  with_type<T>(w_type, w, [&]<class S>(const S* p) {
    const auto all = [&]<int R>(const S* q, const T* b, bool add) {
      int64_t t = 0;
      if constexpr (MOE_DOT_TOKENS >= 4) {
        for (; t + 4 <= tokens; t += 4) {
          rank_tile<T, S, 4, R>(q, ldw, b + t * lda, lda, c + t * ldc, ldc, n, add);
        }
      }
      for (; t + 2 <= tokens; t += 2) {
        rank_tile<T, S, 2, R>(q, ldw, b + t * lda, lda, c + t * ldc, ldc, n, add);
      }
      if (t < tokens) rank_tile<T, S, 1, R>(q, ldw, b + t * lda, lda, c + t * ldc, ldc, n, add);
    };
    if (rows == kRankRows) {
      all.template operator()<kRankRows>(p, a, accumulate);
    } else {
      for (int r = 0; r < rows; ++r) {
        all.template operator()<1>(p + r * ldw, a + r, accumulate || r > 0);
      }
    }
  });
}
