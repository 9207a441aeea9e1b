// The exponential, the normal distribution, and the activations made of them. Included by
// kernels-inl.h, inside its namespace.

template <class T>
struct ExpTraits;

template <>
struct ExpTraits<float> {
  using Int = int32_t;
  static constexpr float kMax = 88.37f, kMin = -87.33f;
  static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLn2Hi = 0.693145751953125f, kLn2Lo = 1.42860677e-6f;
  static constexpr int kBias = 127, kMantissa = 23, kDegree = 7;
};

template <>
struct ExpTraits<double> {
  using Int = int64_t;
  static constexpr double kMax = 709.0, kMin = -708.0;
  static constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2Hi = 0.6931471803691238, kLn2Lo = 1.9082149292705877e-10;
  static constexpr int kBias = 1023, kMantissa = 52, kDegree = 13;
};

constexpr double inverse_factorial(int n) { return n < 2 ? 1.0 : inverse_factorial(n - 1) / n; }

// e^x = 2^n e^r with |r| <= ln(2)/2; the Taylor sum of kDegree leaves less than half an ulp.
// Arguments are clamped to the range of normal results; NaN stays NaN.
template <class T>
inline Vec<T> vexp(Vec<T> x) {
  using Tr = ExpTraits<T>;
  using Int = typename Simd<T>::Int;
  using Scalar = typename Tr::Int;
  x = x > Tr::kMax ? splat<T>(Tr::kMax) : x;
  x = x < Tr::kMin ? splat<T>(Tr::kMin) : x;
  const Vec<T> shifted = x * T(1.4426950408889634) + Tr::kMagic;
  const Vec<T> n = shifted - Tr::kMagic;
  Vec<T> r = x - n * Tr::kLn2Hi;
  r = r - n * Tr::kLn2Lo;
  // Coefficients 1 / d!: one multiply-add a degree.
  Vec<T> p = splat<T>(T(inverse_factorial(Tr::kDegree)));
#pragma GCC unroll 16
  for (int d = Tr::kDegree - 1; d >= 0; --d) p = p * r + T(inverse_factorial(d));
  const Int bits = __builtin_bit_cast(Int, shifted) - __builtin_bit_cast(Scalar, T(Tr::kMagic)) +
                   Scalar(Tr::kBias);
  return p * __builtin_bit_cast(Vec<T>, bits << Tr::kMantissa);
}

// The larger and the smaller one; NaN if x is. The compiler makes two operations of the
// conditional.
inline Vec<float> at_least(Vec<float> x, float least) {
#if defined(__AVX512F__) && MOE_VEC_BYTES == 64
  return __builtin_bit_cast(Vec<float>,
                            _mm512_max_ps(_mm512_set1_ps(least), __builtin_bit_cast(__m512, x)));
#elif defined(__AVX2__) && MOE_VEC_BYTES == 32
  return __builtin_bit_cast(Vec<float>,
                            _mm256_max_ps(_mm256_set1_ps(least), __builtin_bit_cast(__m256, x)));
#else
  return x < least ? splat<float>(least) : x;
#endif
}

inline Vec<float> at_most(Vec<float> x, float most) {
#if defined(__AVX512F__) && MOE_VEC_BYTES == 64
  return __builtin_bit_cast(Vec<float>,
                            _mm512_min_ps(_mm512_set1_ps(most), __builtin_bit_cast(__m512, x)));
#elif defined(__AVX2__) && MOE_VEC_BYTES == 32
  return __builtin_bit_cast(Vec<float>,
                            _mm256_min_ps(_mm256_set1_ps(most), __builtin_bit_cast(__m256, x)));
#else
  return x > most ? splat<float>(most) : x;
#endif
}

// 2^x = 2^n 2^r with |r| <= 1/2, from x + kPowerMagic and r. The number added to round x carries
// the bias of the exponent, so a shift alone makes 2^n.
constexpr float kPowerMagic = ExpTraits<float>::kMagic + ExpTraits<float>::kBias;

inline Vec<float> power_of_whole(Vec<float> shifted) {
  return __builtin_bit_cast(Vec<float>, __builtin_bit_cast(Simd<float>::Int, shifted)
                                            << ExpTraits<float>::kMantissa);
}

// 2^r: the polynomial has the least relative error, 9e-8, of those of its degree that are one at
// zero.
constexpr float kPowers[] = {1.32647273e-3f, 9.67151299e-3f, 5.55073358e-2f,
                             0.240222424f,   0.693147004f,   1.0f};

inline Vec<float> power_of_rest(Vec<float> r) {
  Vec<float> p = splat<float>(kPowers[0]);
#pragma GCC unroll 5
  for (int d = 1; d < 6; ++d) p = p * r + kPowers[d];
  return p;
}

