// Steps between the GEMMs of attention: scores to weights, and gradients of weights to gradients of
// scores. Included by kernels-inl.h, inside its namespace.
//
// Lanes are rows of queries and steps are keys, so maxima, sums and running products of a row go
// down its lane, and nothing ever crosses lanes.

// Below this the exponential is not a normal number: such weights are zero.
template <class T>
constexpr T kLogTiny = ExpTraits<T>::kMin;

template <class T>
constexpr T kLowest = sizeof(T) == 8 ? T(-1.7e308) : T(-2.3e38);  // finite times kPowerScale

// Which lanes see key j.
template <class T, int NV>
struct Seen {
  using Int = typename Simd<T>::Int;
  using Index = KeyIndex<T>;
  Int first[NV], last[NV];
  Index begin;
  explicit Seen(const AttentionBlock<T>& b) : begin(b.begin) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      __builtin_memcpy(&first[v], b.first + v * kLanes<T>, sizeof(Int));
      __builtin_memcpy(&last[v], b.last + v * kLanes<T>, sizeof(Int));
    }
  }
  // Returns a where the key is seen, otherwise b.
  Vec<T> select(int64_t j, int v, Vec<T> a, Vec<T> b) const {
    const Int key = static_cast<Index>(begin + static_cast<Index>(j)) - Int{};
    return ((key >= first[v]) & (key < last[v])) ? a : b;
  }
};

// Replaces scores by softcap * tanh(score / softcap).
template <class T>
void cap_scores(T* s, int64_t n, T cap) {
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    store<T>(s + i, cap * vtanh<T>(load<T>(s + i) * (T(1) / cap)));
  }
}

template <class T, int NV, bool kMasked>
bool softmax_block(const AttentionBlock<T>& b, T* s, T* max, T* sum, T* factor) {
  constexpr int W = kLanes<T>;
  constexpr int kChains = 4;  // of maxima a row: one would wait for each comparison
  const Seen<T, NV> seen(b);
  if (b.softcap > 0) cap_scores<T>(s, b.keys * NV * W, b.softcap);
  Vec<T> m[kChains][NV], old[NV], total[NV];
#pragma GCC unroll 2
  for (int v = 0; v < NV; ++v) {
    old[v] = load<T>(max + v * W);
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) m[c][v] = old[v];
  }
  const auto raise = [&](int64_t j, Vec<T>(&most)[NV]) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      Vec<T> x = load<T>(s + (j * NV + v) * W);
      if constexpr (kMasked) x = seen.select(j, v, x, splat<T>(kLowest<T>));
      most[v] = x > most[v] ? x : most[v];
    }
  };
  int64_t j = 0;
  for (; j + kChains <= b.keys; j += kChains) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) raise(j + c, m[c]);
  }
  for (; j < b.keys; ++j) raise(j, m[0]);
  Vec<T> power[NV], shrinks = {};
#pragma GCC unroll 2
  for (int v = 0; v < NV; ++v) {
    const Vec<T> low = m[0][v] > m[1][v] ? m[0][v] : m[1][v];
    const Vec<T> high = m[2][v] > m[3][v] ? m[2][v] : m[3][v];
    const Vec<T> most = low > high ? low : high;
    const Vec<T> f = exponential<T>(old[v] - most);
    store<T>(max + v * W, most);
    store<T>(factor + v * W, f);
    shrinks += T(1) - f;  // none is negative
    total[v] = load<T>(sum + v * W) * f;
    power[v] = most * kPowerScale<T>;
  }
  // Asked before the loop, which needs every register: otherwise the factors are kept until its
  // end.
  bool shrank = horizontal_sum<T>(shrinks) != T(0);
  asm volatile("" : "+r"(shrank));
  for (j = 0; j < b.keys; ++j) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      Vec<T> p = vpower(load<T>(s + (j * NV + v) * W) * kPowerScale<T> - power[v]);
      if constexpr (kMasked) p = seen.select(j, v, p, Vec<T>{});
      total[v] += p;
      store<T>(s + (j * NV + v) * W, p);
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < NV; ++v) store<T>(sum + v * W, total[v]);
  return shrank;
}

