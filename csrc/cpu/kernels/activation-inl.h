// The activations. Included by kernels-inl.h, inside its namespace.

// Four sigmoids at once take 32 registers.
template <class T, Activation A>
constexpr bool kFourSigmoids = sizeof(T) == 4 && MOE_VEC_BYTES == 64 && A == Activation::kSwiglu;

template <class T>
struct ActPair {
  Vec<T> value, slope;
};

// Returns value = a(x) and slope = a'(x).
template <class T, Activation A>
inline ActPair<T> activate(Vec<T> x) {
  if constexpr (A == Activation::kSwiglu || A == Activation::kSilu) {
    const Vec<T> s = vsigmoid(x);
    const Vec<T> value = x * s;
    return {value, s + value * (T(1) - s)};
  } else if constexpr (A == Activation::kGeglu || A == Activation::kGelu) {
    const Vec<T> cdf = vnormal_cdf(x);
    const Vec<T> pdf = T(0.3989422804014327) * exponential<T>(T(-0.5) * x * x);
    return {x * cdf, cdf + x * pdf};
  } else if constexpr (A == Activation::kGegluTanh || A == Activation::kGeluTanh) {
    // (1 + tanh(u)) / 2 = sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
    constexpr T c = T(2 * 0.7978845608028654);
    const Vec<T> s = vsigmoid(c * (x + T(0.044715) * x * x * x));
    return {x * s, s + x * s * (T(1) - s) * c * (T(1) + T(3 * 0.044715) * x * x)};
  } else if constexpr (A == Activation::kRelu2) {
    const Vec<T> r = x < T(0) ? Vec<T>{} : x;
    return {r * r, r + r};
  } else {
    const Vec<T> zero = {};
    return {x < T(0) ? zero : x, x > T(0) ? splat<T>(1) : zero};
  }
}

// Processes whole vectors; the tail uses padded copies.
template <class T, Activation A>
inline void act_fwd_loop(const T* gate, const T* up, T* h, int64_t n, T alpha, T limit) {
  constexpr int W = kLanes<T>;
  const auto one = [&](Vec<T> g, Vec<T> u) -> Vec<T> {
    if constexpr (has_limit(A)) {
      g = g > limit ? splat<T>(limit) : g;
      u = u > limit ? splat<T>(limit) : u;
      u = u < -limit ? splat<T>(-limit) : u;
      if constexpr (A == Activation::kSwigluClamped) return u * g * vsigmoid(g);
      return (u + T(1)) * g * vsigmoid(alpha * g);
    } else if constexpr (is_gated(A)) {
      return activate<T, A>(g).value * u;
    } else {
      return activate<T, A>(g).value;
    }
  };
  int64_t i = 0;
  if constexpr (kFourSigmoids<T, A>) {
    for (; i + 4 * W <= n; i += 4 * W) {
      Vec<T> x[4], s[4];
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) x[v] = load<T>(gate + i + v * W);
      sigmoids<4>(x, s);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) store<T>(h + i + v * W, x[v] * s[v] * load<T>(up + i + v * W));
    }
  }
  for (; i + W <= n; i += W) {
    store<T>(h + i, one(load<T>(gate + i), is_gated(A) ? load<T>(up + i) : Vec<T>{}));
  }
  if (i < n) {
    T g[W] = {}, u[W] = {}, out[W];
    for (int64_t j = i; j < n; ++j) {
      g[j - i] = gate[j];
      if (is_gated(A)) u[j - i] = up[j];
    }
    store<T>(out, one(load<T>(g), load<T>(u)));
    for (int64_t j = i; j < n; ++j) h[j] = out[j - i];
  }
}

template <class T, Activation A>
void act_rows_loop(const ActRows<T>& p) {
  for (int64_t r = 0; r < p.rows; ++r) {
    act_fwd_loop<T, A>(p.gate + r * p.ld, p.up + r * p.ld, p.h + r * p.ld_h, p.n, p.alpha, p.limit);
  }
}

// Computes h and the gradients dg and du from the gate g, the up half u and the gradient d of h.
template <class T, Activation A>
inline void act_bwd_vector(Vec<T> g, Vec<T> u, Vec<T> d, T alpha, T limit, Vec<T>& h, Vec<T>& dg,
                           Vec<T>& du) {
  if constexpr (has_limit(A)) {
    constexpr bool kOai = A == Activation::kSwigluOai;
    const T a = kOai ? alpha : T(1), offset = T(kOai ? 1 : 0);
    const Vec<T> zero = {};
    const Vec<T> gc = g > limit ? splat<T>(limit) : g;
    Vec<T> uc = u > limit ? splat<T>(limit) : u;
    uc = (uc < -limit ? splat<T>(-limit) : uc) + offset;
    const Vec<T> s = vsigmoid(a * gc);
    h = uc * gc * s;
    dg = d * uc * s * (T(1) + a * gc * (T(1) - s));
    du = d * gc * s;
    dg = g > limit ? zero : dg;
    du = u > limit ? zero : du;
    du = u < -limit ? zero : du;
  } else {
    const ActPair<T> a = activate<T, A>(g);
    if constexpr (is_gated(A)) {
      h = a.value * u;
      dg = d * u * a.slope;
      du = d * a.value;
    } else {
      h = a.value;
      dg = d * a.slope;
      du = Vec<T>{};
    }
  }
}