// 1 / d for normal d up to 2^126. A division of 16 floats takes 16 cycles; an estimate of 14 bits
// and a step of Newton's method, which squares its error, 2 and 2.
inline Vec<float> reciprocal(Vec<float> d) {
#if defined(__AVX512F__) && MOE_VEC_BYTES == 64
  const Vec<float> r =
      __builtin_bit_cast(Vec<float>, _mm512_rcp14_ps(__builtin_bit_cast(__m512, d)));
  return r + r * (1.0f - d * r);
#else
  return 1.0f / d;
#endif
}

inline Vec<double> vsigmoid(Vec<double> x) { return 1.0 / (1.0 + vexp<double>(-x)); }

// Below it a sigmoid is zero: another small number, times x, might be a large one.
constexpr float kSigmoidLeast = -87.0f;

// 1 / (1 + 2^y), y = -x log2(e), of N vectors step by step, in the range where 2^y and its
// reciprocal are normal. y is never rounded where multiplications are fused with additions. One
// vector is a chain of some 16 operations, and of chains that follow each other, 60 cycles each, a
// scheduler holds too few to keep two units busy.
template <int N>
inline void sigmoids(const Vec<float>* x, Vec<float>* s) {
  constexpr float kScale = -1.44269504f;
  Vec<float> y[N], r[N], p[N];
#define MOE_EACH _Pragma("GCC unroll 4") for (int i = 0; i < N; ++i)
  MOE_EACH y[i] = at_most(x[i], 87.0f);
  MOE_EACH y[i] = at_least(y[i], kSigmoidLeast);
  MOE_EACH s[i] = y[i] * kScale + kPowerMagic;
  MOE_EACH r[i] = s[i] - kPowerMagic;
  MOE_EACH r[i] = y[i] * kScale - r[i];
  MOE_EACH p[i] = r[i] * kPowers[0] + kPowers[1];
#pragma GCC unroll 4
  for (int d = 2; d < 6; ++d) MOE_EACH p[i] = p[i] * r[i] + kPowers[d];
  MOE_EACH p[i] = p[i] * power_of_whole(s[i]) + 1.0f;
  MOE_EACH s[i] = reciprocal(p[i]);
  MOE_EACH s[i] = x[i] < kSigmoidLeast ? Vec<float>{} : s[i];
#undef MOE_EACH
}

inline Vec<float> vsigmoid(Vec<float> x) {
  Vec<float> s;
  sigmoids<1>(&x, &s);
  return s;
}

// The standard normal distribution function, Phi(x) = erfc(-x / sqrt 2) / 2.
inline Vec<double> vnormal_cdf(Vec<double> x) {
  Vec<double> y;
  for (int i = 0; i < kLanes<double>; ++i) {
    y[i] = 0.5 * __builtin_erfc(-x[i] * 0.70710678118654752);
  }
  return y;
}

inline Vec<float> vnormal_cdf(Vec<float> x) {
  // erfc(z) = t Q(t) exp(-z^2) with t = 1 / (1 + z/2); Q is a degree-9 least-squares fit on
  // Chebyshev nodes over z in [0, 10], relative error 1.3e-7 in fp32.
  constexpr float q[] = {0.28206289f, 0.28289402f,  0.23828822f, 0.22744551f,  -0.10452848f,
                         0.43415189f, -0.68704581f, 0.44281113f, -0.12961404f, 0.01353465f};
  const Vec<float> z = (x < 0.0f ? -x : x) * 0.70710678f;
  const Vec<float> t = 1.0f / (1.0f + 0.5f * z);
  Vec<float> p = splat<float>(q[9]);
#pragma GCC unroll 9
  for (int i = 8; i >= 0; --i) p = p * t + q[i];
  const Vec<float> half_erfc = 0.5f * t * p * vexp<float>(-z * z);
  return x < 0.0f ? half_erfc : 1.0f - half_erfc;
}

// Four sigmoids at once take 32 registers.
template <class T, Activation A>
constexpr bool kFourSigmoids = sizeof(T) == 4 && MOE_VEC_BYTES == 64 && A == Activation::kSwiglu;

template <class T>
struct ActPair {
  Vec<T> value, slope;
};

