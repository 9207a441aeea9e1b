// Register tiles: products of a broadcast block and a panel, of copies (micro) or of weights packed
// ahead of time (panel_tile, panel_streams). Included by kernels-inl.h, inside its namespace.

// acc + a * b, where a is the same element in every lane; a pair adds both of its products. kSums
// as of add_one_of.
template <class T, class S, int kSums = 2>
inline Vec<T> add_product(Vec<T> acc, const T* a, Vec<T> b) {
#if defined(__AVX512BF16__) && MOE_VEC_BYTES == 64
  if constexpr (__is_same(S, Pair)) {
    int32_t bits;
    __builtin_memcpy(&bits, a, sizeof(bits));
    return __builtin_bit_cast(
        Vec<float>, _mm512_dpbf16_ps(__builtin_bit_cast(__m512, acc),
                                     __builtin_bit_cast(__m512bh, _mm512_set1_epi32(bits)),
                                     __builtin_bit_cast(__m512bh, b)));
  }
#endif
#if defined(__AVX2__) && MOE_VEC_BYTES == 32
  if constexpr (sizeof(T) == 4) {
    // The form that writes the sum in place. Left to choose, the compiler takes others, with
    // copies, and a tile that needs all 16 registers then keeps sums on the stack: 20 % slower.
    const Vec<T> av = splat<T>(*a);
    asm("vfmadd231ps %2, %1, %0" : "+x"(acc) : "x"(av), "x"(b));
    return acc;
  }
#endif
  return add_one_of<T, kSums>(acc, splat<T>(*a), b);
}

// M x NV accumulators stay in registers; each step broadcasts M elements of a and loads NV vectors
// of b. AVX2: 6 x 2 accumulators + 2 + 1 of 16 registers, and 12 FMAs cover the latency (4) times
// the ports (2). AVX-512: 14 x 2 + 2 + 1 of 32.
// kCopy: the vectors of b are also written to `copy`, as whole panels.
template <class T, class S, int M, int NV, bool kColumnForm, bool kCopy>
[[gnu::always_inline]] inline void micro_of(int64_t kc, const T* a, const T* b, T* c, int64_t ldc,
                                            bool accumulate, TileHints& hints,
                                            [[maybe_unused]] T* copy) {
  constexpr int W = kLanes<T>;
  constexpr int64_t kStrideI = kColumnForm ? 1 : kLda;
  const int64_t step_a = kColumnForm ? hints.lda : 1;
  const int64_t step_b = hints.ldb != TileHints::kWholePanels ? hints.ldb : NV * W;
  Vec<T> acc[M][NV];
#pragma GCC unroll 32
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) acc[i][v] = Vec<T>{};
  }
  const auto step = [&] {
    Vec<T> bv[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) bv[v] = load<T>(b + v * W);
    if constexpr (kCopy) {
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) store<T>(copy + v * W, bv[v]);
      copy += NV * W;
    }
#pragma GCC unroll 32
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v)
        acc[i][v] = add_product<T, S, M * NV>(acc[i][v], a + i * kStrideI, bv[v]);
    }
    a += step_a;
    b += step_b;
  };
  // A count of steps that the compiler knows: with an unknown one it kept the sums on the stack.
  int64_t k = 0;
  for (; k + kPrefetchStep <= kc; k += kPrefetchStep) {
    fetch(hints);
#pragma GCC unroll 2
    for (int64_t i = 0; i < kPrefetchStep; ++i) step();
  }
  for (; k < kc; ++k) step();
#pragma GCC unroll 32
  for (int i = 0; i < M; ++i) {
#if defined(__AVX512BF16__) && MOE_VEC_BYTES == 64
    if constexpr (kColumnForm && NV == 2 && __is_same(S, Pair)) {
      if (hints.half) {
        auto* out = reinterpret_cast<__m512i*>(reinterpret_cast<uint16_t*>(c) + i * ldc);
        const __m512i line = narrow_two(acc[i][0], acc[i][1]);
        hints.stream ? _mm512_stream_si512(out, line) : _mm512_storeu_si512(out, line);
        continue;
      }
    }
#endif
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      T* out = c + i * ldc + v * W;
#if defined(__AVX2__)
      if constexpr (kColumnForm && NV * MOE_VEC_BYTES >= 64) {
        // A row of the tile is whole cache lines: written past the cache, they need not be read
        // first.
        if (hints.stream) {
          stream(out, acc[i][v]);
          continue;
        }
      }
#endif
      store<T>(out, accumulate ? load<T>(out) + acc[i][v] : acc[i][v]);
    }
  }
}

