// The microkernels of GEMM: elements of A are broadcast, vectors of B are loaded from memory as it
// lies or from a panel, just packed (micro) or packed ahead of time (packed_tile, packed_streams).
// Included by kernels-inl.h, inside its namespace.

// Returns acc + a * b, where a is one element broadcast to all lanes; a pair adds both of its
// products. kSums: see add_one_of.
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
template <class T, class S, int M, int NV, bool kColumnMajor, bool kCopy>
[[gnu::always_inline]] inline void micro_of(int64_t kc, const T* a, const T* b,
                                            const TileOut<T>& out, TileOptions& options,
                                            [[maybe_unused]] T* copy) {
  constexpr int W = kLanes<T>;
  constexpr int64_t kStrideI = kColumnMajor ? 1 : kLda;
  const int64_t step_a = kColumnMajor ? options.lda : 1;
  const int64_t step_b = options.ldb != TileOptions::kPacked ? options.ldb : NV * W;
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
    prefetch_step(options);
#pragma GCC unroll 2
    for (int64_t i = 0; i < kPrefetchStep; ++i) step();
  }
  for (; k < kc; ++k) step();
  const auto [c, ldc, accumulate] = out;
#pragma GCC unroll 32
  for (int i = 0; i < M; ++i) {
#if defined(__AVX512BF16__) && MOE_VEC_BYTES == 64
    if constexpr (kColumnMajor && NV == 2 && __is_same(S, Pair)) {
      if (options.bf16_out) {
        auto* to = reinterpret_cast<__m512i*>(reinterpret_cast<uint16_t*>(c) + i * ldc);
        const __m512i line = narrow_two(acc[i][0], acc[i][1]);
        options.stream ? _mm512_stream_si512(to, line) : _mm512_storeu_si512(to, line);
        continue;
      }
    }
#endif
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      T* to = c + i * ldc + v * W;
#if defined(__AVX2__)
      if constexpr (kColumnMajor && NV * MOE_VEC_BYTES >= 64) {
        // A row of the tile is whole cache lines: non-temporal stores do not read them first.
        if (options.stream) {
          stream(to, acc[i][v]);
          continue;
        }
      }
#endif
      store<T>(to, accumulate ? load<T>(to) + acc[i][v] : acc[i][v]);
    }
  }
}

template <class T, class S, int M, int NV, bool kColumnMajor>
void micro(int64_t kc, const T* a, const T* b, const TileOut<T>& out, TileOptions& options) {
  micro_of<T, S, M, NV, kColumnMajor, false>(kc, a, b, out, options, nullptr);
}

template <class T, int M, int NV>
void copying_micro(int64_t kc, const T* a, const T* b, const TileOut<T>& out, TileOptions& options,
                   T* copy) {
  micro_of<T, T, M, NV, false, true>(kc, a, b, out, options, copy);
}

// Half of a pair that panel_vector keeps: the high half for bfloat16, the low one for float16.
template <class S>
constexpr uint32_t kHalfMask = kIsBf16<S> ? 0xffff0000u : 0xffffu;

// Returns vector v of row `half` of the pair of k at p. `mask` has kHalfMask in every lane.
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

template <class T, class S, int M>
void packed_tile(int64_t kc, const T* a, const void* panel_data, const TileOut<T>& out,
                 const typename PackedGemmKernels<T>::Prefetch& prefetch) {
  constexpr int W = kLanes<T>;
  constexpr int kPair = sizeof(S) == sizeof(T) ? 1 : 2;  // steps of k that lie side by side
  // One chain of sums an element, as in packed_streams: which of the two takes a panel depends on
  // how items are cut, and so on the number of threads.
  Vec<T> acc[M][2];
#pragma GCC unroll 32
  for (int i = 0; i < M; ++i) acc[i][0] = acc[i][1] = Vec<T>{};
  const char* next = prefetch.next;
  const int64_t next_step = prefetch.step, next_half = prefetch.half;
  const S* panel = static_cast<const S*>(panel_data);
#if MOE_VEC_BYTES == 64
#pragma GCC unroll 2
#endif
  for (int64_t k = 0; k < kc; k += kPair) {
#pragma GCC unroll 2
    for (int s = 0; s < kTileLines; ++s) __builtin_prefetch(next + s * next_half, 0, 2);
    next += next_step;
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
  const auto [c, ldc, accumulate] = out;
#pragma GCC unroll 32
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      T* to = c + i * ldc + v * W;
      store<T>(to, accumulate ? load<T>(to) + acc[i][v] : acc[i][v]);
    }
  }
}

[[maybe_unused]] void widen_fp16_panel(int64_t kc, const void* panel_data, float* dst) {
  constexpr int W = kLanes<float>;
  const auto* panel = static_cast<const Fp16*>(panel_data);
  for (int64_t k = 0; k < kc; k += 2, panel += 4 * W) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half, dst += 2 * W) {
      store<float>(dst, panel_vector<float>(panel, 0, half));
      store<float>(dst + W, panel_vector<float>(panel, 1, half));
    }
  }
}

// Rows that packed_streams takes. Registers would hold the sums of two panels for 7 with AVX-512,
// but from 6 on tiles that prefetch are faster.
constexpr int kStreamRows = MOE_VEC_BYTES == 64 ? 5 : 3;

// Returns the number of panels read at once for m rows: the hardware prefetcher follows each, and
// together they reach the memory bandwidth that one stream does not. Where the prefetcher is late,
// kPrefetch goes ahead of it. No more panels than registers hold sums of: 12 vectors with AVX2, 24
// with AVX-512.
constexpr int num_panel_streams(int m) {
  const int panels = MOE_MR2 / m;
  return panels >= 4 ? 4 : panels >= 2 ? 2 : 1;
}

