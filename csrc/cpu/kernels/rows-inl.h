// Loads, stores, packing, transposition and sums of rows. Included by kernels-inl.h, inside its
// namespace.

template <class T>
void load_row(DType type, const void* src, T* dst, int64_t n, T scale) {
  constexpr int W = kLanes<T>;
  with_type<T>(type, src, [&](const auto* p) {
    int64_t i = 0;
    if (scale == T(1)) {
      for (; i + W <= n; i += W) store<T>(dst + i, load_as(p + i));
    } else {
      for (; i + W <= n; i += W) store<T>(dst + i, load_as(p + i) * scale);
    }
    for (; i < n; ++i) dst[i] = to_float(p[i]) * scale;
  });
}

template <class T>
void load_rows(const TypedRows& src, T* dst, int64_t ld_dst, T scale) {
  constexpr int W = kLanes<T>;
  const int64_t n = src.n;
  with_type<T>(src.type, src.data, [&](const auto* p) {
    for (int64_t r = 0; r < src.count; ++r, p += src.ld, dst += ld_dst) {
      int64_t i = 0;
      for (; i + W <= n; i += W) store<T>(dst + i, load_as(p + i) * scale);
      for (; i < n; ++i) dst[i] = to_float(p[i]) * scale;
    }
  });
}

// Packs row by row over all panels, so that each row is read contiguously.
template <class T>
void pack_b(const RowPointers& rows, int64_t byte_offset, const T* scales, T* dst, int64_t stride) {
  constexpr int W = kLanes<T>;
  const int64_t cols = rows.n;
  const int64_t whole = cols / (2 * W) * (2 * W);
  const int64_t last = (cols - whole + W - 1) / W * W;
  with_type<T>(rows.type, nullptr, [&]<class S>(const S*) {
    for (int64_t r = 0; r < rows.count; ++r) {
      const S* src =
          reinterpret_cast<const S*>(static_cast<const char*>(rows.rows[r]) + byte_offset);
      const Vec<T> scale = splat<T>(scales == nullptr ? T(1) : scales[r]);
      T* out = dst + r * 2 * W;
      for (int64_t j = 0; j < whole; j += 2 * W) {
        store<T>(out, load_as(src + j) * scale);
        store<T>(out + W, load_as(src + j + W) * scale);
        out += stride;
      }
      out = dst + whole / (2 * W) * stride + r * last;
      int64_t j = whole;
      for (; j + W <= cols; j += W, out += W) store<T>(out, load_as(src + j) * scale);
      if (j < cols) {
        T tail[W] = {};
        for (int64_t c = j; c < cols; ++c) tail[c - j] = to_float(src[c]);
        store<T>(out, load<T>(tail) * scale);
      }
    }
  });
}

template <class T>
void store_row(DType type, const T* src, void* dst, int64_t n) {
  constexpr int W = kLanes<T>;
  with_type<T>(type, dst, [&]<class S>(const S* q) {
    S* p = const_cast<S*>(q);
    int64_t i = 0;
    for (; i + W <= n; i += W) store_as(p + i, load<T>(src + i));
    for (; i < n; ++i) store_one(p + i, src[i]);
  });
}

template <class T>
void store_rows(const T* src, int64_t ld_src, const MutableTypedRows& dst) {
  constexpr int W = kLanes<T>;
  const int64_t n = dst.n;
  with_type<T>(dst.type, dst.data, [&]<class S>(const S* q) {
    S* p = const_cast<S*>(q);
    for (int64_t r = 0; r < dst.count; ++r, p += dst.ld, src += ld_src) {
      int64_t i = 0;
      for (; i + W <= n; i += W) store_as(p + i, load<T>(src + i));
      for (; i < n; ++i) store_one(p + i, src[i]);
    }
  });
}

// Stores past the cache if dst and n are whole lines; a line written in pieces would be read first.
template <class T>
void stream_row(DType type, const T* src, void* dst, int64_t n) {
#if defined(__AVX2__)
  constexpr int W = kLanes<T>;
  const bool streamed = with_type<T>(type, dst, [&]<class S>(const S* q) {
    if (n * sizeof(S) % 64 != 0 || reinterpret_cast<uintptr_t>(q) % 64 != 0) return false;
    S* p = const_cast<S*>(q);
    for (int64_t i = 0; i < n; i += W) {
      if constexpr (sizeof(S) == sizeof(T)) {
        stream(p + i, load<T>(src + i));
      } else {
        stream(p + i, narrow(S{}, load<T>(src + i)));
      }
    }
    return true;
  });
  if (streamed) return;
#endif
  store_row<T>(type, src, dst, n);
}