template <class T, class S, int M, int NV, bool kColumnForm>
void micro(int64_t kc, const T* a, const T* b, T* c, int64_t ldc, bool accumulate,
           TileHints& hints) {
  micro_of<T, S, M, NV, kColumnForm, false>(kc, a, b, c, ldc, accumulate, hints, nullptr);
}

template <class T, int M, int NV>
void copying_micro(int64_t kc, const T* a, const T* b, T* c, int64_t ldc, bool accumulate,
                   TileHints& hints, T* copy) {
  micro_of<T, T, M, NV, false, true>(kc, a, b, c, ldc, accumulate, hints, copy);
}

// What panel_vector keeps of a pair: the high half of bfloat16, the low one of float16.
template <class S>
constexpr uint32_t kHalfMask = kIsBf16<S> ? 0xffff0000u : 0xffffu;

// Vector v of row `half` of the pair of k at p. `mask` has kHalfMask in every lane.
template <class T, class S>
inline Vec<T> panel_vector(const S* p, int v, [[maybe_unused]] int half,
                           [[maybe_unused]] Simd<float>::Uint mask = Simd<float>::Uint{} +
                                                                     kHalfMask<S>) {
  constexpr int W = kLanes<T>;
  if constexpr (sizeof(S) == sizeof(T)) {
    return load<T>(reinterpret_cast<const T*>(p) + v * W);
  } else {
    using F = Simd<float>;
    typedef uint32_t Unaligned __attribute__((vector_size(MOE_VEC_BYTES), aligned(1), may_alias));
    const F::Uint pair = *reinterpret_cast<const Unaligned*>(p + 2 * v * W);
    if constexpr (kIsBf16<S>) {
      return __builtin_bit_cast(Vec<float>, half == 0 ? pair << 16 : pair & mask);
    } else {
      const F::Half bits = low_halves(half == 0 ? pair & mask : pair >> 16);
      return load_as(reinterpret_cast<const Fp16*>(&bits));
    }
  }
}

// A step of k is so many lines of a panel.
constexpr int kTileLines = MOE_VEC_BYTES == 64 ? 2 : 1;

// kGroup: steps that share a prefetch. A function of its own, of one loop: with two in one function
// the compiler keeps sums on the stack.
template <class T, class S, int M, int kGroup>
[[gnu::noinline]] void panel_tile_of(int64_t kc, const T* a, const void* panel_data, T* c,
                                     int64_t ldc, bool accumulate, const char* ahead, int64_t far,
                                     int64_t ahead_step) {
  constexpr int W = kLanes<T>;
  constexpr int kPair = sizeof(S) == sizeof(T) ? 1 : 2;  // steps of k that lie side by side
  // One chain of sums an element, as in panel_streams: which of the two takes a panel depends on
  // how items are cut, and so on the number of threads.
  Vec<T> acc[M][2];
#pragma GCC unroll 32
  for (int i = 0; i < M; ++i) acc[i][0] = acc[i][1] = Vec<T>{};
  ahead_step *= kGroup;
  const S* panel = static_cast<const S*>(panel_data);
#if MOE_VEC_BYTES == 64
#pragma GCC unroll 2
#endif
  for (int64_t k = 0; k < kc; k += kGroup * kPair) {
#pragma GCC unroll 2
    for (int s = 0; s < kTileLines; ++s) __builtin_prefetch(ahead + s * far, 0, 2);
    ahead += ahead_step;
#pragma GCC unroll 4
    for (int g = 0; g < kGroup; ++g) {
#pragma GCC unroll 2
      for (int half = 0; half < kPair; ++half) {
        // Load the pairs anew for each half and broadcast no earlier: 16 registers hold the sums of
        // an AVX2 tile, two vectors, an element of a and the mask, and not one more.
        if constexpr (kPair == 2) asm volatile("" ::: "memory");
        const Vec<T> b0 = panel_vector<T>(panel, 0, half), b1 = panel_vector<T>(panel, 1, half);
#pragma GCC unroll 32
        for (int i = 0; i < M; ++i) {
          acc[i][0] = add_product<T, S>(acc[i][0], a + i * kPanelLda + half, b0);
          acc[i][1] = add_product<T, S>(acc[i][1], a + i * kPanelLda + half, b1);
        }
      }
      a += kPair;
      panel += 2 * W * kPair;
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      T* out = c + i * ldc + v * W;
      store<T>(out, accumulate ? load<T>(out) + acc[i][v] : acc[i][v]);
    }
  }
}

