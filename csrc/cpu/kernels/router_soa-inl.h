// Routing of few experts, vectorized over tokens: operands are structures of arrays, an array an
// expert or a slot. A loop over E or K is then one over vectors: no row is too short to fill one,
// and nothing is stored in parts that a vector load would wait for. Included by kernels-inl.h,
// inside its namespace.

// Loads tokens i and on of array `which`.
template <class V, class P>
inline V tokens_of(const P* p, int64_t which, int64_t i) {
  return load_bytes<V>(p + which * kSoaTokens + i);
}

// Selects the K best of each lane: writes their logits to `chosen` and their ids to p.ids. E and K:
// where they are not 0, they are the numbers of experts and slots, and vectors stay in registers.
template <class T, int E, int K>
inline void choose_soa(const RouteSoa<T>& p, int64_t i, Vec<T>* chosen) {
  using Int = typename Simd<T>::Int;
  using Key = RouterKey<T>;
  const int64_t experts = E > 0 ? E : p.experts, top_k = K > 0 ? K : p.top_k;
  Int keys[kSoaExperts];
  for (int64_t e = 0; e < experts; ++e) keys[e] = key_of<T>(tokens_of<Vec<T>>(p.x, e, i));
  for (int64_t k = 0; k < top_k; ++k) {
    Int most = keys[0], best = {};
    Vec<T> value = tokens_of<Vec<T>>(p.x, 0, i);
    for (int64_t e = 1; e < experts; ++e) {
      const Int more = keys[e] > most;  // the smaller id wins a tie
      best = more ? splat_key<T>(static_cast<Key>(e)) : best;
      most = more ? keys[e] : most;
      value = more ? tokens_of<Vec<T>>(p.x, e, i) : value;
    }
    store_bytes(p.ids + k * kSoaTokens + i, best);
    chosen[k] = value;
    if (k + 1 == top_k) break;
    for (int64_t e = 0; e < experts; ++e) {
      keys[e] = best == splat_key<T>(static_cast<Key>(e)) ? splat_key<T>(kNoKey<T>) : keys[e];
    }
  }
}

template <class T, int E, int K>
inline __attribute__((always_inline)) void route_soa_of(const RouteSoa<T>& p) {
  const int64_t experts = E > 0 ? E : p.experts, top_k = K > 0 ? K : p.top_k;
  const bool softmax = is_softmax(p.score_func);
  const bool over_all = softmax && !p.topk_first && experts != top_k;
  for (int64_t i = 0; i < p.tokens; i += kLanes<T>) {
    Vec<T> w[kSoaExperts];
    w[0] = Vec<T>{};
    choose_soa<T, E, K>(p, i, w);
    const Vec<T> most = w[0];  // NaN if all are
    Vec<T> sum = {};
    if (over_all) {
      for (int64_t e = 0; e < experts; ++e) {
        sum += exponential<T, true>(tokens_of<Vec<T>>(p.x, e, i) - most);
      }
    }
    for (int64_t k = 0; k < top_k; ++k) {
      if (softmax) {
        w[k] = exponential<T, true>(w[k] - most);
        if (!over_all) sum += w[k];
      } else {
        w[k] = score_of<T>(p.score_func, w[k]);
      }
    }
    if (softmax) {
      for (int64_t k = 0; k < top_k; ++k) w[k] /= sum;
    }
    if (p.renormalize) {
      Vec<T> total = {};
      for (int64_t k = 0; k < top_k; ++k) total += w[k];
      total += T(1e-20);
      for (int64_t k = 0; k < top_k; ++k) w[k] /= total;
    }
    for (int64_t k = 0; k < top_k; ++k) store_bytes(p.weights + k * kSoaTokens + i, w[k] * p.scale);
  }
}

