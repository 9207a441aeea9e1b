// Reductions over the lanes of a vector. Included by kernels-inl.h, inside its namespace.

template <class T>
inline T horizontal_sum(Vec<T> v) {
#if defined(__AVX512F__) && MOE_VEC_BYTES == 64
  if constexpr (sizeof(T) == 4) return _mm512_reduce_add_ps(__builtin_bit_cast(__m512, v));
#endif
  T s[kLanes<T>];
  store<T>(s, v);
  for (int width = kLanes<T> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) s[i] += s[i + width];
  }
  return s[0];
}

template <int... I>
struct LaneList {};
template <int N, int... I>
struct CountLanes : CountLanes<N - 1, N - 1, I...> {};
template <int... I>
struct CountLanes<0, I...> {
  using Type = LaneList<I...>;
};

// Folds lanes in groups of 2 * width: a group of the result is the sum of the two halves of a's
// group, then that of b's.
template <class T, int width, int... I>
inline Vec<T> fold_pairs(Vec<T> a, Vec<T> b, LaneList<I...>) {
  constexpr int W = sizeof...(I);
#define MOE_FOLD_LANE \
  (I / (2 * width) * (2 * width) + I % (2 * width) % width + (I % (2 * width) < width ? 0 : W))
#if defined(__clang__)
  return __builtin_shufflevector(a, b, MOE_FOLD_LANE...) +
         __builtin_shufflevector(a, b, (MOE_FOLD_LANE + width)...);
#else
  using Int = typename Simd<T>::Int;
  return __builtin_shuffle(a, b, Int{MOE_FOLD_LANE...}) +
         __builtin_shuffle(a, b, Int{(MOE_FOLD_LANE + width)...});
#endif
#undef MOE_FOLD_LANE
}

// Returns a vector whose lane i is the sum of the lanes of s[i], with three instructions per sum.
template <class T, int width = kLanes<T> / 2>
inline Vec<T> sums_of_lanes(Vec<T>* s) {
  if constexpr (width >= 1) {
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) {
      s[i] = fold_pairs<T, width>(s[i], s[i + width], typename CountLanes<kLanes<T>>::Type{});
    }
    return sums_of_lanes<T, width / 2>(s);
  } else {
    return s[0];
  }
}

// Returns the largest lane, in every lane.
template <class T, class V, int width = kLanes<T> / 2>
inline V max_of_lanes(V v) {
  if constexpr (width > 0) {
    typename Simd<T>::Int order;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) order[i] = i ^ width;
    const V other = shuffle(v, order);
    return max_of_lanes<T, V, width / 2>(v > other ? v : other);
  } else {
    return v;
  }
}

// Returns the lowest lane that is set in a comparison; kLanes when none is.
template <class T>
inline int first_lane(typename Simd<T>::Int comparison) {
#if defined(__SSE2__) && MOE_VEC_BYTES <= 32
#if MOE_VEC_BYTES == 32
  const int ints = _mm256_movemask_ps(__builtin_bit_cast(__m256, comparison));
  const int longs = _mm256_movemask_pd(__builtin_bit_cast(__m256d, comparison));
#else
  const int ints = _mm_movemask_ps(__builtin_bit_cast(__m128, comparison));
  const int longs = _mm_movemask_pd(__builtin_bit_cast(__m128d, comparison));
#endif
  return __builtin_ctz(static_cast<unsigned>(sizeof(T) == 4 ? ints : longs) | 1u << kLanes<T>);
#else
  int lane = kLanes<T>;
  for (int l = kLanes<T> - 1; l >= 0; --l) lane = comparison[l] != 0 ? l : lane;
  return lane;
#endif
}

// Sums of the lanes of four vectors. The order is the same in each of the four places, and that of
// one product does not depend on its neighbors: first lanes l, l + 1, l + 2, l + 3 with l a
// multiple of 4 (fold_lanes), then these sums.
template <class T>
struct Four {
  T v[4];
};
#if defined(__AVX2__) && MOE_VEC_BYTES >= 32
constexpr int kFolded = MOE_VEC_BYTES / 16;  // quadruples of floats

