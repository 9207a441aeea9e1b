// Elementary functions of vectors. Included by kernels-inl.h, inside its namespace. One
// exponential: exponential() for results to half an ulp, and vpower(), its short form in fp32,
// where a relative error of 9e-8 is enough (sigmoids, softmax weights). NaN stays NaN in all of
// them.

template <class T>
struct ExpTraits;

template <>
struct ExpTraits<float> {
  static constexpr float kMax = 88.37f, kMin = -87.33f;  // results are normal numbers between them
  static constexpr float kZero = -105.0f;                // e^kZero rounds to zero
  static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  // ln 2 in two parts; the upper one has so few bits that its multiples are exact without FMA.
  static constexpr float kLn2Hi = 0.693145751953125f, kLn2Lo = 1.42860677e-6f;
  static constexpr int kBias = 127, kMantissa = 23, kDegree = 7;
};

template <>
struct ExpTraits<double> {
  static constexpr double kMax = 709.0, kMin = -708.0, kZero = -746.0;
  static constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2Hi = 0.6931471803691238, kLn2Lo = 1.9082149292705877e-10;
  static constexpr int kBias = 1023, kMantissa = 52, kDegree = 13;
};

// Returns 1 / n!, correctly rounded.
template <class T>
constexpr T inverse_factorial(int n) {
  double product = 1;
  for (int i = 2; i <= n; ++i) product *= i;
  return static_cast<T>(1 / product);
}

// Return the larger and the smaller operand, or NaN if x is NaN. For a conditional, the compiler
// emits two operations.
inline Vec<float> at_least(Vec<float> x, float least) {
#if defined(__AVX2__) && MOE_VEC_BYTES >= 32
  return __builtin_bit_cast(
      Vec<float>, MOE_INT(max_ps)(MOE_INT(set1_ps)(least), __builtin_bit_cast(Floats, x)));
#else
  return x < least ? splat<float>(least) : x;
#endif
}

inline Vec<float> at_most(Vec<float> x, float most) {
#if defined(__AVX2__) && MOE_VEC_BYTES >= 32
  return __builtin_bit_cast(Vec<float>,
                            MOE_INT(min_ps)(MOE_INT(set1_ps)(most), __builtin_bit_cast(Floats, x)));
#else
  return x > most ? splat<float>(most) : x;
#endif
}

// Returns e^x = 2^n e^r with |r| <= ln(2)/2, where the Taylor sum of kDegree leaves less than half
// an ulp. kNonPositive: x <= 0, and small results are subnormal; otherwise x is clamped to the
// range of normal results.
template <class T, bool kNonPositive = false>
inline Vec<T> exponential(Vec<T> x) {
  using Tr = ExpTraits<T>;
  typedef typename Simd<T>::Word Word;
  if constexpr (kNonPositive) {
    x = x < Tr::kZero ? splat<T>(Tr::kZero) : x;
  } else {
    x = x > Tr::kMax ? splat<T>(Tr::kMax) : x;
    x = x < Tr::kMin ? splat<T>(Tr::kMin) : x;
  }
  const Vec<T> shifted = x * T(1.4426950408889634) + Tr::kMagic;
  const Vec<T> n = shifted - Tr::kMagic;
  Vec<T> r = x - n * Tr::kLn2Hi;
  r = r - n * Tr::kLn2Lo;
  Vec<T> p = splat<T>(inverse_factorial<T>(Tr::kDegree));
#pragma GCC unroll 16
  for (int d = Tr::kDegree - 1; d >= 0; --d) p = p * r + inverse_factorial<T>(d);
  // Unsigned, because NaN makes any pattern of bits.
  const Word bits = __builtin_bit_cast(Word, shifted) -
                    __builtin_bit_cast(typename Simd<T>::WordOf, T(Tr::kMagic));
  if constexpr (kNonPositive) {
    // 2^n in two factors, each a normal number.
    const Word exponent = bits + 2 * Tr::kBias, half = exponent >> 1, rest = exponent - half;
    return p * __builtin_bit_cast(Vec<T>, half << Tr::kMantissa) *
           __builtin_bit_cast(Vec<T>, rest << Tr::kMantissa);
  } else {
    return p * __builtin_bit_cast(Vec<T>, (bits + Tr::kBias) << Tr::kMantissa);
  }
}

