// Scores of single logits, which are all but the softmax, and their slopes. Included by
// kernels-inl.h, inside its namespace.

// Functions start with a cache line: where 16 bytes decided, 32 experts took 1.3 times as long for
// the same instructions.
#define MOE_ALIGNED __attribute__((aligned(64)))

// Returns the sigmoid, accurate to an ulp or two, including subnormal results.
template <class T>
inline Vec<T> router_sigmoid(Vec<T> v) {
  const Vec<T> z = exponential<T, true>(v > 0 ? -v : v);
  return (v > 0 ? splat<T>(1) : z) / (T(1) + z);
}

// sqrt(log(1 + e^x)) and sigmoid(x) / (2 sqrt(log(1 + e^x))), both to a few ulps as long as
// e^(x/2) is a number. With h = e^(-|x|/2) and u = h^2, where log(1 + u) = u q(u):
//   x <= 0: h sqrt(q)        and  h / (2 (1 + u) sqrt(q))
//   x > 0:  sqrt(x + u q)    and  1 / (2 (1 + u) sqrt(x + u q))
// e^x, which is zero from half as far on, only stands where it is added to one.
template <class T>
struct SqrtSoftplus {
  Vec<T> factor, root, u;

  explicit SqrtSoftplus(Vec<T> x) {
    const Vec<T> h = exponential<T, true>((x > 0 ? -x : x) * T(0.5));
    u = h * h;
    const Vec<T> r = T(1) / (T(2) + u), s = u * r;
    const Vec<T> q = T(2) * r * atanh_ratio<T>(s * s);
    root = vsqrt(x > 0 ? x + u * q : q);
    factor = x > 0 ? splat<T>(1) : h;
  }
  Vec<T> score() const { return factor * root; }
  Vec<T> slope() const { return factor * T(0.5) / ((T(1) + u) * root); }
};

template <class T>
inline Vec<T> score_of(ScoreFunc f, Vec<T> x) {
  if (f == ScoreFunc::kSqrtSoftplus) return SqrtSoftplus<T>(x).score();
  return router_sigmoid<T>(x);
}

template <class T>
struct ScoreAndSlope {
  Vec<T> score, slope;
};

template <class T>
inline ScoreAndSlope<T> score_and_slope(ScoreFunc f, Vec<T> x) {
  if (f == ScoreFunc::kSqrtSoftplus) {
    const SqrtSoftplus<T> s(x);
    return {s.score(), s.slope()};
  }
  // s(-x) is 1 - s(x) without the cancellation.
  const Vec<T> s = router_sigmoid<T>(x);
  return {s, s * router_sigmoid<T>(-x)};
}

template <class T>
MOE_ALIGNED void score_row(ScoreFunc f, const T* x, T* s, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<T>) store<T>(s + i, score_of<T>(f, load<T>(x + i)));
}

template <class T>
MOE_ALIGNED void slope_row(ScoreFunc f, const T* x, T* s, T* slope, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const ScoreAndSlope<T> both = score_and_slope<T>(f, load<T>(x + i));
    store<T>(s + i, both.score);
    store<T>(slope + i, both.slope);
  }
}