template <class T, class S, int M, bool kPrefetch>
void packed_streams(int64_t kc, const T* a, const typename PackedGemmKernels<T>::Panels& panels,
                    const TileOut<T* const>& out) {
  constexpr int W = kLanes<T>, kStreams = num_panel_streams(M);
  constexpr int kPair = sizeof(S) == sizeof(T) ? 1 : 2;  // steps of k that lie side by side
  Vec<T> acc[kStreams][M][2] = {};
  const char* panel = static_cast<const char*>(panels.first);
  const int64_t stride = panels.stride;
  [[maybe_unused]] const int64_t distance = panels.distance;
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
      if constexpr (kPrefetch) {
#pragma GCC unroll 2
        for (int64_t line = 0; line < 2 * MOE_VEC_BYTES; line += 64) {
          __builtin_prefetch(panel + s * stride + distance + line, 0, 2);
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
  const auto [c, ldc, accumulate] = out;
#pragma GCC unroll 4
  for (int s = 0; s < kStreams; ++s) {
#pragma GCC unroll 5
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        T* to = c[s] + i * ldc + v * W;
        store<T>(to, accumulate ? load<T>(to) + acc[s][i][v] : acc[s][i][v]);
      }
    }
  }
}

template <class T, class S>
void fill_micro(MicroKernel<T> (*row_a)[kMaxMr], MicroKernel<T> (*col_a)[kMaxMr]) {
  for_each_count<MOE_MR1>([&]<int M>() {
    row_a[0][M - 1] = &micro<T, S, M, 1, false>;
    col_a[0][M - 1] = &micro<T, S, M, 1, true>;
  });
  for_each_count<MOE_MR2>([&]<int M>() {
    row_a[1][M - 1] = &micro<T, S, M, 2, false>;
    col_a[1][M - 1] = &micro<T, S, M, 2, true>;
  });
}

template <class T, class S>
void fill_packed(typename PackedGemmKernels<T>::Tile* tile,
                 typename PackedGemmKernels<T>::Streams (*streams)[kMaxStreamRows]) {
  for_each_count<MOE_MR2>([&]<int M>() { tile[M - 1] = &packed_tile<T, S, M>; });
  for_each_count<kStreamRows>(
      [&]<int M>() { streams[false][M - 1] = &packed_streams<T, S, M, false>; });
  for_each_count<kStreamPrefetchRows>(
      [&]<int M>() { streams[true][M - 1] = &packed_streams<T, S, M, true>; });
}

template <class T>
void fill_gemm(GemmKernels<T>& k) {
#if !defined(MOE_BASE)
  k.lanes = kLanes<T>;
  k.mr1 = MOE_MR1;
  k.mr2 = MOE_MR2;
  k.streams = MOE_VEC_BYTES >= 32;
  fill_micro<T, T>(k.row_a, k.col_a);
  for_each_count<MOE_MR2>([&]<int M>() {
    k.copying_row_a[0][M - 1] = &copying_micro<T, M, 1>;
    k.copying_row_a[1][M - 1] = &copying_micro<T, M, 2>;
  });
  k.pack_b = &pack_b<T>;
  k.transpose = &transpose<T>;

  k.packed.prefetch_lines = kTileLines;
  k.packed.stream_rows = kStreamRows;
  for (int m = 1; m <= kStreamRows; ++m) k.packed.num_streams[m - 1] = num_panel_streams(m);
  const int own = static_cast<int>(kAccumulate<T>);
  fill_packed<T, T>(k.packed.tile[own], k.packed.streams[own]);
  if constexpr (sizeof(T) == 4) {
    const int bf16 = static_cast<int>(DType::kBFloat16), fp16 = static_cast<int>(DType::kFloat16);
    fill_packed<float, Bf16>(k.packed.tile[bf16], k.packed.streams[bf16]);
    fill_packed<float, Fp16>(k.packed.tile[fp16], k.packed.streams[fp16]);
    k.packed.widen_fp16 = &widen_fp16_panel;
    k.packed.widen_tiles = MOE_VEC_BYTES == 64 ? 2 : 3;
    k.blocked_gemv.run_widening = &blocked_gemv_widening;
  }

  k.gemv.run = &gemv<T>;
  k.gemv.max_tokens = MOE_DOT_TOKENS;
  k.gemv.max_rows = MOE_DOT_MAX_ROWS;
  k.blocked_gemv.run = &blocked_gemv<T, T>;
  k.blocked_gemv.reduce = &reduce_lanes<T>;
  k.blocked_gemv.max_tokens = kBlockedTokens;
  k.blocked_gemv.max_rows = kBlockedMaxRows;
  k.blocked_gemv.block_k = kBlockedBytes / static_cast<int64_t>(sizeof(T));
  k.blocked_gemv.min_depth_per_row = {MOE_VEC_BYTES == 64 ? 12 : 20, MOE_VEC_BYTES == 64 ? 8 : 9,
                                      32};  // NOTES.md
  k.outer.run = &outer<T>;
#endif
#if defined(__AVX512BF16__) && MOE_VEC_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    k.has_bf16 = true;
    fill_micro<T, Pair>(k.bf16_row_a, k.bf16_col_a);
    k.bf16_pack_b = &bf16_pack_b;
    k.bf16_interleave = &bf16_interleave;
    fill_packed<T, Pair>(k.packed.bf16_tile, k.packed.bf16_streams);
    k.gemv.run_bf16 = &gemv_of<T, Pair>;
    k.blocked_gemv.run_bf16 = &blocked_gemv<T, Pair>;
    k.outer.run_bf16 = &outer_of<T, Pair>;
  }
#endif
}