// 2^x = 2^n 2^r with |r| <= 1/2, from x + kPowerMagic and r. The number added to round x carries
// the bias of the exponent, so a shift alone makes 2^n.
constexpr float kPowerMagic = ExpTraits<float>::kMagic + ExpTraits<float>::kBias;

inline Vec<float> power_of_whole(Vec<float> shifted) {
  return __builtin_bit_cast(Vec<float>, __builtin_bit_cast(Simd<float>::Int, shifted)
                                            << ExpTraits<float>::kMantissa);
}

// Coefficients of the polynomial with the least relative error of 2^r, 9e-8, among those of its
// degree that are one at zero.
constexpr float kPowers[] = {1.32647273e-3f, 9.67151299e-3f, 5.55073358e-2f,
                             0.240222424f,   0.693147004f,   1.0f};

inline Vec<float> power_of_rest(Vec<float> r) {
  Vec<float> p = splat<float>(kPowers[0]);
#pragma GCC unroll 5
  for (int d = 1; d < 6; ++d) p = p * r + kPowers[d];
  return p;
}

// The base of vpower() is e^(1 / kPowerScale): 2^x is four operations less than e^x.
template <class T>
constexpr T kPowerScale = 1;
template <>
constexpr float kPowerScale<float> = 1.44269504f;

// Returns e^(x / kPowerScale) for x up to 127; below -126 the result is some normal number.
inline Vec<double> vpower(Vec<double> x) { return exponential<double>(x); }

inline Vec<float> vpower(Vec<float> x) {
  x = at_least(x, -126.0f);
  const Vec<float> shifted = x + kPowerMagic;
  return power_of_rest(x - (shifted - kPowerMagic)) * power_of_whole(shifted);
}

// Returns 1 / d for normal d up to 2^126. A division of 16 floats takes 16 cycles; an estimate of
// 14 bits and a step of Newton's method, which squares its error, 2 and 2.
inline Vec<float> reciprocal(Vec<float> d) {
#if defined(__AVX512F__) && MOE_VEC_BYTES == 64
  const Vec<float> r =
      __builtin_bit_cast(Vec<float>, _mm512_rcp14_ps(__builtin_bit_cast(__m512, d)));
  return r + r * (1.0f - d * r);
#else
  return 1.0f / d;
#endif
}

// Returns 1 / (1 + e^-x), accurate to an ulp or two.
template <class T>
inline Vec<T> exact_sigmoid(Vec<T> x) {
  return T(1) / (T(1) + exponential<T>(-x));
}

inline Vec<double> vsigmoid(Vec<double> x) { return exact_sigmoid<double>(x); }

// Below it a sigmoid is zero: another small number, times x, might be a large one.
constexpr float kSigmoidLeast = -87.0f;

// Computes 1 / (1 + 2^y), y = -x log2(e), for N vectors step by step, in the range where 2^y and
// its reciprocal are normal. y is never rounded where multiplications are fused with additions. One
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

#if defined(MOE_INT)
inline Vec<float> vsqrt(Vec<float> x) {
  return __builtin_bit_cast(Vec<float>, MOE_INT(sqrt_ps)(__builtin_bit_cast(Floats, x)));
}
inline Vec<double> vsqrt(Vec<double> x) {
  return __builtin_bit_cast(Vec<double>, MOE_INT(sqrt_pd)(__builtin_bit_cast(Doubles, x)));
}
#else
inline Vec<float> vsqrt(Vec<float> x) {
  for (int i = 0; i < kLanes<float>; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}
inline Vec<double> vsqrt(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
}
#endif

// Returns the standard normal distribution function, Phi(x) = erfc(-x / sqrt 2) / 2.
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
  const Vec<float> half_erfc = 0.5f * t * p * exponential<float>(-z * z);
  return x < 0.0f ? half_erfc : 1.0f - half_erfc;
}