// Where a step is a line of a panel or less and several tiles share what they ask for, a prefetch a
// step would ask for each line many times: four steps of k share one, if it asks for all that is
// due.
template <class T, class S, int M>
void panel_tile(int64_t kc, const T* a, const void* panel, T* c, int64_t ldc, bool accumulate,
                const char* ahead, int64_t far, int64_t ahead_step) {
  if constexpr (MOE_VEC_BYTES < 64) {
    constexpr int kSteps = 4, kGroup = sizeof(S) == sizeof(T) ? kSteps : kSteps / 2;
    if (kc % kSteps == 0 && kGroup * ahead_step <= 64) {
      return panel_tile_of<T, S, M, kGroup>(kc, a, panel, c, ldc, accumulate, ahead, far,
                                            ahead_step);
    }
  }
  panel_tile_of<T, S, M, 1>(kc, a, panel, c, ldc, accumulate, ahead, far, ahead_step);
}

template <class T, class S>
void widen_panel(int64_t kc, const void* panel_data, T* dst) {
  constexpr int W = kLanes<T>;
  const auto* panel = static_cast<const S*>(panel_data);
  for (int64_t k = 0; k < kc; k += 2, panel += 4 * W) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half, dst += 2 * W) {
      store<T>(dst, panel_vector<T>(panel, 0, half));
      store<T>(dst + W, panel_vector<T>(panel, 1, half));
    }
  }
}

// Rows that panel_streams takes. Registers would hold the sums of two panels for 7 with AVX-512,
// but from 6 on tiles that ask ahead are faster.
constexpr int kStreamRows = MOE_VEC_BYTES == 64 ? 5 : 3;

// Several panels at once for m rows: the hardware prefetcher follows each, and together they reach
// the memory bandwidth that one stream does not. Where the prefetcher is late, kAhead asks ahead of
// it (Kernels::stream_ahead). No more panels than registers hold sums of: 12 vectors with AVX2, 24
// with AVX-512.
constexpr int num_panel_streams(int m) {
  const int panels = MOE_MR2 / m;
  return panels >= 4 ? 4 : panels >= 2 ? 2 : 1;
}

template <class T, class S, int M, bool kAhead>
void panel_streams(int64_t kc, const T* a, const void* panel_data, int64_t stride, T* const* c,
                   int64_t ldc, bool accumulate, [[maybe_unused]] int64_t ahead) {
  constexpr int W = kLanes<T>, kStreams = num_panel_streams(M);
  constexpr int kPair = sizeof(S) == sizeof(T) ? 1 : 2;  // steps of k that lie side by side
  Vec<T> acc[kStreams][M][2] = {};
  const char* panel = static_cast<const char*>(panel_data);
  // Three rows with AVX2: 12 sums, two vectors, an element of a and the mask are 16 registers, but
  // the compiler kept one or two sums on the stack, where each step waits for the one before. So
  // elements of a are loaded anew for each panel, and the mask is in memory, behind a pointer of
  // which the compiler knows nothing.
  constexpr bool kFull = MOE_VEC_BYTES == 32 && M == 3;
  const Simd<float>::Uint mask_values = Simd<float>::Uint{} + kHalfMask<S>;
  const Simd<float>::Uint* mask = &mask_values;
  if constexpr (kFull && kPair == 2) asm("" : "+r"(mask));
  for (int64_t k = 0; k < kc; k += kPair) {
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; ++s) {
      const S* p = reinterpret_cast<const S*>(panel + s * stride);
      if constexpr (kAhead) {
#pragma GCC unroll 2
        for (int64_t line = 0; line < 2 * MOE_VEC_BYTES; line += 64) {
          __builtin_prefetch(panel + s * stride + ahead + line, 0, 2);
        }
      }
#pragma GCC unroll 2
      for (int half = 0; half < kPair; ++half) {
        if constexpr (kFull) asm volatile("" ::: "memory");
        const Vec<T> b0 = panel_vector<T>(p, 0, half, *mask),
                     b1 = panel_vector<T>(p, 1, half, *mask);
#pragma GCC unroll 5
        for (int i = 0; i < M; ++i) {
          acc[s][i][0] = add_product<T, S>(acc[s][i][0], a + i * kPanelLda + half, b0);
          acc[s][i][1] = add_product<T, S>(acc[s][i][1], a + i * kPanelLda + half, b1);
        }
      }
    }
    a += kPair;
    panel += 2 * W * kPair * sizeof(S);
  }
#pragma GCC unroll 4
  for (int s = 0; s < kStreams; ++s) {
#pragma GCC unroll 5
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        T* out = c[s] + i * ldc + v * W;
        store<T>(out, accumulate ? load<T>(out) + acc[s][i][v] : acc[s][i][v]);
      }
    }
  }
}