// Computes the gradients by the formulas in router_bwd.cpp.
template <class T, int E, int K>
inline __attribute__((always_inline)) void route_soa_bwd_of(const RouteSoa<T>& p) {
  const int64_t experts = E > 0 ? E : p.experts, top_k = K > 0 ? K : p.top_k;
  using Int = typename Simd<T>::Int;
  using Key = RouterKey<T>;
  const bool softmax = is_softmax(p.score_func);
  const bool over_all = softmax && !p.topk_first;
  const Vec<T> none = {};
  for (int64_t i = 0; i < p.tokens; i += kLanes<T>) {
    // Slots without an expert have score and gradient 0.
    Vec<T> score[kSoaExperts], slope[kSoaExperts], grad[kSoaExperts], exps[kSoaExperts];
    Vec<T> most = splat<T>(-T(__builtin_inf()));
    for (int64_t k = 0; k < top_k; ++k) {
      const Int id = tokens_of<Int>(p.ids, k, i);
      Vec<T> value = {};
      for (int64_t e = 0; e < experts; ++e) {
        value = id == splat_key<T>(static_cast<Key>(e)) ? tokens_of<Vec<T>>(p.x, e, i) : value;
      }
      score[k] = value;
      grad[k] = id < 0 ? none : tokens_of<Vec<T>>(p.weights, k, i);
      if (!over_all) most = ((id >= 0) & (value > most)) ? value : most;  // NaN is passed over
    }
    Vec<T> sum = {};
    for (int64_t e = 0; e < experts; ++e) exps[e] = none;
    if (over_all) {
      for (int64_t e = 0; e < experts; ++e) {
        const Vec<T> x = tokens_of<Vec<T>>(p.x, e, i);
        most = x > most ? x : most;
      }
      for (int64_t e = 0; e < experts; ++e) {
        exps[e] = exponential<T, true>(tokens_of<Vec<T>>(p.x, e, i) - most);
        sum += exps[e];
      }
    }
    for (int64_t k = 0; k < top_k; ++k) {
      const Int absent = tokens_of<Int>(p.ids, k, i) < 0;
      const Vec<T> value = score[k];
      slope[k] = none;
      if (softmax) {
        score[k] = absent ? none : exponential<T, true>(value - most);
        if (!over_all) sum += score[k];
      } else {
        const ScoreAndSlope<T> both = score_and_slope<T>(p.score_func, value);
        score[k] = absent ? none : both.score;
        slope[k] = absent ? none : both.slope;
      }
    }
    if (softmax) {
      for (int64_t k = 0; k < top_k; ++k) {
        score[k] = tokens_of<Int>(p.ids, k, i) < 0 ? none : score[k] / sum;
      }
    }
    Vec<T> mean = {};  // D
    if (p.renormalize) {
      Vec<T> total = {}, weighted = {};
      for (int64_t k = 0; k < top_k; ++k) total += score[k];
      const Vec<T> r = total + T(1e-20);
      for (int64_t k = 0; k < top_k; ++k) weighted += grad[k] * (score[k] / r);
      for (int64_t k = 0; k < top_k; ++k) {
        const Vec<T> g = p.scale * (grad[k] - weighted) / r;
        grad[k] = tokens_of<Int>(p.ids, k, i) < 0 ? none : g;
      }
      mean = p.scale * weighted * ((r - total) / r);
    } else {
      for (int64_t k = 0; k < top_k; ++k) {
        grad[k] *= p.scale;
        mean += score[k] * grad[k];
      }
    }
    // An id may stand in several slots, hence the sums.
    const Vec<T> inverse = T(1) / sum;
    for (int64_t e = 0; e < experts; ++e) {
      Vec<T> of_slots = {}, out = {};
      for (int64_t k = 0; k < top_k; ++k) {
        const Int here = tokens_of<Int>(p.ids, k, i) == splat_key<T>(static_cast<Key>(e));
        of_slots += here ? grad[k] : none;
        out += here ? (softmax ? score[k] * (grad[k] - mean) : slope[k] * grad[k]) : none;
      }
      if (over_all) {
        out = mean != T(0) ? exps[e] * inverse * (of_slots - mean) : out;
      }
      store_bytes(p.grad_x + e * kSoaTokens + i, out);
    }
  }
}

template <class T>
MOE_ALIGNED void route_soa(const RouteSoa<T>& p) {
  if (p.top_k == 2 && p.experts == 4) return route_soa_of<T, 4, 2>(p);
  if (p.top_k == 2 && p.experts == 8) return route_soa_of<T, 8, 2>(p);
  route_soa_of<T, 0, 0>(p);
}

template <class T>
MOE_ALIGNED void route_soa_bwd(const RouteSoa<T>& p) {
  if (p.top_k == 2 && p.experts == 4) return route_soa_bwd_of<T, 4, 2>(p);
  if (p.top_k == 2 && p.experts == 8) return route_soa_bwd_of<T, 8, 2>(p);
  route_soa_bwd_of<T, 0, 0>(p);
}