template <class T, int NV, bool kMasked, bool kCapped>
void softmax_block_bwd(const AttentionBlock<T>& b, const SoftmaxBwdParams<T>& params) {
  constexpr int W = kLanes<T>;
  T *s = params.s, *p_rows = params.p_rows, *ds_rows = params.ds_rows;
  const T *dp = params.dp, *lse = params.lse, *delta = params.delta;
  const Seen<T, NV> seen(b);
  const T cap = b.softcap, inverse = kCapped ? T(1) / cap : T(0);
  Vec<T> power[NV], d[NV];
#pragma GCC unroll 2
  for (int v = 0; v < NV; ++v) {
    power[v] = load<T>(lse + v * W) * kPowerScale<T>;
    d[v] = load<T>(delta + v * W);
  }
  for (int64_t j = 0; j < b.keys; ++j) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      const int64_t at = (j * NV + v) * W, row = j * kLda + v * W;
      Vec<T> x = load<T>(s + at), slope = {};
      if constexpr (kCapped) {
        const Vec<T> t = vtanh<T>(x * inverse);
        x = cap * t;
        slope = T(1) - t * t;
      }
      Vec<T> p = vpower(x * kPowerScale<T> - power[v]);
      if constexpr (kMasked) p = seen.select(j, v, p, Vec<T>{});
      Vec<T> ds = p * (load<T>(dp + at) - d[v]);
      if constexpr (kCapped) ds = ds * slope;
      // Zero times what is not finite would be no zero.
      if constexpr (kMasked) ds = seen.select(j, v, ds, Vec<T>{});
      store<T>(s + at, ds);
      store<T>(p_rows + row, p);
      store<T>(ds_rows + row, ds);
    }
  }
}

// Walks from the last key to the first. kWeights: s becomes weights; otherwise only log_rest moves.
template <class T, int NV, bool kMasked, bool kWeights>
T stick_block(const AttentionBlock<T>& b, T* s, T* log_rest) {
  constexpr int W = kLanes<T>;
  const Seen<T, NV> seen(b);
  const T cap = b.softcap, inverse = cap > 0 ? T(1) / cap : T(0);
  Vec<T> rest[NV];
#pragma GCC unroll 2
  for (int v = 0; v < NV; ++v) rest[v] = load<T>(log_rest + v * W);
  for (int64_t j = b.keys - 1; j >= 0; --j) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      Vec<T> x = load<T>(s + (j * NV + v) * W);
      if (cap > 0) x = cap * vtanh<T>(x * inverse);
      LogSigmoid<T> l = log_sigmoid<T>(x);
      if constexpr (kMasked) l.rest = seen.select(j, v, l.rest, Vec<T>{});
      if constexpr (kWeights) {
        Vec<T> w = l.z * exponential<T>(rest[v]);
        w = rest[v] < kLogTiny<T> ? Vec<T>{} : w;
        if constexpr (kMasked) w = seen.select(j, v, w, Vec<T>{});
        store<T>(s + (j * NV + v) * W, w);
      }
      rest[v] += l.rest;
    }
  }
  T most = kLowest<T>;
#pragma GCC unroll 2
  for (int v = 0; v < NV; ++v) {
    store<T>(log_rest + v * W, rest[v]);
    for (int i = 0; i < W; ++i)
      most = rest[v][i] > most || rest[v][i] != rest[v][i] ? rest[v][i] : most;
  }
  return most;
}