// Calls store(i, count, h, dg, du, d) for each vector of rows of n; the last may hold fewer.
template <class T, Activation A, class Store>
inline void act_bwd_loop(const T* gate, const T* up, const T* dh, int64_t n, T alpha, T limit,
                         const Store& store) {
  constexpr int W = kLanes<T>;
  Vec<T> h, dg, du;
  int64_t i = 0;
  if constexpr (kFourSigmoids<T, A>) {
    for (; i + 4 * W <= n; i += 4 * W) {
      Vec<T> x[4], s[4];
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) x[v] = load<T>(gate + i + v * W);
      sigmoids<4>(x, s);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const Vec<T> d = load<T>(dh + i + v * W), u = load<T>(up + i + v * W);
        const Vec<T> value = x[v] * s[v];
        store(i + v * W, W, value * u, d * u * (s[v] + value * (T(1) - s[v])), d * value, d);
      }
    }
  }
  for (; i + W <= n; i += W) {
    const Vec<T> d = load<T>(dh + i);
    act_bwd_vector<T, A>(load<T>(gate + i), is_gated(A) ? load<T>(up + i) : Vec<T>{}, d, alpha,
                         limit, h, dg, du);
    store(i, W, h, dg, du, d);
  }
  if (i < n) {
    T g[W] = {}, u[W] = {}, d[W] = {};
    for (int64_t j = i; j < n; ++j) {
      g[j - i] = gate[j];
      if (is_gated(A)) u[j - i] = up[j];
      d[j - i] = dh[j];
    }
    act_bwd_vector<T, A>(load<T>(g), load<T>(u), load<T>(d), alpha, limit, h, dg, du);
    store(i, static_cast<int>(n - i), h, dg, du, load<T>(d));
  }
}

template <class T>
inline void store_lanes(T* dst, Vec<T> v, int count) {
  if (count == kLanes<T>) return store<T>(dst, v);
  for (int i = 0; i < count; ++i) dst[i] = v[i];
}

template <class T, Activation A>
void act_bwd_row(const ActRowsBwd<T>& p, int64_t r) {
  T* h = p.h == nullptr ? nullptr : p.h + r * p.ld_h;
  T *dgate = p.dgate + r * p.ld_grad, *dup = p.dup + r * p.ld_grad;
  act_bwd_loop<T, A>(p.gate + r * p.ld, p.up + r * p.ld, p.dh + r * p.ld_dh, p.n, p.alpha, p.limit,
                     [&](int64_t i, int count, Vec<T> hv, Vec<T> dg, Vec<T> du, Vec<T>) {
                       if (h != nullptr) store_lanes<T>(h + i, hv, count);
                       store_lanes<T>(dgate + i, dg, count);
                       if (is_gated(A)) store_lanes<T>(dup + i, du, count);
                     });
}

template <class T, Activation A>
void act_bwd_rows_loop(const ActRowsBwd<T>& p) {
  for (int64_t r = 0; r < p.rows; ++r) {
    if (p.dots == nullptr) {
      act_bwd_row<T, A>(p, r);
      continue;
    }
    const T weight = p.weights == nullptr ? T(1) : p.weights[r];
    T *h = p.h + r * p.ld_h, *dgate = p.dgate + r * p.ld_grad, *dup = p.dup + r * p.ld_grad;
    Vec<T> sum = {};
    act_bwd_loop<T, A>(p.gate + r * p.ld, p.up + r * p.ld, p.dh + r * p.ld_dh, p.n, p.alpha,
                       p.limit,
                       [&](int64_t i, int count, Vec<T> hv, Vec<T> dg, Vec<T> du, Vec<T> d) {
                         // Past the end d is 0, and h finite.
                         sum += hv * d;
                         store_lanes<T>(h + i, hv * weight, count);
                         store_lanes<T>(dgate + i, dg * weight, count);
                         if (is_gated(A)) store_lanes<T>(dup + i, du * weight, count);
                       });
    p.dots[r] = horizontal_sum<T>(sum);
  }
}

template <class Fn>
inline void with_activation(Activation kind, const Fn& fn) {
  switch (kind) {
#define MOE_OPS_CASE(name, kind) \
  case Activation::kind:         \
    return fn.template operator()<Activation::kind>();
    MOE_OPS_ACTIVATIONS(MOE_OPS_CASE)
#undef MOE_OPS_CASE
  }
}

template <class T>
void act_rows(const ActRows<T>& p) {
  with_activation(p.kind, [&]<Activation A>() { act_rows_loop<T, A>(p); });
}

template <class T>
void act_bwd_rows(const ActRowsBwd<T>& p) {
  with_activation(p.kind, [&]<Activation A>() { act_bwd_rows_loop<T, A>(p); });
}
