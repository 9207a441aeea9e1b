// Rows over their root mean squares. Included by kernels-inl.h, inside its namespace.

// Computes a row of p; S is the C++ type of p.type.
template <class S, class T>
void norm_row(const NormRows<T>& p, int64_t row) {
  constexpr int W = kLanes<T>;
  const int64_t n = p.cols, at = row * n;
  const S* x = static_cast<const S*>(p.x) + at;
  const S* residual = p.residual != nullptr ? static_cast<const S*>(p.residual) + at : nullptr;
  const T *weight = p.weight, *bias = p.bias;
  T* wide = p.wide;
  S* y = static_cast<S*>(p.y) + at;
  S* sum = p.sum != nullptr ? static_cast<S*>(p.sum) + at : nullptr;
  Vec<T> squares = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    Vec<T> v = load_as(x + i);
    if (residual != nullptr) v += load_as(residual + i);
    if (bias != nullptr) v += load<T>(bias + i);
    if (sum != nullptr) {
      store_as(sum + i, v);
      // The squares are those of the sum as it is stored, because backward reads the stored one.
      if constexpr (sizeof(S) != sizeof(T)) v = load_as(sum + i);
    }
    squares += v * v;
    store<T>(wide + i, v);
  }
  T total = horizontal_sum<T>(squares);
  for (; i < n; ++i) {
    T v = to_float(x[i]);
    if (residual != nullptr) v += to_float(residual[i]);
    if (bias != nullptr) v += bias[i];
    if (sum != nullptr) {
      store_one(sum + i, v);
      v = to_float(sum[i]);
    }
    total += v * v;
    wide[i] = v;
  }
  const T mean = total / static_cast<T>(n) + p.eps;
  T root;
  if constexpr (sizeof(T) == 8) {
    root = __builtin_sqrt(mean);
  } else {
    root = __builtin_sqrtf(mean);
  }
  const T r = T(1) / root;
  p.rstd[row] = r;
  for (i = 0; i + W <= n; i += W) {
    store_as(y + i, load<T>(wide + i) * r * load<T>(weight + i));
  }
  for (; i < n; ++i) store_one(y + i, wide[i] * r * weight[i]);
}

template <class T>
void norm_rows(const NormRows<T>& p) {
  with_type<T>(p.type, p.x, [&]<class S>(const S*) {
    for (int64_t row = 0; row < p.rows; ++row) norm_row<S>(p, row);
  });
}

// Computes gradients. With c the sum of grad_y w s, the gradient of s is r grad_y w - s c r^3 / n.
template <class T>
void norm_rows_bwd(const NormRowsBwd<T>& p) {
  constexpr int W = kLanes<T>;
  const int64_t n = p.cols, whole = n / W * W;
  with_type<T>(p.type, p.grad_y, [&]<class S>(const S* grads) {
    for (int64_t row = 0; row < p.rows; ++row) {
      const S* g = grads + row * n;
      const S* s = static_cast<const S*>(p.sum) + row * n;
      const S* more = p.grad_sum == nullptr ? nullptr : static_cast<const S*>(p.grad_sum) + row * n;
      S* out = p.grad_x == nullptr ? nullptr : static_cast<S*>(p.grad_x) + row * n;
      const T r = p.rstd[row];
      Vec<T> products = {};
      for (int64_t i = 0; i < whole; i += W) {
        const Vec<T> gs = load_as(g + i) * load_as(s + i);
        products += gs * load<T>(p.weight + i);
        if (p.weight_sum != nullptr) {
          store<T>(p.weight_sum + i, load<T>(p.weight_sum + i) + gs * r);
        }
      }
      T c = horizontal_sum<T>(products);
      for (int64_t i = whole; i < n; ++i) {
        const T gs = to_float(g[i]) * to_float(s[i]);
        c += gs * p.weight[i];
        if (p.weight_sum != nullptr) p.weight_sum[i] += gs * r;
      }
      if (out == nullptr && p.bias_sum == nullptr) continue;
      const T a = c * r * r * r / static_cast<T>(n);
      for (int64_t i = 0; i < whole; i += W) {
        Vec<T> v = load_as(g + i) * load<T>(p.weight + i) * r - load_as(s + i) * a;
        if (more != nullptr) v += load_as(more + i);
        if (out != nullptr) store_as(out + i, v);
        if (p.bias_sum != nullptr) store<T>(p.bias_sum + i, load<T>(p.bias_sum + i) + v);
      }
      for (int64_t i = whole; i < n; ++i) {
        T v = to_float(g[i]) * p.weight[i] * r - to_float(s[i]) * a;
        if (more != nullptr) v += to_float(more[i]);
        if (out != nullptr) store_one(out + i, v);
        if (p.bias_sum != nullptr) p.bias_sum[i] += v;
      }
    }
  });
}
