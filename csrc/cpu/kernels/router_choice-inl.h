// One row of router logits: exponentials, keys that order the experts, and the top-k selection.
// Included by kernels-inl.h, inside its namespace.

template <class T>
MOE_ALIGNED void exp_sum(const T* x, T* e, int64_t rows, int64_t ld, int64_t n, T* sums) {
  constexpr int W = kLanes<T>;
  Vec<T> most[kRouterRows];
  for (int64_t r = 0; r < rows; ++r) {
    Vec<T> best = splat<T>(-T(__builtin_inf()));
    for (int64_t i = 0; i < n; i += W) {
      const Vec<T> v = load<T>(x + r * ld + i);
      best = v > best ? v : best;  // NaN is passed over
    }
    most[r] = max_of_lanes<T>(best);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const Vec<T> best = most[r];
    Vec<T> sum = {};
    for (int64_t i = r * ld; i < r * ld + n; i += W) {
      const Vec<T> v = exponential<T, true>(load<T>(x + i) - best);
      store<T>(e + i, v);
      sum += v;
    }
    sums[r] = horizontal_sum<T>(sum);
  }
}

template <class T>
MOE_ALIGNED void exp_row(const T* x, T* e, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<T>) store<T>(e + i, exponential<T, true>(load<T>(x + i)));
}

template <class T>
inline typename Simd<T>::Int splat_key(RouterKey<T> key) {
  return key - typename Simd<T>::Int{};
}

template <class T>
inline typename Simd<T>::Int key_of(Vec<T> x) {
  using Int = typename Simd<T>::Int;
  constexpr RouterKey<T> kMagnitude = sizeof(T) == 8 ? INT64_MAX : INT32_MAX;
  const Vec<T> v = x + T(0);  // -0 becomes +0
  const Int bits = __builtin_bit_cast(Int, v);
  const Int key = bits < 0 ? bits ^ kMagnitude : bits;
  return v == v ? key : splat_key<T>(kNoKey<T> + 1);
}

template <class T>
MOE_ALIGNED void make_keys(const T* x, RouterKey<T>* keys, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<T>) store_bytes(keys + i, key_of<T>(load<T>(x + i)));
}

template <class T>
MOE_ALIGNED void find_block_max(const RouterKey<T>* keys, RouterKey<T>* block_max, int64_t n) {
  constexpr int W = kLanes<T>;
  const int64_t blocks = n / W;
  if (blocks <= kFlatVectors) return;
  for (int64_t b = 0; b < blocks; ++b) {
    block_max[b] = max_of_lanes<T>(load_bytes<typename Simd<T>::Int>(keys + b * W))[0];
  }
  for (int64_t b = blocks; b % W != 0; ++b) block_max[b] = kNoKey<T>;
}

// Row l is the comparison that holds in lane l alone: one load, where a comparison with a variable
// would first have to spread it over the lanes.
template <class T>
struct OneLane {
  alignas(MOE_VEC_BYTES) RouterKey<T> mask[kLanes<T>][kLanes<T>] = {};
  constexpr OneLane() {
    for (int l = 0; l < kLanes<T>; ++l) mask[l][l] = -1;
  }
};
template <class T>
constexpr OneLane<T> kOneLane;

// The largest of `vectors` vectors of keys, in every lane, and where it is first.
template <class T>
struct BestKey {
  typename Simd<T>::Int key;
  typename Simd<T>::Int vector;  // the vector that holds it
  int64_t index;                 // of that vector
  int lane;
};

template <class T>
inline __attribute__((always_inline)) void find_best(const RouterKey<T>* keys, int64_t vectors,
                                                     BestKey<T>& best) {
  using Int = typename Simd<T>::Int;
  constexpr int W = kLanes<T>;
  Int key = load_bytes<Int>(keys);
  for (int64_t i = 1; i < vectors; ++i) {
    const Int next = load_bytes<Int>(keys + i * W);
    key = key > next ? key : next;
  }
  best.key = max_of_lanes<T>(key);
  // Upwards, so the smaller position wins a tie.
  best.index = 0;
  best.vector = load_bytes<Int>(keys);
  best.lane = first_lane<T>(best.vector == best.key);
  while (best.lane == W && best.index + 1 < vectors) {
    ++best.index;
    best.vector = load_bytes<Int>(keys + best.index * W);
    best.lane = first_lane<T>(best.vector == best.key);
  }
}

template <class T>
MOE_ALIGNED void take_best(const TakeBest<T>& p) {
  using Key = RouterKey<T>;
  using Int = typename Simd<T>::Int;
  constexpr int W = kLanes<T>;
  const int64_t rows = p.rows, ld = p.ld, n = p.n, k = p.k;
  const auto only = [](int lane) { return load_bytes<Int>(kOneLane<T>.mask[lane]) != 0; };
  const Int none = splat_key<T>(kNoKey<T>);
  // Whole vectors are written: the next load of one would wait for a narrower store.
  BestKey<T> best;
  if (n <= kFlatVectors * W) {
    for (int64_t j = 0; j < k; ++j) {
      for (int64_t r = 0; r < rows; ++r) {
        Key* row = p.keys + r * ld;
        find_best<T>(row, n / W, best);
        p.positions[r * k + j] = static_cast<int32_t>(best.index * W) + best.lane;
        store_bytes(row + best.index * W, only(best.lane) ? none : best.vector);
      }
    }
    return;
  }
  const int64_t vectors = (n / W + W - 1) / W;  // of block maxima
  for (int64_t j = 0; j < k; ++j) {
    for (int64_t r = 0; r < rows; ++r) {
      Key *row = p.keys + r * ld, *row_max = p.block_max + r * ld;
      find_best<T>(row_max, vectors, best);
      const int64_t block = best.index * W + best.lane;
      const Int candidates = load_bytes<Int>(row + block * W);
      const int lane = first_lane<T>(candidates == best.key);
      p.positions[r * k + j] = static_cast<int32_t>(block * W) + lane;
      const Int remaining = only(lane) ? none : candidates;
      store_bytes(row + block * W, remaining);
      store_bytes(row_max + best.index * W,
                  only(best.lane) ? max_of_lanes<T>(remaining) : best.vector);
    }
  }
}
