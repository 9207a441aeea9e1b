// Steps between the products of all_experts_ffn, on all rows of a block at once: a call a row costs
// as much as the row. Included by kernels-inl.h, inside its namespace. Rows of ours may be written
// up to the next whole vector.

// Loads n < lanes elements from p, followed by zeros.
template <class T, class S>
inline Vec<T> load_part(const S* p, int64_t n) {
  T part[kLanes<T>] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = to_float(p[i]);
  return load<T>(part);
}

template <class T, class S>
inline Vec<T> load_some(const S* p, int64_t n) {
  return n >= kLanes<T> ? load_as(p) : load_part<T>(p, n);
}

// Vectors of 32 columns, the runs that are taken at once: what to do with them is asked, and sums
// are read and written, once a run and not once a vector.
template <class T>
constexpr int kDenseRun = 32 / kLanes<T>;

template <class T>
struct DenseRun {
  Vec<T> v[kDenseRun<T>];
  void clear() {
#pragma GCC unroll 16
    for (int i = 0; i < kDenseRun<T>; ++i) v[i] = Vec<T>{};
  }
  void add(const DenseRun& other) {
#pragma GCC unroll 16
    for (int i = 0; i < kDenseRun<T>; ++i) v[i] += other.v[i];
  }
  void put(T* p) const {
#pragma GCC unroll 16
    for (int i = 0; i < kDenseRun<T>; ++i) store<T>(p + i * kLanes<T>, v[i]);
  }
  void add_to(T* p) const {
#pragma GCC unroll 16
    for (int i = 0; i < kDenseRun<T>; ++i) {
      store<T>(p + i * kLanes<T>, load<T>(p + i * kLanes<T>) + v[i]);
    }
  }
};

// Returns the address of vector i of row r in panels of `rows` rows and n columns.
template <class T>
inline T* panel_place(T* panels, int64_t rows, int64_t r, int64_t i, int64_t n) {
  constexpr int64_t W = kLanes<T>;
  const int64_t panel = i / (2 * W) * (2 * W);
  return panels + panel * rows + r * (n - panel > W ? 2 * W : W) + (i - panel);
}

template <class T>
void dense_copy(const DenseCopy<T>& copy) {
  constexpr int W = kLanes<T>;
  T *first = copy.first, *second = copy.second, *sum = copy.sum;
  const int64_t ld = copy.ld, ld_first = copy.ld_first, ld_second = copy.ld_second;
  const int64_t rows = copy.rows, n = copy.n;
  with_type<T>(copy.type, copy.src, [&](const auto* p) {
    int64_t begin = 0;
    for (; begin + 32 <= n; begin += 32) {
      DenseRun<T> total, run;
      total.clear();
      const auto* q = p + begin;
      for (int64_t r = 0; r < rows; ++r, q += ld) {
#pragma GCC unroll 16
        for (int i = 0; i < kDenseRun<T>; ++i) run.v[i] = load_as(q + i * W);
        if (first != nullptr) run.put(first + r * ld_first + begin);
        if (second != nullptr) run.put(second + r * ld_second + begin);
        if (sum != nullptr) total.add(run);
      }
      if (sum != nullptr) total.add_to(sum + begin);
    }
    for (int64_t r = 0; r < rows && begin < n; ++r, p += ld) {
      for (int64_t i = begin; i < n; i += W) {
        const Vec<T> v = load_some<T>(p + i, n - i);
        if (first != nullptr) store<T>(first + r * ld_first + i, v);
        if (second != nullptr) store<T>(second + r * ld_second + i, v);
        if (sum != nullptr) store<T>(sum + i, load<T>(sum + i) + v);
      }
    }
  });
}

template <class T>
void dense_panels(DType type, const void* src, int64_t ld, int64_t rows, int64_t n, T* panels) {
  constexpr int W = kLanes<T>;
  with_type<T>(type, src, [&](const auto* p) {
    for (int64_t r = 0; r < rows; ++r, p += ld) {
      for (int64_t i = 0; i < n; i += W) {
        store<T>(panel_place(panels, rows, r, i, n), load_some<T>(p + i, n - i));
      }
    }
  });
}