template <class T>
void gather_rows(const RowPointers& rows, const T* scales, T* dst, int64_t ld) {
  constexpr int W = kLanes<T>;
  const int64_t n = rows.n;
  with_type<T>(rows.type, nullptr, [&]<class S>(const S*) {
    for (int64_t r = 0; r < rows.count; ++r, dst += ld) {
      const S* src = static_cast<const S*>(rows.rows[r]);
      const T scale = scales == nullptr ? T(1) : scales[r];
      int64_t i = 0;
      for (; i + 2 * W <= n; i += 2 * W) {
        store<T>(dst + i, load_as(src + i) * scale);
        store<T>(dst + i + W, load_as(src + i + W) * scale);
      }
      for (; i + W <= n; i += W) store<T>(dst + i, load_as(src + i) * scale);
      for (; i < n; ++i) dst[i] = to_float(src[i]) * scale;
    }
  });
}

template <class T>
void scatter_rows(const T* src, int64_t ld, const T* scales, const MutableRowPointers& rows) {
  constexpr int W = kLanes<T>;
  const int64_t n = rows.n;
  with_type<T>(rows.type, nullptr, [&]<class S>(const S*) {
    for (int64_t r = 0; r < rows.count; ++r, src += ld) {
      S* dst = static_cast<S*>(rows.rows[r]);
      const T scale = scales == nullptr ? T(1) : scales[r];
      int64_t i = 0;
      for (; i + 2 * W <= n; i += 2 * W) {
        store_as(dst + i, load<T>(src + i) * scale);
        store_as(dst + i + W, load<T>(src + i + W) * scale);
      }
      for (; i + W <= n; i += W) store_as(dst + i, load<T>(src + i) * scale);
      for (; i < n; ++i) store_one(dst + i, src[i] * scale);
    }
  });
}

template <class T>
void dot_rows(const RowPointers& a, const T* b, int64_t ld, T* out) {
  constexpr int W = kLanes<T>;
  const int64_t n = a.n;
  with_type<T>(a.type, nullptr, [&]<class S>(const S*) {
    for (int64_t r = 0; r < a.count; ++r, b += ld) {
      const S* p = static_cast<const S*>(a.rows[r]);
      Vec<T> sum = {};
      int64_t i = 0;
      for (; i + W <= n; i += W) sum += load_as(p + i) * load<T>(b + i);
      T s = horizontal_sum<T>(sum);
      for (; i < n; ++i) s += to_float(p[i]) * b[i];
      out[r] = s;
    }
  });
}

template <class T>
void combine_rows(const CombineRows<T>& p) {
  constexpr int W = kLanes<T>;
  const T *rows = p.rows, *weights = p.weights;
  const int32_t* index = p.index;
  const int64_t ld = p.ld, top_k = p.top_k, n = p.n;
  with_type<T>(p.type, p.out, [&]<class S>(const S* q) {
    S* y = const_cast<S*>(q);
    const auto add = [&]<int NV>(int64_t i) {
      Vec<T> sums[NV] = {};
      for (int64_t s = 0; s < top_k; ++s) {
        if (index[s] < 0) continue;
        const Vec<T> w = splat<T>(weights == nullptr ? T(1) : weights[s]);
        const T* row = rows + index[s] * ld + i;
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sums[v] += load<T>(row + v * W) * w;
      }
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) store_as(y + i + v * W, sums[v]);
    };
    for (int64_t t = 0; t < p.num_tokens; ++t, index += top_k, y += n) {
      int64_t i = 0;
      for (; i + 4 * W <= n; i += 4 * W) add.template operator()<4>(i);
      for (; i + W <= n; i += W) add.template operator()<1>(i);
      for (; i < n; ++i) {
        T sum = 0;
        for (int64_t s = 0; s < top_k; ++s) {
          if (index[s] < 0) continue;
          sum += rows[index[s] * ld + i] * (weights == nullptr ? T(1) : weights[s]);
        }
        store_one(y + i, sum);
      }
      if (weights != nullptr) weights += top_k;
    }
  });
}

// Transposes one lanes x lanes block in registers; row(i) returns row i as a vector.
template <class T, class Row>
inline void transpose_block(const Row& row, T* dst, int64_t ld_dst) {
  constexpr int W = kLanes<T>;
#if defined(__AVX512F__) && MOE_VEC_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    // Four rounds of interleaving row i with row i + 8: after log2(16) rounds index bits of row and
    // column have changed places.
    typedef int32_t Index __attribute__((vector_size(64)));
    constexpr Index lo = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    constexpr Index hi = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    Vec<T> v[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) v[i] = row(i);
#pragma GCC unroll 2
    for (int round = 0; round < 2; ++round) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        t[2 * i] = shuffle(v[i], v[i + 8], lo);
        t[2 * i + 1] = shuffle(v[i], v[i + 8], hi);
      }
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        v[2 * i] = shuffle(t[i], t[i + 8], lo);
        v[2 * i + 1] = shuffle(t[i], t[i + 8], hi);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) store<T>(dst + i * ld_dst, v[i]);
    return;
  }