// Returns, in lane 4 * q + i, the sum of quadruple q of the lanes of v[i].
inline Floats fold_lanes(const Vec<float> (&v)[4]) {
  const auto at = [&](int i) { return __builtin_bit_cast(Floats, v[i]); };
  const auto doubles = [](Floats f) { return __builtin_bit_cast(Doubles, f); };
  const auto floats = [](Doubles f) { return __builtin_bit_cast(Floats, f); };
  const Floats low = MOE_INT(unpacklo_ps)(at(0), at(1)) + MOE_INT(unpackhi_ps)(at(0), at(1));
  const Floats high = MOE_INT(unpacklo_ps)(at(2), at(3)) + MOE_INT(unpackhi_ps)(at(2), at(3));
  return floats(MOE_INT(unpacklo_pd)(doubles(low), doubles(high))) +
         floats(MOE_INT(unpackhi_pd)(doubles(low), doubles(high)));
}

inline Four<float> add_quadruples(Floats folded) {
#if MOE_VEC_BYTES == 64
  const __m256 half = _mm512_castps512_ps256(folded) + _mm512_extractf32x8_ps(folded, 1);
#else
  const __m256 half = folded;
#endif
  Four<float> sums;
  _mm_storeu_ps(sums.v, _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
  return sums;
}

#if MOE_VEC_BYTES == 64
// Moves lane 4 * i + j to lane 4 * j + i.
inline Floats transpose_quadruples(Floats v) {
  return _mm512_permutexvar_ps(
      _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), v);
}
#endif

// Sums kFolded times four vectors at once: out[i * step + j] is the sum of vector i of folded[j]. A
// sum costs a third of what it does four at a time.
inline void put_folded(const Floats (&folded)[kFolded], float* out, int64_t step) {
#if MOE_VEC_BYTES == 64
  const auto add_halves = [&](int i) {
    return _mm512_shuffle_f32x4(folded[i], folded[i + 1], 0x44) +
           _mm512_shuffle_f32x4(folded[i], folded[i + 1], 0xee);
  };
  const Floats a = add_halves(0), b = add_halves(2);
  const Floats rows =
      transpose_quadruples(_mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd));
  _mm_storeu_ps(out, _mm512_castps512_ps128(rows));
  _mm_storeu_ps(out + step, _mm512_extractf32x4_ps(rows, 1));
  _mm_storeu_ps(out + 2 * step, _mm512_extractf32x4_ps(rows, 2));
  _mm_storeu_ps(out + 3 * step, _mm512_extractf32x4_ps(rows, 3));
#else
  const Floats sums = _mm256_permute2f128_ps(folded[0], folded[1], 0x20) +
                      _mm256_permute2f128_ps(folded[0], folded[1], 0x31);
  const __m256i by_vector = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256 rows = _mm256_permutevar8x32_ps(sums, by_vector);
  const __m128 low = _mm256_castps256_ps128(rows), high = _mm256_extractf128_ps(rows, 1);
  _mm_storel_pi(reinterpret_cast<__m64*>(out), low);
  _mm_storeh_pi(reinterpret_cast<__m64*>(out + step), low);
  _mm_storel_pi(reinterpret_cast<__m64*>(out + 2 * step), high);
  _mm_storeh_pi(reinterpret_cast<__m64*>(out + 3 * step), high);
#endif
}
#endif

template <class T>
inline Four<T> sums_of_four(const Vec<T> (&v)[4]) {
#if defined(__AVX2__) && MOE_VEC_BYTES >= 32
  if constexpr (sizeof(T) == 4) return add_quadruples(fold_lanes(v));
#endif
  Four<T> out;
  for (int i = 0; i < 4; ++i) out.v[i] = horizontal_sum<T>(v[i]);
  return out;
}
