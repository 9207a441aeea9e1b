// The router's linear map. Included by kernels-inl.h, inside its namespace.
// Its few experts are less than a vector, so vectors lie along H: sums of a tile of tokens by
// kRouterExperts are folded once a tile, three instructions a sum. Counts of experts are multiples
// of kRouterExperts, n is one of lanes.

// 16 sums, 4 vectors of weights and one of x fit 32 registers; 8, 4 and 1 fit 16. Eight sums are
// the latency of a multiply-add times two of them a cycle.
constexpr int kRouterTokens = MOE_VEC_BYTES == 64 ? 4 : 2;

// Computes the logits of M tokens and kRouterExperts experts.
template <class T, int M>
inline void router_tile(const RouterLinear<T>& p, int64_t token, int64_t expert) {
  constexpr int W = kLanes<T>, N = kRouterExperts, kFolds = (M * N + W - 1) / W;
  const T *x = p.x + token * p.ld_x, *w = p.w + expert * p.ld_w, *bias = p.bias + expert;
  T* out = p.out + token * p.ld_out + expert;
  const int64_t n = p.n, ld_x = p.ld_x, ld_w = p.ld_w, ld_out = p.ld_out;
  Vec<T> acc[kFolds * W];
#pragma GCC unroll 32
  for (int i = 0; i < kFolds * W; ++i) acc[i] = Vec<T>{};
  for (int64_t i = 0; i < n; i += W) {
    Vec<T> wv[N];
#pragma GCC unroll 4
    for (int e = 0; e < N; ++e) wv[e] = load<T>(w + e * ld_w + i);
#pragma GCC unroll 4
    for (int t = 0; t < M; ++t) {
      const Vec<T> xv = load<T>(x + t * ld_x + i);
#pragma GCC unroll 4
      for (int e = 0; e < N; ++e) acc[t * N + e] += xv * wv[e];
    }
  }
  T sums[kFolds * W];
#pragma GCC unroll 8
  for (int f = 0; f < kFolds; ++f) store<T>(sums + f * W, sums_of_lanes<T>(acc + f * W));
  for (int t = 0; t < M; ++t) {
    for (int e = 0; e < N; ++e) out[t * ld_out + e] = sums[t * N + e] + bias[e];
  }
}

template <class T>
void router_linear(const RouterLinear<T>& p) {
  constexpr int M = kRouterTokens;
  int64_t t = 0;
  for (; t + M <= p.tokens; t += M) {
    for (int64_t e = 0; e < p.experts; e += kRouterExperts) router_tile<T, M>(p, t, e);
  }
  for (; t < p.tokens; ++t) {
    for (int64_t e = 0; e < p.experts; e += kRouterExperts) router_tile<T, 1>(p, t, e);
  }
}

// Computes the gradients of M tokens and kRouterExperts experts: their M x kRouterExperts gradients
// of logits stay in registers while vectors of x, the weights and the sums of weight gradients pass
// once.
template <class T, int M, bool kWantX, bool kWantW, bool kFirst>
inline void router_tile_bwd(const RouterLinearBwd<T>& p, int64_t token, int64_t expert) {
  constexpr int W = kLanes<T>, N = kRouterExperts;
  // By value: a store through a vector might change what p refers to.
  const int64_t n = p.n, ld_x = p.ld_x, ld_w = p.ld_w, ld_gx = p.ld_grad_x, ld_gw = p.ld_grad_w;
  const T* g = p.g + token * p.ld_g + expert;
  const T* x = p.x + token * p.ld_x;
  const T* w = p.w + expert * p.ld_w;
  T* grad_x = p.grad_x + token * p.ld_grad_x;
  T* grad_w = p.grad_w + expert * p.ld_grad_w;
  Vec<T> gv[M][N];
#pragma GCC unroll 4
  for (int t = 0; t < M; ++t) {
#pragma GCC unroll 4
    for (int e = 0; e < N; ++e) gv[t][e] = splat<T>(g[t * p.ld_g + e]);
  }
  for (int64_t i = 0; i < n; i += W) {
    Vec<T> xv[M], out[M];
#pragma GCC unroll 4
    for (int t = 0; t < M; ++t) {
      if constexpr (kWantW) xv[t] = load<T>(x + t * ld_x + i);
      if constexpr (kWantX) out[t] = kFirst ? Vec<T>{} : load<T>(grad_x + t * ld_gx + i);
    }
#pragma GCC unroll 4
    for (int e = 0; e < N; ++e) {
      if constexpr (kWantW) {
        Vec<T> sum = load<T>(grad_w + e * ld_gw + i);
#pragma GCC unroll 4
        for (int t = 0; t < M; ++t) sum += gv[t][e] * xv[t];
        store<T>(grad_w + e * ld_gw + i, sum);
      }
      if constexpr (kWantX) {
        const Vec<T> wv = load<T>(w + e * ld_w + i);
#pragma GCC unroll 4
        for (int t = 0; t < M; ++t) out[t] += gv[t][e] * wv;
      }
    }
    if constexpr (kWantX) {
#pragma GCC unroll 4
      for (int t = 0; t < M; ++t) store<T>(grad_x + t * ld_gx + i, out[t]);
    }
  }
}

template <class T, int M, bool kWantX, bool kWantW>
inline void router_tiles_bwd(const RouterLinearBwd<T>& p, int64_t token) {
  router_tile_bwd<T, M, kWantX, kWantW, true>(p, token, 0);
  for (int64_t e = kRouterExperts; e < p.experts; e += kRouterExperts) {
    router_tile_bwd<T, M, kWantX, kWantW, false>(p, token, e);
  }
}

template <class T, bool kWantX, bool kWantW>
void router_rows_bwd(const RouterLinearBwd<T>& p) {
  constexpr int M = kRouterTokens;
  int64_t t = 0;
  for (; t + M <= p.tokens; t += M) router_tiles_bwd<T, M, kWantX, kWantW>(p, t);
  for (; t < p.tokens; ++t) router_tiles_bwd<T, 1, kWantX, kWantW>(p, t);
}

template <class T>
void router_linear_bwd(const RouterLinearBwd<T>& p) {
  if (p.grad_x == nullptr) return router_rows_bwd<T, false, true>(p);
  if (p.grad_w == nullptr) return router_rows_bwd<T, true, false>(p);
  router_rows_bwd<T, true, true>(p);
}

// An exponential is a chain of 55 cycles, of which wide vectors do twice as many at once. Top-k
// selection is mostly comparisons of short rows, whose masks cost more with AVX-512: there
// MOE_CHOICE_TARGET names the target that they are taken from.
template <class T>
RouterKernels<T> router_table() {
  RouterKernels<T> k = {};
#if defined(MOE_CHOICE_TARGET)
  if constexpr (sizeof(T) == 4) {
    k = MOE_CHOICE_TARGET::kernels_f32().router;
  } else {
    k = MOE_CHOICE_TARGET::kernels_f64().router;
  }
#else
  k.make_keys = &make_keys<T>;
  k.find_block_max = &find_block_max<T>;
  k.take_best = &take_best<T>;
  k.route_soa = &route_soa<T>;
  k.route_soa_bwd = &route_soa_bwd<T>;
#endif
  k.exp_sum = &exp_sum<T>;
  k.exp = &exp_row<T>;
  k.score_row = &score_row<T>;
  k.slope_row = &slope_row<T>;
  k.linear = &router_linear<T>;
  k.linear_bwd = &router_linear_bwd<T>;
  return k;
}
