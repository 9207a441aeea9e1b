// Softmax attention of narrow heads, for targets with 32 registers: one vector of rows, whose sums
// over keys stay in registers, and kNarrowKeys keys at a time, whose scores never leave them
// either. Included by kernels-inl.h, inside its namespace.

#if defined(__AVX512F__) && MOE_VEC_BYTES == 64

// Weights may grow to 2^kRise (fp64: e^kRise) before sums are scaled down: the type has the range,
// and rows hardly ever get there after their first keys.
template <class T>
constexpr T kRise = 8;

inline bool any_greater(Vec<float> a, Vec<float> b) {
  return _mm512_cmp_ps_mask(__builtin_bit_cast(__m512, a), __builtin_bit_cast(__m512, b),
                            _CMP_GT_OQ) != 0;
}
inline bool any_greater(Vec<double> a, Vec<double> b) {
  return _mm512_cmp_pd_mask(__builtin_bit_cast(__m512d, a), __builtin_bit_cast(__m512d, b),
                            _CMP_GT_OQ) != 0;
}

// Computes x[n] += <rows of a, b>: a [kNarrowKeys][kNarrowSize], b [D][lanes].
template <class T, int D>
inline __attribute__((always_inline)) void narrow_products(const T* a, const T* b,
                                                           Vec<T> (&x)[kNarrowKeys]) {
#pragma GCC unroll 16
  for (int f = 0; f < D; ++f) {
    const Vec<T> bv = load<T>(b + f * kLanes<T>);
#pragma GCC unroll 8
    for (int n = 0; n < kNarrowKeys; ++n) x[n] += splat<T>(a[n * kNarrowSize + f]) * bv;
  }
}

// sums[f] += the sum over keys of a[n][f] * x[n]
template <class T, int D>
inline __attribute__((always_inline)) void narrow_sums(const T* a, const Vec<T> (&x)[kNarrowKeys],
                                                       Vec<T> (&sums)[D]) {
#pragma GCC unroll 8
  for (int n = 0; n < kNarrowKeys; ++n) {
#pragma GCC unroll 16
    for (int f = 0; f < D; ++f) sums[f] += splat<T>(a[n * kNarrowSize + f]) * x[n];
  }
}

// Like narrow_sums, but each row sums only the keys that it sees.
template <class T, int D>
inline void narrow_seen_sums(const Seen<T, 1>& seen, int64_t j, const T* a,
                             const Vec<T> (&x)[kNarrowKeys], Vec<T> (&sums)[D]) {
  for (int n = 0; n < kNarrowKeys; ++n) {
#pragma GCC unroll 16
    for (int f = 0; f < D; ++f) {
      const Vec<T> next = add_product<T, T, 1>(sums[f], a + n * kNarrowSize + f, x[n]);
      sums[f] = seen.select(j + n, 0, next, sums[f]);
    }
  }
}

// Keys that are fewer than a step, with zeros after them.
template <class T>
struct NarrowTail {
  T rows[kNarrowKeys * kNarrowSize];
  const T* copy(const T* from, int64_t keys) {
    if (keys >= kNarrowKeys) return from;
    constexpr int64_t kStep = kLanes<T>;
    for (int64_t i = 0; i < kNarrowKeys * kNarrowSize; i += kStep) {
      store<T>(rows + i, i < keys * kNarrowSize ? load<T>(from + i) : Vec<T>{});
    }
    return rows;
  }
};

// Returns the keys that rows see, limited to the block, since a step may reach into the next one.
template <class T>
inline Seen<T, 1> narrow_seen(const AttentionBlock<T>& b) {
  Seen<T, 1> seen(b);
  const auto end = static_cast<KeyIndex<T>>(b.begin + static_cast<KeyIndex<T>>(b.keys)) -
                   typename Simd<T>::Int{};
  seen.last[0] = seen.last[0] < end ? seen.last[0] : end;
  return seen;
}