#elif defined(__AVX2__) && MOE_VEC_BYTES == 32
  if constexpr (sizeof(T) == 4) {
    __m256 r[8], t[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) r[i] = __builtin_bit_cast(__m256, row(i));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
      r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
      r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
      r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      float* out = reinterpret_cast<float*>(dst);
      _mm256_storeu_ps(out + i * ld_dst, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
      _mm256_storeu_ps(out + (i + 4) * ld_dst, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
    return;
  }
#endif
  for (int r = 0; r < W; ++r) {
    const Vec<T> v = row(r);
    for (int c = 0; c < W; ++c) dst[c * ld_dst + r] = v[c];
  }
}

template <class T>
void transpose(const T* src, int64_t ld_src, int64_t rows, int64_t cols, T* dst, int64_t ld_dst) {
  constexpr int W = kLanes<T>;
  for (int64_t r = 0; r < rows; r += W) {
    int64_t c = 0;
    const auto row = [&](int i) { return load<T>(src + (r + i) * ld_src + c); };
    for (; c + W <= cols; c += W) transpose_block<T>(row, dst + c * ld_dst + r, ld_dst);
    if (c < cols) {
      T block[W * W];
      transpose_block<T>(row, block, W);
      for (int64_t i = 0; i < cols - c; ++i) {
        store<T>(dst + (c + i) * ld_dst + r, load<T>(block + i * W));
      }
    }
  }
}

template <class T>
void weighted_sum(const RowPointers& p, const T* weights, T* out) {
  constexpr int W = kLanes<T>;
  const void* const* rows = p.rows;
  const int64_t num_rows = p.count, n = p.n;
  with_type<T>(p.type, nullptr, [&]<class S>(const S*) {
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
      Vec<T> s0 = {}, s1 = {};
      for (int64_t r = 0; r < num_rows; ++r) {
        const S* row = static_cast<const S*>(rows[r]) + i;
        const Vec<T> w = splat<T>(weights == nullptr ? T(1) : weights[r]);
        s0 += w * load_as(row);
        s1 += w * load_as(row + W);
      }
      store<T>(out + i, s0);
      store<T>(out + i + W, s1);
    }
    for (; i < n; ++i) {
      T s = 0;
      for (int64_t r = 0; r < num_rows; ++r) {
        const T w = weights == nullptr ? T(1) : weights[r];
        s += w * to_float(static_cast<const S*>(rows[r])[i]);
      }
      out[i] = s;
    }
  });
}

template <class T>
void axpy(DType type, const void* row, T scale, T* acc, int64_t n) {
  constexpr int W = kLanes<T>;
  with_type<T>(type, row, [&](const auto* p) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store<T>(acc + i, load<T>(acc + i) + load_as(p + i) * scale);
    for (; i < n; ++i) acc[i] += to_float(p[i]) * scale;
  });
}

template <class T>
T dot_row(DType a_type, const void* a, DType b_type, const void* b, int64_t n) {
  constexpr int W = kLanes<T>;
  return with_type<T>(a_type, a, [&](const auto* pa) {
    return with_type<T>(b_type, b, [&](const auto* pb) {
      Vec<T> s0 = {}, s1 = {};
      int64_t i = 0;
      for (; i + 2 * W <= n; i += 2 * W) {
        s0 += load_as(pa + i) * load_as(pb + i);
        s1 += load_as(pa + i + W) * load_as(pb + i + W);
      }
      T s = horizontal_sum<T>(s0 + s1);
      for (; i < n; ++i) s += to_float(pa[i]) * to_float(pb[i]);
      return s;
    });
  });
}

void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

template <class T>
void multiply_row(const T* factors, T* row, int64_t n) {
  constexpr int W = kLanes<T>;
  int64_t i = 0;
  for (; i + W <= n; i += W) store<T>(row + i, load<T>(row + i) * load<T>(factors + i));
  for (; i < n; ++i) row[i] *= factors[i];
}

template <class T>
void fill_rows(RowKernels<T>& k) {
#if !defined(MOE_BASE)
  k.lanes = kLanes<T>;
  k.load_row = &load_row<T>;
  k.load_rows = &load_rows<T>;
  k.gather_rows = &gather_rows<T>;
  k.dot_rows = &dot_rows<T>;
  k.dot_row = &dot_row<T>;
  k.weighted_sum = &weighted_sum<T>;
  k.axpy = &axpy<T>;
  k.multiply_row = &multiply_row<T>;
  k.rotate_rows = &rotate_rows<T>;
#endif
  // Entries that store bfloat16.
  k.store_row = &store_row<T>;
  k.store_rows = &store_rows<T>;
  k.stream_row = &stream_row<T>;
  k.stream_fence = &stream_fence;
  k.scatter_rows = &scatter_rows<T>;
  k.combine_rows = &combine_rows<T>;
  k.norm_rows = &norm_rows<T>;
  k.norm_rows_bwd = &norm_rows_bwd<T>;
}
