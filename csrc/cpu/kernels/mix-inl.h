// Mixtures of what all experts made of a token. Included by kernels-inl.h, inside its namespace.
// Rows of experts and mixtures lie `ld` apart, a multiple of lanes; every n is one too.

template <class T, MixActivation A>
inline ActPair<T> mix_activate(Vec<T> x) {
  if constexpr (A == MixActivation::kRelu) {
    return activate<T, Activation::kRelu>(x);
  } else if constexpr (A == MixActivation::kSilu) {
    const Vec<T> s = exact_sigmoid<T>(x);
    return {x * s, s * (T(1) + x * (T(1) - s))};
  } else if constexpr (A == MixActivation::kSigmoid) {
    const Vec<T> s = exact_sigmoid<T>(x);
    return {s, s * (T(1) - s)};
  } else {
    return {x, splat<T>(1)};
  }
}

// Computes z = act(n) of the normalized n, and its slope if wanted.
template <class T, MixActivation A, bool kNorm>
void mix_act_loop(const MixNormRows<T>& norm, const T* x, int64_t n, T* z, T* slope) {
  constexpr int W = kLanes<T>;
  for (int64_t i = 0; i < n; i += W) {
    Vec<T> v = load<T>(x + i);
    if constexpr (kNorm) {
      v = (v - load<T>(norm.mean + i)) * load<T>(norm.scale + i) + load<T>(norm.shift + i);
    }
    const ActPair<T> a = mix_activate<T, A>(v);
    store<T>(z + i, a.value);
    if (slope != nullptr) store<T>(slope + i, a.slope);
  }
}

template <class T>
void mix_act(MixActivation kind, const MixNormRows<T>& norm, const T* x, int64_t n, T* z,
             T* slope) {
  using enum MixActivation;
  with_value<kNone, kRelu, kSilu, kSigmoid>(kind, [&]<MixActivation A>() {
    norm.mean != nullptr ? mix_act_loop<T, A, true>(norm, x, n, z, slope)
                         : mix_act_loop<T, A, false>(norm, x, n, z, slope);
  });
}