// Calls step.template operator()<kMasked>(first key) for the keys of b.
template <class T, class Step>
inline __attribute__((always_inline)) void narrow_steps(const AttentionBlock<T>& b,
                                                        const Step& step) {
  for (int64_t j = b.start;; j += kNarrowKeys) {
    for (; j >= b.all_first && j + kNarrowKeys <= b.all_last; j += kNarrowKeys) {
      step.template operator()<false>(j);
    }
    if (j >= b.keys) break;
    step.template operator()<true>(j);
  }
}

template <class T, int D, bool kApart>
void narrow(const AttentionBlock<T>& b, const NarrowParams<T>& p) {
  constexpr int W = kLanes<T>;
  const T *keys = p.keys, *values = p.values, *q = p.q;
  T *out = p.out, *max = p.max, *sum = p.sum;
  const Seen<T, 1> seen = narrow_seen(b);
  NarrowTail<T> key_tail, value_tail;
  Vec<T> acc[D];
#pragma GCC unroll 16
  for (int f = 0; f < D; ++f) acc[f] = load<T>(out + f * W);
  Vec<T> total = load<T>(sum), most = load<T>(max);
  Vec<T> limit = most == kLowest<T> ? most : splat<T>(kRise<T>);
  Vec<T> minus = most == kLowest<T> ? Vec<T>{} : -most;
  const auto step = [&]<bool kMasked>(int64_t j) __attribute__((always_inline)) {
    const T *key = keys + j * kNarrowSize, *value = values + j * kNarrowSize;
    if constexpr (kMasked) {
      key = key_tail.copy(key, b.keys - j);
      value = value_tail.copy(value, b.keys - j);
    }
    Vec<T> x[kNarrowKeys];
#pragma GCC unroll 8
    for (int n = 0; n < kNarrowKeys; ++n) x[n] = minus;
    narrow_products<T, D>(key, q, x);
    if constexpr (kMasked) {
#pragma GCC unroll 8
      for (int n = 0; n < kNarrowKeys; ++n) x[n] = seen.select(j + n, 0, x[n], splat(kLowest<T>));
    }
    Vec<T> high[kNarrowKeys / 2];
#pragma GCC unroll 4
    for (int n = 0; n < kNarrowKeys / 2; ++n)
      high[n] = x[2 * n] > x[2 * n + 1] ? x[2 * n] : x[2 * n + 1];
    high[0] = high[0] > high[1] ? high[0] : high[1];
    high[2] = high[2] > high[3] ? high[2] : high[3];
    high[0] = high[0] > high[2] ? high[0] : high[2];
    if (__builtin_expect(any_greater(high[0], limit), 0)) {
      const Vec<T> rise = high[0] > limit ? high[0] : Vec<T>{};
      // Sums that have not begun are zero, and their factor only has to be finite.
      const Vec<T> factor = rise > T(0) ? vpower(-rise) : splat<T>(1);
      limit = high[0] > limit ? splat<T>(kRise<T>) : limit;
      minus -= rise;
      total *= factor;
#pragma GCC unroll 16
      for (int f = 0; f < D; ++f) acc[f] *= factor;
#pragma GCC unroll 8
      for (int n = 0; n < kNarrowKeys; ++n) x[n] -= rise;
    }
#pragma GCC unroll 8
    for (int n = 0; n < kNarrowKeys; ++n) {
      x[n] = vpower(x[n]);
      if constexpr (kMasked) x[n] = seen.select(j + n, 0, x[n], Vec<T>{});
      total += x[n];
    }
    if constexpr (kApart && kMasked) {
      narrow_seen_sums<T, D>(seen, j, value, x, acc);
    } else {
      narrow_sums<T, D>(value, x, acc);
    }
  };
  narrow_steps<T>(b, step);
#pragma GCC unroll 16
  for (int f = 0; f < D; ++f) store<T>(out + f * W, acc[f]);
  store<T>(sum, total);
  store<T>(max, limit == kLowest<T> ? limit : -minus);
}