template <class T, Activation A, bool kAct>
void dense_act_loop(const DenseAct<T>& p) {
  constexpr int W = kLanes<T>;
  const T* u = p.u;
  T* h = p.h;
  const int64_t n = p.n;
  for (int64_t r = 0; r < p.rows; ++r, u += p.ld_u, h += p.ld_h) {
    for (int64_t i = 0; i < n; i += W) {
      const Vec<T> v = load_some<T>(u + i, n - i);
      store<T>(h + i, kAct ? activate<T, A>(v).value : v);
    }
  }
}

template <class T, Activation A, bool kAct>
void dense_act_bwd_loop(const DenseAct<T>& params) {
  constexpr int W = kLanes<T>;
  const DenseAct<T> to = params;
  const T *u = to.u, *d = to.d;
  const int64_t rows = to.rows, n = to.n, ld_u = to.ld_u, ld_d = to.ld_d;
  int64_t begin = 0;
  for (; d != nullptr && begin + 32 <= n; begin += 32) {
    DenseRun<T> total, h, du;
    total.clear();
    const T *ur = u + begin, *dr = d + begin;
    for (int64_t r = 0; r < rows; ++r, ur += ld_u, dr += ld_d) {
#pragma GCC unroll 16
      for (int i = 0; i < kDenseRun<T>; ++i) {
        const Vec<T> v = load<T>(ur + i * W), dv = load<T>(dr + i * W);
        const ActPair<T> a = kAct ? activate<T, A>(v) : ActPair<T>{v, splat<T>(1)};
        h.v[i] = a.value;
        du.v[i] = kAct ? dv * a.slope : dv;
      }
      if (to.h_panels != nullptr) {
#pragma GCC unroll 16
        for (int i = 0; i < kDenseRun<T>; ++i) {
          store<T>(to.h_panels + (begin + i / 2 * (2 * W)) * rows + r * 2 * W + i % 2 * W, h.v[i]);
        }
      }
      if (to.du_rows != nullptr) du.put(to.du_rows + r * kLda + begin);
      if (to.du_columns != nullptr) du.put(to.du_columns + r * kLdm + begin);
      total.add(du);
    }
    if (to.sum != nullptr) total.add_to(to.sum + begin);
  }
  for (int64_t r = 0; r < rows && begin < n; ++r, u += ld_u, d += ld_d) {
    for (int64_t i = begin; i < n; i += W) {
      const Vec<T> v = load_some<T>(u + i, n - i);
      const ActPair<T> a = kAct ? activate<T, A>(v) : ActPair<T>{v, splat<T>(1)};
      if (to.h_panels != nullptr) store<T>(panel_place(to.h_panels, rows, r, i, n), a.value);
      if (d == nullptr) continue;
      const Vec<T> dv = kAct ? load<T>(d + i) * a.slope : load<T>(d + i);
      if (to.du_rows != nullptr) store<T>(to.du_rows + r * kLda + i, dv);
      if (to.du_columns != nullptr) store<T>(to.du_columns + r * kLdm + i, dv);
      if (to.sum != nullptr) store<T>(to.sum + i, load<T>(to.sum + i) + dv);
    }
  }
}

template <class Fn>
inline void with_dense_activation(bool has_act, Activation kind, const Fn& fn) {
  using enum Activation;
  if (!has_act) return fn.template operator()<kRelu, false>();
  with_value<kSilu, kGelu, kGeluTanh, kRelu, kRelu2>(
      kind, [&]<Activation A>() { fn.template operator()<A, true>(); });
}

template <class T>
void dense_act(const DenseAct<T>& p) {
  with_dense_activation(p.has_act, p.kind,
                        [&]<Activation A, bool kAct>() { dense_act_loop<T, A, kAct>(p); });
}

template <class T>
void dense_act_bwd(const DenseAct<T>& p) {
  with_dense_activation(p.has_act, p.kind,
                        [&]<Activation A, bool kAct>() { dense_act_bwd_loop<T, A, kAct>(p); });
}

template <class T>
ActivationKernels<T> activation_table() {
  return {&act_rows<T>,     &act_bwd_rows<T>, &dense_copy<T>,
          &dense_panels<T>, &dense_act<T>,    &dense_act_bwd<T>};
}