// value = a(x) and slope = a'(x).
template <class T, Activation A>
inline ActPair<T> activate(Vec<T> x) {
  if constexpr (A == Activation::kSwiglu || A == Activation::kSilu) {
    const Vec<T> s = vsigmoid(x);
    const Vec<T> value = x * s;
    return {value, s + value * (T(1) - s)};
  } else if constexpr (A == Activation::kGeglu || A == Activation::kGelu) {
    const Vec<T> cdf = vnormal_cdf(x);
    const Vec<T> pdf = T(0.3989422804014327) * vexp<T>(T(-0.5) * x * x);
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

// Whole vectors; the tail goes through padded copies.
template <class T, Activation A>
inline void act_fwd_loop(const T* gate, const T* up, T* h, int64_t n, T alpha, T limit) {
  constexpr int W = kLanes<T>;
  const auto one = [&](Vec<T> g, Vec<T> u) -> Vec<T> {
    if constexpr (A == Activation::kSwigluOai) {
      g = g > limit ? splat<T>(limit) : g;
      u = u > limit ? splat<T>(limit) : u;
      u = u < -limit ? splat<T>(-limit) : u;
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

// Of the gate, the up half and the gradient of h.
template <class T, Activation A>
inline void act_bwd_vector(Vec<T> g, Vec<T> u, Vec<T> d, T alpha, T limit, Vec<T>& h, Vec<T>& dg,
                           Vec<T>& du) {
  if constexpr (A == Activation::kSwigluOai) {
    const Vec<T> zero = {};
    const Vec<T> gc = g > limit ? splat<T>(limit) : g;
    Vec<T> uc = u > limit ? splat<T>(limit) : u;
    uc = uc < -limit ? splat<T>(-limit) : uc;
    const Vec<T> s = vsigmoid(alpha * gc);
    h = (uc + T(1)) * gc * s;
    dg = d * (uc + T(1)) * s * (T(1) + alpha * gc * (T(1) - s));
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

// store(i, count, h, dg, du, d) for each vector of rows of n; the last may hold fewer.
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
void act_bwd_row(const T* gate, const T* up, const T* dh, T* h, T* dgate, T* dup, int64_t n,
                 T alpha, T limit) {
  act_bwd_loop<T, A>(gate, up, dh, n, alpha, limit,
                     [&](int64_t i, int count, Vec<T> hv, Vec<T> dg, Vec<T> du, Vec<T>) {
                       if (h != nullptr) store_lanes<T>(h + i, hv, count);
                       store_lanes<T>(dgate + i, dg, count);
                       if (is_gated(A)) store_lanes<T>(dup + i, du, count);
                     });
}

template <class T, Activation A>
void act_bwd_rows_loop(const ActRowsBwd<T>& p) {
  for (int64_t r = 0; r < p.rows; ++r) {
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

#define MOE_FOR_ACTIVATION(kind, CALL)     \
  switch (kind) {                          \
    case Activation::kSwiglu:              \
      return CALL(Activation::kSwiglu);    \
    case Activation::kGeglu:               \
      return CALL(Activation::kGeglu);     \
    case Activation::kGegluTanh:           \
      return CALL(Activation::kGegluTanh); \
    case Activation::kReglu:               \
      return CALL(Activation::kReglu);     \
    case Activation::kSwigluOai:           \
      return CALL(Activation::kSwigluOai); \
    case Activation::kSilu:                \
      return CALL(Activation::kSilu);      \
    case Activation::kGelu:                \
      return CALL(Activation::kGelu);      \
    case Activation::kGeluTanh:            \
      return CALL(Activation::kGeluTanh);  \
    case Activation::kRelu:                \
      return CALL(Activation::kRelu);      \
    case Activation::kRelu2:               \
      return CALL(Activation::kRelu2);     \
  }

template <class T>
void act_rows(const ActRows<T>& p) {
#define MOE_CALL(A) act_rows_loop<T, A>(p)
  MOE_FOR_ACTIVATION(p.kind, MOE_CALL)
#undef MOE_CALL
}

template <class T>
void act_fwd(Activation kind, const T* gate, const T* up, T* h, int64_t n, T alpha, T limit) {
  act_rows<T>({kind, 1, n, alpha, limit, gate, up, 0, h, 0});
}

template <class T>
void act_bwd(Activation kind, const T* gate, const T* up, const T* dh, T* h, T* dgate, T* dup,
             int64_t n, T alpha, T limit) {
#define MOE_CALL(A) act_bwd_row<T, A>(gate, up, dh, h, dgate, dup, n, alpha, limit)
  MOE_FOR_ACTIVATION(kind, MOE_CALL)
#undef MOE_CALL
}

template <class T>
void act_bwd_rows(const ActRowsBwd<T>& p) {
#define MOE_CALL(A) act_bwd_rows_loop<T, A>(p)
  MOE_FOR_ACTIVATION(p.kind, MOE_CALL)
#undef MOE_CALL
}