// Returns tanh(x) = (1 - u) / (1 + u), u = e^-2|x|. Near zero 1 - u would cancel: there it is the
// Taylor sum of -expm1, whose remainder at |2x| < 0.35 is below half an ulp at kDegree terms.
template <class T>
inline Vec<T> vtanh(Vec<T> x) {
  const Vec<T> y = T(-2) * (x < T(0) ? -x : x);
  const Vec<T> u = exponential<T>(y);
  Vec<T> p = splat<T>(1);
#pragma GCC unroll 16
  for (int d = ExpTraits<T>::kDegree; d >= 2; --d) p = p * y * T(1.0 / d) + T(1);
  const Vec<T> near = -y * p;
  const Vec<T> m = y > T(-0.35) ? near : T(1) - u;
  const Vec<T> t = m / (T(2) - m);
  return x < T(0) ? -t : t;
}

template <class T>
struct LogSigmoid {
  Vec<T> z, rest;  // sigmoid(x) and log(1 - sigmoid(x))
};

// Returns atanh(s) / s for s^2 <= 1/9, where the remainder of the series is below half an ulp.
template <class T>
inline Vec<T> atanh_ratio(Vec<T> s2) {
  constexpr int kTerms = sizeof(T) == 8 ? 16 : 7;
  Vec<T> p = splat<T>(T(1.0 / (2 * kTerms + 1)));
#pragma GCC unroll 16
  for (int i = kTerms - 1; i >= 0; --i) p = p * s2 + T(1.0 / (2 * i + 1));
  return p;
}

// Computes, with u = e^-|x|, sigmoid(|x|) = 1 / (1 + u), log(1 + u) = 2 atanh(s), s = u / (2 + u)
// <= 1/3. One division serves both.
template <class T>
inline LogSigmoid<T> log_sigmoid(Vec<T> x) {
  const Vec<T> u = exponential<T>(x < T(0) ? x : -x);
  const Vec<T> r = T(1) / ((T(1) + u) * (T(2) + u));
  const Vec<T> larger = r * (T(2) + u);
  const Vec<T> s = u * r * (T(1) + u), p = atanh_ratio<T>(s * s);
  const Vec<T> positive = x > T(0) ? x : Vec<T>{};
  return {x >= T(0) ? larger : u * larger, -(positive + T(2) * s * p)};
}

inline Vec<double> vlog(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_log(x[i]);
  return x;
}

// Returns log(x) for normal positive x = 2^n y with y from sqrt(1/2) to sqrt(2), log(y) = 2
// atanh(t), t = (y - 1) / (y + 1): |t| < 0.172, and the sixth term is below half an ulp of t.
inline Vec<float> vlog(Vec<float> x) {
  using Int = Simd<float>::Int;
  constexpr int32_t kRoot = 0x3f3504f3;  // sqrt(1/2)
  const Int bits = __builtin_bit_cast(Int, x) - kRoot, n = bits >> 23;
  const Vec<float> y = __builtin_bit_cast(Vec<float>, (bits & 0x007fffff) + kRoot);
  const Vec<float> t = (y - 1.0f) / (y + 1.0f), t2 = t * t;
  Vec<float> p = splat<float>(2.0f / 9);
  p = p * t2 + 2.0f / 7;
  p = p * t2 + 2.0f / 5;
  p = p * t2 + 2.0f / 3;
  p = p * t2 + 2.0f;
  return __builtin_convertvector(n, Vec<float>) * 0.693147181f + p * t;
}
