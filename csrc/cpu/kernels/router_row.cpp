#include "cpu/kernels/router_row.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

#include "cpu/isa/isa.h"
#include "moe_ops/common.h"

// Vectors are passed between functions that are always inlined, so no ABI is involved.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace moe_ops::cpu {

namespace {

// The text of the row functions, compiled once per instruction set. Everything here is inlined into
// a function that carries the target attribute.
#define MOE_TEXT __attribute__((always_inline)) inline

template <class T, int Bytes>
struct Lanes {
  using Key = RouterKey<T>;
  static constexpr int kCount = Bytes / sizeof(T);
  typedef T Vec __attribute__((vector_size(Bytes), may_alias));
  typedef Key Int __attribute__((vector_size(Bytes), may_alias));
};

template <class V, class S>
MOE_TEXT V splat(S v) {
  return v - V{};  // v - 0 keeps the sign of zero
}

template <class V, class P>
MOE_TEXT V load(const P* p) {
  return *reinterpret_cast<const V*>(p);
}

template <class V, class P>
MOE_TEXT void store(P* p, const V& v) {
  *reinterpret_cast<V*>(p) = v;
}

template <class V>
MOE_TEXT V max(const V& a, const V& b) {
  return a > b ? a : b;
}

// fn of all lanes, in every lane: lanes l and l + L/2 first.
template <int L, class V, class Fn>
MOE_TEXT V fold_lanes(const V& lanes, const Fn& fn) {
  V v = lanes;
#if __has_builtin(__builtin_shufflevector)
  if constexpr (L == 16) {
    v = fn(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    v = fn(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    v = fn(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    return fn(v,
              __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
  } else if constexpr (L == 8) {
    v = fn(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
    v = fn(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5));
    return fn(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6));
  } else if constexpr (L == 4) {
    v = fn(v, __builtin_shufflevector(v, v, 2, 3, 0, 1));
    return fn(v, __builtin_shufflevector(v, v, 1, 0, 3, 2));
  } else {
    return fn(v, __builtin_shufflevector(v, v, 1, 0));
  }
#else
  auto all = v[0];
  for (int i = 1; i < L; ++i) all = fn(all, v[i]);
  return splat<V>(all);
#endif
}

template <int L, class V>
MOE_TEXT V max_of_lanes(const V& v) {
  return fold_lanes<L>(v, [](const auto& a, const auto& b) { return a > b ? a : b; });
}

template <int L, class V>
MOE_TEXT V sum_of_lanes(const V& v) {
  return fold_lanes<L>(v, [](const auto& a, const auto& b) { return a + b; });
}

// The lowest lane that is set in a comparison; kCount when none is.
template <class S>
MOE_TEXT int first_lane(const typename S::Int& comparison) {
#if defined(__SSE2__) && __has_builtin(__builtin_shufflevector)
  // Intrinsics of the baseline can be inlined into every level; wider ones could not.
  typedef typename S::Key Part __attribute__((vector_size(16)));
  const auto mask_of = [](const Part& part) __attribute__((always_inline)) {
    return sizeof(typename S::Key) == 4 ? _mm_movemask_ps(__builtin_bit_cast(__m128, part))
                                        : _mm_movemask_pd(__builtin_bit_cast(__m128d, part));
  };
  unsigned bits = 1u << S::kCount;
  if constexpr (S::kCount * sizeof(typename S::Key) == 16) {
    bits |= mask_of(comparison);
  } else if constexpr (S::kCount == 4) {
    bits |= mask_of(__builtin_shufflevector(comparison, comparison, 0, 1));
    bits |= mask_of(__builtin_shufflevector(comparison, comparison, 2, 3)) << 2;
  } else {
    bits |= mask_of(__builtin_shufflevector(comparison, comparison, 0, 1, 2, 3));
    bits |= mask_of(__builtin_shufflevector(comparison, comparison, 4, 5, 6, 7)) << 4;
  }
  return std::countr_zero(bits);
#else
  int lane = S::kCount;
  for (int l = S::kCount - 1; l >= 0; --l) lane = comparison[l] != 0 ? l : lane;
  return lane;
#endif
}

// Row l is the comparison that holds in lane l alone: one load, where a comparison with a variable
// would first have to spread it over the lanes.
template <class Key, int L>
struct OneLane {
  alignas(32) Key mask[L][L];
};
template <class Key, int L>
constexpr OneLane<Key, L> make_one_lane() {
  OneLane<Key, L> table = {};
  for (int l = 0; l < L; ++l) table.mask[l][l] = -1;
  return table;
}
template <class Key, int L>
constexpr OneLane<Key, L> kOneLane = make_one_lane<Key, L>();

template <class T>
struct ExpTraits;

template <>
struct ExpTraits<float> {
  static constexpr float kMin = -105.0f;        // e^kMin rounds to zero
  static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  // ln 2 in two parts; the upper one has so few bits that its multiples are exact without FMA.
  static constexpr float kLn2Hi = 0.693145751953125f, kLn2Lo = 1.42860677e-6f;
  static constexpr int kBias = 127, kMantissa = 23, kDegree = 7;
};

template <>
struct ExpTraits<double> {
  static constexpr double kMin = -746.0;
  static constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2Hi = 0.6931471803691238, kLn2Lo = 1.9082149292705877e-10;
  static constexpr int kBias = 1023, kMantissa = 52, kDegree = 13;
};

template <class T>
constexpr T inverse_factorial(int n) {
  double product = 1;
  for (int i = 2; i <= n; ++i) product *= i;
  return static_cast<T>(1 / product);
}

// e^x for x <= 0 (or NaN, which stays): 2^n e^r with |r| <= ln(2)/2, where the Taylor sum of
// kDegree leaves less than half an ulp. 2^n is applied in two halves, so that small results are
// subnormal as the exact ones are, and not zero.
template <class T, class S>
MOE_TEXT typename S::Vec exp_nonpositive(const typename S::Vec& exponent_of_e) {
  using Tr = ExpTraits<T>;
  using Vec = typename S::Vec;
  using Key = typename S::Key;
  const Vec x = max(splat<Vec>(Tr::kMin), exponent_of_e);
  const Vec shifted = x * T(1.4426950408889634) + Tr::kMagic;
  const Vec n = shifted - Tr::kMagic;
  Vec r = x - n * Tr::kLn2Hi;
  r = r - n * Tr::kLn2Lo;
  Vec p = splat<Vec>(inverse_factorial<T>(Tr::kDegree));
#pragma GCC unroll 16
  for (int d = Tr::kDegree - 1; d >= 0; --d) p = p * r + inverse_factorial<T>(d);
  // Unsigned, because NaN makes any pattern of bits. Both halves of other exponents are positive.
  typedef std::make_unsigned_t<Key> Word __attribute__((vector_size(sizeof(Vec))));
  const Word exponent = __builtin_bit_cast(Word, shifted) -
                        __builtin_bit_cast(std::make_unsigned_t<Key>, T(Tr::kMagic)) +
                        2 * Tr::kBias;
  const Word half = exponent >> 1, rest = exponent - half;
  return p * __builtin_bit_cast(Vec, half << Tr::kMantissa) *
         __builtin_bit_cast(Vec, rest << Tr::kMantissa);
}

template <class T, int Bytes>
MOE_TEXT void exp_sum_text(const T* x, T* e, int64_t rows, int64_t pitch, int64_t n, T* sums) {
  using S = Lanes<T, Bytes>;
  using Vec = typename S::Vec;
  constexpr int L = S::kCount;
  Vec most[kRouterRows];
  for (int64_t r = 0; r < rows; ++r) {
    Vec best = splat<Vec>(-std::numeric_limits<T>::infinity());
    // NaN is passed over.
    for (int64_t i = 0; i < n; i += L) best = max(load<Vec>(x + r * pitch + i), best);
    most[r] = max_of_lanes<L>(best);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const Vec best = most[r];
    Vec sum = {};
    for (int64_t i = r * pitch; i < r * pitch + n; i += L) {
      const Vec v = exp_nonpositive<T, S>(load<Vec>(x + i) - best);
      store(e + i, v);
      sum += v;
    }
    sums[r] = sum_of_lanes<L>(sum)[0];
  }
}

template <class T, int Bytes>
MOE_TEXT void exp_text(const T* x, T* e, int64_t n) {
  using S = Lanes<T, Bytes>;
  for (int64_t i = 0; i < n; i += S::kCount) {
    store(e + i, exp_nonpositive<T, S>(load<typename S::Vec>(x + i)));
  }
}

template <class T, class S>
MOE_TEXT typename S::Vec sigmoid_of(const typename S::Vec& v) {
  using Vec = typename S::Vec;
  const Vec z = exp_nonpositive<T, S>(v > 0 ? -v : v);
  return (v > 0 ? splat<Vec>(T(1)) : z) / (T(1) + z);
}

template <class T, int Bytes>
MOE_TEXT void sigmoid_text(const T* x, T* s, int64_t n) {
  using S = Lanes<T, Bytes>;
  for (int64_t i = 0; i < n; i += S::kCount) {
    store(s + i, sigmoid_of<T, S>(load<typename S::Vec>(x + i)));
  }
}

template <class T, class S>
MOE_TEXT typename S::Int key_of(const typename S::Vec& x) {
  using Int = typename S::Int;
  constexpr RouterKey<T> kMagnitude = std::numeric_limits<RouterKey<T>>::max();
  const typename S::Vec v = x + T(0);  // -0 becomes +0
  const Int bits = __builtin_bit_cast(Int, v);
  const Int key = bits < 0 ? bits ^ kMagnitude : bits;
  return v == v ? key : splat<Int>(RouterKey<T>(kNoKey<T> + 1));
}

template <class T, int Bytes>
MOE_TEXT void make_keys_text(const T* x, RouterKey<T>* keys, int64_t n) {
  using S = Lanes<T, Bytes>;
  for (int64_t i = 0; i < n; i += S::kCount) {
    store(keys + i, key_of<T, S>(load<typename S::Vec>(x + i)));
  }
}

template <class T, int Bytes>
MOE_TEXT void find_block_max_text(const RouterKey<T>* keys, RouterKey<T>* block_max, int64_t n) {
  using S = Lanes<T, Bytes>;
  using Int = typename S::Int;
  constexpr int L = S::kCount;
  const int64_t blocks = n / L;
  if (blocks <= kFlatVectors) return;
  for (int64_t b = 0; b < blocks; ++b) {
    block_max[b] = max_of_lanes<L>(load<Int>(keys + b * L))[0];
  }
  for (int64_t b = blocks; b % L != 0; ++b) block_max[b] = kNoKey<T>;
}

// The largest of `vectors` vectors of keys, in every lane, and where it is first.
template <class S>
struct Best {
  typename S::Int key;
  typename S::Int vector;  // the vector that holds it
  int64_t index;           // of that vector
  int lane;
};

template <class S>
MOE_TEXT void find_best(const typename S::Key* keys, int64_t vectors, Best<S>& best) {
  using Int = typename S::Int;
  constexpr int L = S::kCount;
  Int key = load<Int>(keys);
  for (int64_t i = 1; i < vectors; ++i) key = max(key, load<Int>(keys + i * L));
  best.key = max_of_lanes<L>(key);
  // Upwards, so the smaller position wins a tie.
  best.index = 0;
  best.vector = load<Int>(keys);
  best.lane = first_lane<S>(best.vector == best.key);
  while (best.lane == L && best.index + 1 < vectors) {
    ++best.index;
    best.vector = load<Int>(keys + best.index * L);
    best.lane = first_lane<S>(best.vector == best.key);
  }
}

template <class T, int Bytes>
MOE_TEXT void take_best_text(RouterKey<T>* keys, RouterKey<T>* block_max, int64_t rows,
                             int64_t pitch, int64_t n, int64_t k, int32_t* positions) {
  using S = Lanes<T, Bytes>;
  using Key = RouterKey<T>;
  using Int = typename S::Int;
  constexpr int L = S::kCount;
  constexpr const auto& kOnly = kOneLane<Key, L>.mask;
  const Int none = splat<Int>(kNoKey<T>);
  // Whole vectors are written: the next load of one would wait for a narrower store.
  Best<S> best;
  if (n <= kFlatVectors * L) {
    for (int64_t j = 0; j < k; ++j) {
      for (int64_t r = 0; r < rows; ++r) {
        Key* row = keys + r * pitch;
        find_best<S>(row, n / L, best);
        positions[r * k + j] = static_cast<int32_t>(best.index * L) + best.lane;
        store(row + best.index * L, load<Int>(kOnly[best.lane]) != 0 ? none : best.vector);
      }
    }
    return;
  }
  const int64_t vectors = ceil_div<int64_t>(n / L, L);  // of block maxima
  for (int64_t j = 0; j < k; ++j) {
    for (int64_t r = 0; r < rows; ++r) {
      Key *row = keys + r * pitch, *row_max = block_max + r * pitch;
      find_best<S>(row_max, vectors, best);
      const int64_t block = best.index * L + best.lane;
      const Int candidates = load<Int>(row + block * L);
      const int lane = first_lane<S>(candidates == best.key);
      positions[r * k + j] = static_cast<int32_t>(block * L) + lane;
      const Int remaining = load<Int>(kOnly[lane]) != 0 ? none : candidates;
      store(row + block * L, remaining);
      store(row_max + best.index * L,
            load<Int>(kOnly[best.lane]) != 0 ? max_of_lanes<L>(remaining) : best.vector);
    }
  }
}

#include "cpu/kernels/router_lanes-inl.h"

#define MOE_ROUTER_EXPONENTIALS(target, bytes)                                             \
  template <class T>                                                                       \
  target void exp_sum(const T* x, T* e, int64_t rows, int64_t pitch, int64_t n, T* sums) { \
    exp_sum_text<T, bytes>(x, e, rows, pitch, n, sums);                                    \
  }                                                                                        \
  template <class T>                                                                       \
  target void exp(const T* x, T* e, int64_t n) {                                           \
    exp_text<T, bytes>(x, e, n);                                                           \
  }                                                                                        \
  template <class T>                                                                       \
  target void sigmoid(const T* x, T* s, int64_t n) {                                       \
    sigmoid_text<T, bytes>(x, s, n);                                                       \
  }
#define MOE_ROUTER_CHOICES(target, bytes)                                                         \
  template <class T>                                                                              \
  target void make_keys(const T* x, RouterKey<T>* keys, int64_t n) {                              \
    make_keys_text<T, bytes>(x, keys, n);                                                         \
  }                                                                                               \
  template <class T>                                                                              \
  target void find_block_max(const RouterKey<T>* keys, RouterKey<T>* block_max, int64_t n) {      \
    find_block_max_text<T, bytes>(keys, block_max, n);                                            \
  }                                                                                               \
  template <class T>                                                                              \
  target void take_best(RouterKey<T>* keys, RouterKey<T>* block_max, int64_t rows, int64_t pitch, \
                        int64_t n, int64_t k, int32_t* positions) {                               \
    take_best_text<T, bytes>(keys, block_max, rows, pitch, n, k, positions);                      \
  }                                                                                               \
  template <class T>                                                                              \
  target void route_lanes(const RouterLanes<T>& p) {                                              \
    route_lanes_text<T, bytes>(p);                                                                \
  }                                                                                               \
  template <class T>                                                                              \
  target void route_lanes_bwd(const RouterLanes<T>& p) {                                          \
    route_lanes_bwd_text<T, bytes>(p);                                                            \
  }

namespace portable {
MOE_ROUTER_EXPONENTIALS(, 16)
MOE_ROUTER_CHOICES(, 16)
template <class T>
constexpr RouterRow<T> kRow = {exp_sum<T>,        exp<T>,       sigmoid<T>,     make_keys<T>,
                               find_block_max<T>, take_best<T>, route_lanes<T>, route_lanes_bwd<T>};
}  // namespace portable

#if defined(__x86_64__)
// Whole lines: where 16 bytes decide, 32 experts took 105 or 135 us for the same instructions.
#define MOE_AVX2 __attribute__((target("avx2,fma"), aligned(64)))
namespace avx2 {
MOE_ROUTER_EXPONENTIALS(MOE_AVX2, 32)
MOE_ROUTER_CHOICES(MOE_AVX2, 32)
template <class T>
constexpr RouterRow<T> kRow = {exp_sum<T>,        exp<T>,       sigmoid<T>,     make_keys<T>,
                               find_block_max<T>, take_best<T>, route_lanes<T>, route_lanes_bwd<T>};
}  // namespace avx2

// An exponential is a chain of 55 cycles. What a core has under way is counted in instructions, so
// wide ones bring twice as much also where they are executed in halves. Choices are short vectors,
// and lanes mostly comparisons, whose masks cost more here: 16 experts, 512 tokens 30 and 40 us.
#define MOE_AVX512 __attribute__((target("avx512f,avx512dq,avx512vl,fma"), aligned(64)))
namespace avx512 {
MOE_ROUTER_EXPONENTIALS(MOE_AVX512, 64)
template <class T>
constexpr RouterRow<T> row_of_level() {
  RouterRow<T> row = avx2::kRow<T>;
  row.exp_sum = exp_sum<T>;
  row.exp = exp<T>;
  row.sigmoid = sigmoid<T>;
  return row;
}
template <class T>
constexpr RouterRow<T> kRow = row_of_level<T>();
}  // namespace avx512
#endif

}  // namespace

template <class T>
const RouterRow<T>& router_row() {
#if defined(__x86_64__)
  if (active_isa() >= Isa::kAvx512) return avx512::kRow<T>;
  if (active_isa() >= Isa::kAvx2) return avx2::kRow<T>;
#endif
  return portable::kRow<T>;
}

template const RouterRow<float>& router_row<float>();
template const RouterRow<double>& router_row<double>();

}  // namespace moe_ops::cpu