// Computes c[i*ld + j] = sum_k a[i*step_i + k*step_k] * b[k*ld + j] for i < M and NV vectors of j.
template <class T, int M, int NV>
inline void mix_tile(int64_t depth, const T* a, int64_t step_i, int64_t step_k, const T* b, T* c,
                     int64_t ld) {
  constexpr int W = kLanes<T>;
  Vec<T> acc[M][NV];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[i][v] = Vec<T>{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> bv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) bv[v] = load<T>(b + k * ld + v * W);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const Vec<T> av = splat<T>(a[i * step_i + k * step_k]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[i][v] += av * bv[v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store<T>(c + i * ld + v * W, acc[i][v]);
  }
}

template <class T, int M>
inline void mix_tile_rows(int64_t depth, const T* a, int64_t step_i, int64_t step_k, const T* b,
                          T* c, int64_t ld) {
  constexpr int W = kLanes<T>, NV = M >= 8 ? 1 : M >= 4 ? 2 : 4;
  int64_t j = 0;
  for (; j + NV * W <= ld; j += NV * W) {
    mix_tile<T, M, NV>(depth, a, step_i, step_k, b + j, c + j, ld);
  }
  for (; j < ld; j += W) mix_tile<T, M, 1>(depth, a, step_i, step_k, b + j, c + j, ld);
}

// Computes the product for any number of rows; ld is a multiple of lanes.
template <class T>
void mix_product(const MixProduct<T>& p) {
  const int64_t rows = p.rows, depth = p.depth, step_i = p.step_i, step_k = p.step_k, ld = p.ld;
  const T *a = p.a, *b = p.b;
  T* c = p.c;
  int64_t i = 0;
  for (; i + 8 <= rows; i += 8) {
    mix_tile_rows<T, 8>(depth, a + i * step_i, step_i, step_k, b, c + i * ld, ld);
  }
  for (; i + 4 <= rows; i += 4) {
    mix_tile_rows<T, 4>(depth, a + i * step_i, step_i, step_k, b, c + i * ld, ld);
  }
  for (; i < rows; ++i) {
    mix_tile_rows<T, 1>(depth, a + i * step_i, step_i, step_k, b, c + i * ld, ld);
  }
}

// Computes out[e] = sum_j g[j] * z[e*ld + j] for e < N.
template <class T, int N>
inline void mix_dots(const T* g, const T* z, T* out, int64_t ld) {
  constexpr int W = kLanes<T>;
  Vec<T> acc[W];
#pragma GCC unroll 16
  for (int e = 0; e < W; ++e) acc[e] = Vec<T>{};
  for (int64_t j = 0; j < ld; j += W) {
    const Vec<T> gv = load<T>(g + j);
#pragma GCC unroll 16
    for (int e = 0; e < N; ++e) acc[e] += gv * load<T>(z + e * ld + j);
  }
  if constexpr (N <= 2) {
    for (int e = 0; e < N; ++e) out[e] = horizontal_sum<T>(acc[e]);
  } else {
    const Vec<T> sums = sums_of_lanes<T>(acc);
    if constexpr (N == W) {
      store<T>(out, sums);
    } else {
      T all[W];
      store<T>(all, sums);
      for (int e = 0; e < N; ++e) out[e] = all[e];
    }
  }
}

// Computes out[i*count + e] = sum_j g[i*ld + j] * z[e*ld + j] for i < rows, e < count.
template <class T>
void mix_weight_grads(int64_t rows, int64_t count, const T* g, const T* z, T* out, int64_t ld) {
  constexpr int W = kLanes<T>;
  for (int64_t i = 0; i < rows; ++i, g += ld, out += count) {
    int64_t e = 0;
    for (; e + W <= count; e += W) mix_dots<T, W>(g, z + e * ld, out + e, ld);
    if constexpr (W > 8) {
      for (; e + 8 <= count; e += 8) mix_dots<T, 8>(g, z + e * ld, out + e, ld);
    }
    if constexpr (W > 4) {
      for (; e + 4 <= count; e += 4) mix_dots<T, 4>(g, z + e * ld, out + e, ld);
    }
    if constexpr (W > 2) {
      for (; e + 2 <= count; e += 2) mix_dots<T, 2>(g, z + e * ld, out + e, ld);
    }
    for (; e < count; ++e) mix_dots<T, 1>(g, z + e * ld, out + e, ld);
  }
}

// Replaces d by d * slope, and with sums: sum += d, sum_x += d * (x - mean).
template <class T>
void mix_slope(const MixSlope<T>& p) {
  constexpr int W = kLanes<T>;
  const T *slope = p.slope, *mean = p.mean, *x = p.x;
  T *d = p.d, *sum = p.sum, *sum_x = p.sum_x;
  const int64_t n = p.n;
  for (int64_t i = 0; i < n; i += W) {
    const Vec<T> v = load<T>(d + i) * load<T>(slope + i);
    store<T>(d + i, v);
    if (sum != nullptr) {
      store<T>(sum + i, load<T>(sum + i) + v);
      store<T>(sum_x + i, load<T>(sum_x + i) + v * (load<T>(x + i) - load<T>(mean + i)));
    }
  }
}

// Computes out[i] = scale[i] * (d[i] - at[i] - by[i] * (x[i] - mean[i])), at == nullptr: scale[i] *
// d[i].
template <class T>
void mix_norm_grad(const MixNormGrad<T>& params) {
  constexpr int W = kLanes<T>;
  const auto [n, norm, at, by, x, d, out] = params;
  for (int64_t i = 0; i < n; i += W) {
    Vec<T> v = load<T>(d + i);
    if (at != nullptr) {
      v = v - load<T>(at + i) - load<T>(by + i) * (load<T>(x + i) - load<T>(norm.mean + i));
    }
    store<T>(out + i, v * load<T>(norm.scale + i));
  }
}

// Means and sums of squared distances from them, over `count` rows of n: two passes in cache.
template <class T>
void mix_moments(int64_t count, int64_t n, const T* x, T* mean, T* squares) {
  constexpr int W = kLanes<T>;
  for (int64_t i = 0; i < n; i += W) store<T>(mean + i, load<T>(x + i));
  for (int64_t r = 1; r < count; ++r) {
    for (int64_t i = 0; i < n; i += W) {
      store<T>(mean + i, load<T>(mean + i) + load<T>(x + r * n + i));
    }
  }
  for (int64_t i = 0; i < n; i += W) {
    store<T>(mean + i, load<T>(mean + i) / T(count));
    store<T>(squares + i, Vec<T>{});
  }
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t i = 0; i < n; i += W) {
      const Vec<T> d = load<T>(x + r * n + i) - load<T>(mean + i);
      store<T>(squares + i, load<T>(squares + i) + d * d);
    }
  }
}

template <class T>
MixKernels<T> mix_table() {
  return {&mix_act<T>,   &mix_product<T>,   &mix_weight_grads<T>,
          &mix_slope<T>, &mix_norm_grad<T>, &mix_moments<T>};
}
