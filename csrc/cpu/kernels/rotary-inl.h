// Rotary position embeddings of rows in the type of sums. Included by kernels-inl.h, inside its
// namespace.

// Rotates heads that fit one vector: both halves at once, each with the other beside it.
template <class T>
inline void rotate_whole(const T* in, const T* cos, const T* sin, T sign, int64_t heads, T* out) {
  constexpr int W = kLanes<T>, kHalf = W / 2;
  typename Simd<T>::Int other;
  alignas(MOE_VEC_BYTES) T both[2][W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) other[i] = i < kHalf ? i + kHalf : i - kHalf;
#pragma GCC unroll 8
  for (int i = 0; i < kHalf; ++i) {
    both[0][i] = both[0][i + kHalf] = cos[i];
    both[1][i] = -(both[1][i + kHalf] = sign * sin[i]);
  }
  const Vec<T> c = load<T>(both[0]), s = load<T>(both[1]);
  for (int64_t h = 0; h < heads; ++h) {
    const Vec<T> v = load<T>(in + h * W);
    store<T>(out + h * W, v * c + shuffle(v, other) * s);
  }
}

// Rotates features i and i + half of each head as a pair; in and out may be the same.
template <class T>
inline void rotate_row(const T* in, const T* cos, const T* sin, T sign, int64_t heads, int64_t half,
                       T* out) {
  constexpr int W = kLanes<T>;
  for (int64_t h = 0; h < heads; ++h) {
    const T *a = in + 2 * h * half, *b = a + half;
    T *to_a = out + 2 * h * half, *to_b = to_a + half;
    int64_t i = 0;
    for (; i + W <= half; i += W) {
      const Vec<T> x = load<T>(a + i), y = load<T>(b + i);
      const Vec<T> c = load<T>(cos + i), s = load<T>(sin + i) * sign;
      store<T>(to_a + i, x * c - y * s);
      store<T>(to_b + i, y * c + x * s);
    }
    for (; i < half; ++i) {
      const T x = a[i], y = b[i], s = sign * sin[i];
      to_a[i] = x * cos[i] - y * s;
      to_b[i] = y * cos[i] + x * s;
    }
  }
}

template <class T>
void rotate_rows(const RotateRows<T>& p) {
  for (int64_t r = 0; r < p.rows; ++r) {
    const T *cos = p.cos + r * p.half, *sin = p.sin + r * p.half, *in = p.in + r * p.ld_in;
    T* out = p.out + r * p.ld_out;
    if (2 * p.half == kLanes<T>) {
      rotate_whole<T>(in, cos, sin, p.sign, p.heads, out);
    } else {
      rotate_row<T>(in, cos, sin, p.sign, p.heads, p.half, out);
    }
  }
}