template <class T, int D, bool kApart>
void narrow_bwd(const AttentionBlock<T>& b, const NarrowBwdParams<T>& params) {
  constexpr int W = kLanes<T>;
  const T *keys = params.keys, *values = params.values, *q = params.q, *lse = params.lse;
  const T *grad_out = params.grad_out, *delta = params.delta;
  T *grad_q = params.grad_q, *p_rows = params.p_rows, *ds_rows = params.ds_rows;
  const Seen<T, 1> seen = narrow_seen(b);
  NarrowTail<T> key_tail, value_tail;
  Vec<T> acc[D];
#pragma GCC unroll 16
  for (int f = 0; f < D; ++f) acc[f] = load<T>(grad_q + f * W);
  const Vec<T> power = load<T>(lse) * -kPowerScale<T>, less = -load<T>(delta);
  const auto step = [&]<bool kMasked>(int64_t j) __attribute__((always_inline)) {
    const T *key = keys + j * kNarrowSize, *value = values + j * kNarrowSize;
    if constexpr (kMasked) {
      key = key_tail.copy(key, b.keys - j);
      value = value_tail.copy(value, b.keys - j);
    }
    T *p = p_rows + j * kLda, *ds = ds_rows + j * kLda;
    Vec<T> x[kNarrowKeys], g[kNarrowKeys];
#pragma GCC unroll 8
    for (int n = 0; n < kNarrowKeys; ++n) x[n] = power;
    narrow_products<T, D>(key, q, x);
#pragma GCC unroll 8
    for (int n = 0; n < kNarrowKeys; ++n) {
      x[n] = vpower(x[n]);
      if constexpr (kMasked) x[n] = seen.select(j + n, 0, x[n], Vec<T>{});
      store<T>(p + n * kLda, x[n]);
    }
    // Weights are read again below. Kept, they would leave the products 8 registers too few, and
    // the compiler would move sums to the stack and back: twice the time.
    asm volatile("" ::: "memory");
#pragma GCC unroll 8
    for (int n = 0; n < kNarrowKeys; ++n) g[n] = less;
    narrow_products<T, D>(value, grad_out, g);
    asm volatile("" ::: "memory");
#pragma GCC unroll 8
    for (int n = 0; n < kNarrowKeys; ++n) {
      g[n] *= load<T>(p + n * kLda);
      if constexpr (kMasked) g[n] = seen.select(j + n, 0, g[n], Vec<T>{});
      store<T>(ds + n * kLda, g[n]);
    }
    if constexpr (kApart && kMasked) {
      narrow_seen_sums<T, D>(seen, j, key, g, acc);
    } else {
      narrow_sums<T, D>(key, g, acc);
    }
  };
  narrow_steps<T>(b, step);
#pragma GCC unroll 16
  for (int f = 0; f < D; ++f) store<T>(grad_q + f * W, acc[f]);
}

#endif

template <class T>
AttentionKernels<T> attention_table() {
  AttentionKernels<T> k = attention_steps<T>();
#if defined(__AVX512F__) && MOE_VEC_BYTES == 64
  k.narrow_size = kNarrowSize;
  k.power_scale = kPowerScale<T>;
  k.narrow = [](const AttentionBlock<T>& b, const NarrowParams<T>& p) {
    auto* run = p.size <= 8 ? &narrow<T, 8, false> : &narrow<T, 16, false>;
    if (b.apart) run = p.size <= 8 ? &narrow<T, 8, true> : &narrow<T, 16, true>;
    run(b, p);
  };
  k.narrow_bwd = [](const AttentionBlock<T>& b, const NarrowBwdParams<T>& p) {
    auto* run = p.size <= 8 ? &narrow_bwd<T, 8, false> : &narrow_bwd<T, 16, false>;
    if (b.apart) run = p.size <= 8 ? &narrow_bwd<T, 8, true> : &narrow_bwd<T, 16, true>;
    run(b, p);
  };
#endif
  return k;
}