// Computes gradients of logits. With w = z_j P_j and P_j the product of 1 - z over the keys after
// j, l_j moves w_j by w_j (1 - z_j) and every weight of a key before j, and what remains, by -z_j
// times itself. `before` is the sum of weight times gradient over those; it grows from the first
// key on, so nothing is subtracted from a total.
template <class T, int NV, bool kMasked>
void stick_block_bwd(const AttentionBlock<T>& b, const StickBwdParams<T>& params) {
  constexpr int W = kLanes<T>;
  T *s = params.s, *slopes = params.slopes, *before = params.before;
  T *p_rows = params.p_rows, *ds_rows = params.ds_rows;
  const T *dp = params.dp, *log_rest = params.log_rest;
  const Seen<T, NV> seen(b);
  const T cap = b.softcap, inverse = cap > 0 ? T(1) / cap : T(0);
  Vec<T> rest[NV], sum[NV];
#pragma GCC unroll 2
  for (int v = 0; v < NV; ++v) {
    rest[v] = load<T>(log_rest + v * W);
    sum[v] = load<T>(before + v * W);
  }
  for (int64_t j = b.keys - 1; j >= 0; --j) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      const int64_t at = (j * NV + v) * W;
      Vec<T> x = load<T>(s + at);
      if (cap > 0) {
        const Vec<T> t = vtanh<T>(x * inverse);
        x = cap * t;
        store<T>(slopes + at, T(1) - t * t);
      }
      LogSigmoid<T> l = log_sigmoid<T>(x);
      Vec<T> w = l.z * exponential<T>(rest[v]);
      w = rest[v] < kLogTiny<T> ? Vec<T>{} : w;
      if constexpr (kMasked) {
        w = seen.select(j, v, w, Vec<T>{});
        l.z = seen.select(j, v, l.z, Vec<T>{});
        l.rest = seen.select(j, v, l.rest, Vec<T>{});
      }
      store<T>(s + at, l.z);
      store<T>(p_rows + j * kLda + v * W, w);
      rest[v] += l.rest;
    }
  }
  for (int64_t j = 0; j < b.keys; ++j) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      const int64_t at = (j * NV + v) * W, row = j * kLda + v * W;
      const Vec<T> z = load<T>(s + at);
      Vec<T> g = load<T>(p_rows + row) * load<T>(dp + at);
      if constexpr (kMasked) g = seen.select(j, v, g, Vec<T>{});
      Vec<T> ds = g * (T(1) - z) - z * sum[v];
      sum[v] += g;
      if (cap > 0) ds = ds * load<T>(slopes + at);
      if constexpr (kMasked) ds = seen.select(j, v, ds, Vec<T>{});
      store<T>(s + at, ds);
      store<T>(ds_rows + row, ds);
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < NV; ++v) store<T>(before + v * W, sum[v]);
}

// Computes the sums of the tiles in their order, but each lane sums only the keys that it sees.
// Tiles multiply the others by zero, which is NaN for non-finite values.
template <class T, int NV>
void seen_sums(const AttentionBlock<T>& b, const T* a, int64_t lda, const T* s, int64_t features,
               T* c) {
  constexpr int W = kLanes<T>;
  const Seen<T, NV> seen(b);
  for (int64_t f = 0; f < features; ++f) {
    Vec<T> acc[NV] = {};
    for (int64_t j = 0; j < b.keys; ++j) {
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) {
        const Vec<T> next =
            add_product<T, T, 1>(acc[v], a + j * lda + f, load<T>(s + (j * NV + v) * W));
        acc[v] = seen.select(j, v, next, acc[v]);
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      T* out = c + (f * NV + v) * W;
      store<T>(out, load<T>(out) + acc[v]);
    }
  }
}

template <class T>
bool all_finite(const T* x, int64_t n) {
  constexpr int W = kLanes<T>;
  Vec<T> zero[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) zero[c] += load<T>(x + i + c * W) * T(0);
  }
  T rest = horizontal_sum<T>((zero[0] + zero[1]) + (zero[2] + zero[3]));
  for (; i < n; ++i) rest += x[i] * T(0);
  return rest == T(0);
}

template <class T>
void multiply_columns(T* c, int64_t rows, int width, const T* factor) {
  constexpr int W = kLanes<T>;
  for (int v = 0; v < width; v += W) {
    const Vec<T> f = load<T>(factor + v);
    for (int64_t i = 0; i < rows; ++i) store<T>(c + i * width + v, load<T>(c + i * width + v) * f);
  }
}

