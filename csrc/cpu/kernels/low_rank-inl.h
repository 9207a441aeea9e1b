// Products of rows with the few rows of a low-rank factor. Included by kernels-inl.h, inside its
// namespace.

// The sums of a tile: kTileRows tokens times kTileRank rows of the factor, which fit the registers
// of every target.
constexpr int kTileRows = 2, kTileRank = 4;

// Calls fn.operator()<n>() for n = min(left, Most).
template <int Most, class Fn>
void with_count(int64_t left, const Fn& fn) {
  if constexpr (Most == 1) {
    fn.template operator()<1>();
  } else {
    left >= Most ? fn.template operator()<Most>() : with_count<Most - 1>(left, fn);
  }
}

template <class T>
void rank_product(const RowPointers& p, const T* factor, int64_t rank, T* out) {
  constexpr int W = kLanes<T>;
  with_type<T>(p.type, nullptr, [&]<class S>(const S*) {
    for (int64_t j = 0; j < rank; j += kTileRank) {
      const T* f = factor + j * p.n;
      for (int64_t r = 0; r < p.count; r += kTileRows) {
        with_count<kTileRows>(p.count - r, [&]<int R>() {
          with_count<kTileRank>(rank - j, [&]<int J>() {
            const S* rows[R];
            for (int t = 0; t < R; ++t) rows[t] = static_cast<const S*>(p.rows[r + t]);
            Vec<T> acc[R][kTileRank] = {};
            int64_t i = 0;
            for (; i + W <= p.n; i += W) {
              for (int t = 0; t < R; ++t) {
                const Vec<T> v = load_as(rows[t] + i);
                for (int c = 0; c < J; ++c) {
                  acc[t][c] = add_one_of<T, R * J>(acc[t][c], v, load<T>(f + c * p.n + i));
                }
              }
            }
            for (int t = 0; t < R; ++t) {
              Four<T> sums = sums_of_four<T>(acc[t]);
              for (int64_t k = i; k < p.n; ++k) {
                for (int c = 0; c < J; ++c) sums.v[c] += to_float(rows[t][k]) * f[c * p.n + k];
              }
              for (int c = 0; c < J; ++c) out[(r + t) * rank + j + c] = sums.v[c];
            }
          });
        });
      }
    }
  });
}

template <class T>
void rank_gradient(const RowPointers& p, const T* low, int64_t rank, T* out) {
  constexpr int W = kLanes<T>;
  with_type<T>(p.type, nullptr, [&]<class S>(const S*) {
    const auto row = [&](int64_t r) { return static_cast<const S*>(p.rows[r]); };
    for (int64_t j = 0; j < rank; j += kTileRank) {
      with_count<kTileRank>(rank - j, [&]<int J>() {
        int64_t i = 0;
        for (; i + 2 * W <= p.n; i += 2 * W) {
          Vec<T> acc[J][2] = {};
          for (int64_t r = 0; r < p.count; ++r) {
            const Vec<T> v0 = load_as(row(r) + i), v1 = load_as(row(r) + i + W);
            for (int c = 0; c < J; ++c) {
              const Vec<T> w = splat<T>(low[r * rank + j + c]);
              acc[c][0] += w * v0;
              acc[c][1] += w * v1;
            }
          }
          for (int c = 0; c < J; ++c) {
            store<T>(out + (j + c) * p.n + i, acc[c][0]);
            store<T>(out + (j + c) * p.n + i + W, acc[c][1]);
          }
        }
        for (; i < p.n; ++i) {
          for (int c = 0; c < J; ++c) {
            T sum = 0;
            for (int64_t r = 0; r < p.count; ++r) {
              sum += low[r * rank + j + c] * to_float(row(r)[i]);
            }
            out[(j + c) * p.n + i] = sum;
          }
        }
      });
    }
  });
}

#if defined(__AVX2__) && MOE_VEC_BYTES == 32
// Returns a mask of the first n lanes.
inline __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

// Loads the first n elements at p, zeros behind them; the rest of a vector is not read.
template <class T>
inline Vec<T> load_first(const T* p, int64_t n) {
#if MOE_VEC_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    return __builtin_bit_cast(Vec<T>, _mm512_maskz_loadu_ps(_cvtu32_mask16((1u << n) - 1), p));
  }
#elif defined(__AVX2__) && MOE_VEC_BYTES == 32
  if constexpr (sizeof(T) == 4) {
    return __builtin_bit_cast(Vec<T>, _mm256_maskload_ps(p, first_lanes(n)));
  }
#endif
  T part[kLanes<T>] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = p[i];
  return load<T>(part);
}

// Stores the first n lanes of v at p.
template <class T>
inline void store_first(T* p, int64_t n, Vec<T> v) {
#if MOE_VEC_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, _cvtu32_mask16((1u << n) - 1), __builtin_bit_cast(Floats, v));
    return;
  }
#elif defined(__AVX2__) && MOE_VEC_BYTES == 32
  if constexpr (sizeof(T) == 4) {
    _mm256_maskstore_ps(p, first_lanes(n), __builtin_bit_cast(Floats, v));
    return;
  }
#endif
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}

template <class T>
void transpose_any(const T* src, int64_t ld_src, int64_t rows, int64_t cols, T* dst,
                   int64_t ld_dst) {
  constexpr int W = kLanes<T>;
  for (int64_t r = 0; r < rows; r += W) {
    const int64_t m = rows - r < W ? rows - r : W;
    for (int64_t c = 0; c < cols; c += W) {
      const int64_t n = cols - c < W ? cols - c : W;
      const T* from = src + r * ld_src + c;
      T* to = dst + c * ld_dst + r;
      T block[W * W];
      transpose_block<T>([&](int i) { return i < m ? load_first(from + i * ld_src, n) : Vec<T>{}; },
                         block, W);
      for (int64_t i = 0; i < n; ++i) store_first(to + i * ld_dst, m, load<T>(block + i * W));
    }
  }
}

template <class T>
LowRankKernels<T> low_rank_table() {
  return {&rank_product<T>, &rank_gradient<T>, &transpose_any<T>};
}