template <class T>
void softmax_end(int64_t n, const T* max, const T* sum, T* lse, T* factor) {
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    // total - total: NaN stays NaN.
    const Vec<T> total = load<T>(sum + i), none = splat<T>(-__builtin_inf());
    store<T>(lse + i, total == T(0) ? none : load<T>(max + i) + vlog(total) + (total - total));
    store<T>(factor + i, total == T(0) ? Vec<T>{} : T(1) / total);
  }
}

template <class T>
void row_dots(const RowDotsParams<T>& p) {
  constexpr int W = kLanes<T>;
  const int64_t n = p.n;
  with_type<T>(p.type, p.a, [&]<class S>(const S* pa) {
    const S* pb = static_cast<const S*>(p.b);
    for (int64_t r = 0; r < p.rows; ++r, pa += p.lda, pb += p.ldb) {
      Vec<T> s0 = {}, s1 = {};
      int64_t i = 0;
      for (; i + 2 * W <= n; i += 2 * W) {
        s0 += load_as(pa + i) * load_as(pb + i);
        s1 += load_as(pa + i + W) * load_as(pb + i + W);
      }
      if (i + W <= n) {
        s0 += load_as(pa + i) * load_as(pb + i);
        i += W;
      }
      T s = horizontal_sum<T>(s0 + s1);
      for (; i < n; ++i) s += to_float(pa[i]) * to_float(pb[i]);
      p.out[r] = s;
    }
  });
}

// Calls fn.template operator()<NV, kMasked>().
template <class T, class Fn>
inline auto with_block(const AttentionBlock<T>& b, const Fn& fn) {
  const bool two = b.width > kLanes<T>;
  if (b.masked) return two ? fn.template operator()<2, true>() : fn.template operator()<1, true>();
  return two ? fn.template operator()<2, false>() : fn.template operator()<1, false>();
}

template <class T>
AttentionKernels<T> attention_steps() {
  AttentionKernels<T> k = {};
  k.log_tiny = kLogTiny<T>;
  k.lowest = kLowest<T>;
  k.softmax = [](const AttentionBlock<T>& b, T* s, T* max, T* sum, T* factor) {
    return with_block(b, [&]<int NV, bool kMasked>() {
      return softmax_block<T, NV, kMasked>(b, s, max, sum, factor);
    });
  };
  k.softmax_bwd = [](const AttentionBlock<T>& b, const SoftmaxBwdParams<T>& p) {
    with_block(b, [&]<int NV, bool kMasked>() {
      b.softcap > 0 ? softmax_block_bwd<T, NV, kMasked, true>(b, p)
                    : softmax_block_bwd<T, NV, kMasked, false>(b, p);
    });
  };
  k.stick = [](const AttentionBlock<T>& b, T* s, T* log_rest) {
    return with_block(b, [&]<int NV, bool kMasked>() {
      return stick_block<T, NV, kMasked, true>(b, s, log_rest);
    });
  };
  k.stick_rest = [](const AttentionBlock<T>& b, T* s, T* log_rest) {
    return with_block(b, [&]<int NV, bool kMasked>() {
      return stick_block<T, NV, kMasked, false>(b, s, log_rest);
    });
  };
  k.stick_bwd = [](const AttentionBlock<T>& b, const StickBwdParams<T>& p) {
    with_block(b, [&]<int NV, bool kMasked>() { stick_block_bwd<T, NV, kMasked>(b, p); });
  };
  k.seen_sums = [](const AttentionBlock<T>& b, const T* a, int64_t lda, const T* s,
                   int64_t features, T* c) {
    b.width > kLanes<T> ? seen_sums<T, 2>(b, a, lda, s, features, c)
                        : seen_sums<T, 1>(b, a, lda, s, features, c);
  };
  k.all_finite = &all_finite<T>;
  k.multiply_columns = &multiply_columns<T>;
  k.softmax_end = &softmax_end<T>;
  k.row_dots = &row_dots<T>;
  return k;
}
