// Routing with a token in each lane, for few experts. Included by router_row.cpp, inside its
// namespace. A loop over E or K is then one over vectors: no row is too short to fill one, and
// nothing is stored in parts that a vector load would wait for.

// Plane `which` at lane i: kLaneTokens elements of consecutive tokens.
template <class V, class P>
MOE_TEXT V plane(const P* p, int64_t which, int64_t i) {
  return load<V>(p + which * kLaneTokens + i);
}

// The K best of each lane: their logits to `chosen`, their ids to p.ids. E and K: where they are
// not 0, they are the numbers of experts and slots, and vectors stay in registers.
template <class T, class S, int E, int K>
MOE_TEXT void choose_lanes(const RouterLanes<T>& p, int64_t i, typename S::Vec* chosen) {
  using Vec = typename S::Vec;
  using Int = typename S::Int;
  using Key = RouterKey<T>;
  const int64_t experts = E > 0 ? E : p.experts, top_k = K > 0 ? K : p.top_k;
  Int keys[kLaneExperts];
  for (int64_t e = 0; e < experts; ++e) keys[e] = key_of<T, S>(plane<Vec>(p.x, e, i));
  for (int64_t k = 0; k < top_k; ++k) {
    Int most = keys[0], best = {};
    Vec value = plane<Vec>(p.x, 0, i);
    for (int64_t e = 1; e < experts; ++e) {
      const Int more = keys[e] > most;  // the smaller id wins a tie
      best = more ? splat<Int>(static_cast<Key>(e)) : best;
      most = more ? keys[e] : most;
      value = more ? plane<Vec>(p.x, e, i) : value;
    }
    store(p.ids + k * kLaneTokens + i, best);
    chosen[k] = value;
    if (k + 1 == top_k) break;
    for (int64_t e = 0; e < experts; ++e) {
      keys[e] = best == splat<Int>(static_cast<Key>(e)) ? splat<Int>(kNoKey<T>) : keys[e];
    }
  }
}

template <class T, int Bytes, int E, int K>
MOE_TEXT void route_lanes_of(const RouterLanes<T>& p) {
  using S = Lanes<T, Bytes>;
  using Vec = typename S::Vec;
  const int64_t experts = E > 0 ? E : p.experts, top_k = K > 0 ? K : p.top_k;
  const bool over_all = p.softmax && !p.topk_first && experts != top_k;
  for (int64_t i = 0; i < p.tokens; i += S::kCount) {
    Vec w[kLaneExperts];
    w[0] = Vec{};
    choose_lanes<T, S, E, K>(p, i, w);
    const Vec most = w[0];  // NaN if all are
    Vec sum = {};
    if (over_all) {
      for (int64_t e = 0; e < experts; ++e) {
        sum += exp_nonpositive<T, S>(plane<Vec>(p.x, e, i) - most);
      }
    }
    for (int64_t k = 0; k < top_k; ++k) {
      if (p.softmax) {
        w[k] = exp_nonpositive<T, S>(w[k] - most);
        if (!over_all) sum += w[k];
      } else {
        w[k] = sigmoid_of<T, S>(w[k]);
      }
    }
    if (p.softmax) {
      for (int64_t k = 0; k < top_k; ++k) w[k] /= sum;
    }
    if (p.renormalize) {
      Vec total = {};
      for (int64_t k = 0; k < top_k; ++k) total += w[k];
      total += T(1e-20);
      for (int64_t k = 0; k < top_k; ++k) w[k] /= total;
    }
    for (int64_t k = 0; k < top_k; ++k) store(p.weights + k * kLaneTokens + i, w[k] * p.scale);
  }
}

// The formulas are in router_bwd.cpp.
template <class T, int Bytes, int E, int K>
MOE_TEXT void route_lanes_bwd_of(const RouterLanes<T>& p) {
  using S = Lanes<T, Bytes>;
  const int64_t experts = E > 0 ? E : p.experts, top_k = K > 0 ? K : p.top_k;
  using Vec = typename S::Vec;
  using Int = typename S::Int;
  using Key = RouterKey<T>;
  const bool over_all = p.softmax && !p.topk_first;
  const Vec none = {};
  for (int64_t i = 0; i < p.tokens; i += S::kCount) {
    // Slots without an expert have score and gradient 0.
    Vec score[kLaneExperts], slope[kLaneExperts], grad[kLaneExperts], exps[kLaneExperts];
    Vec most = splat<Vec>(-std::numeric_limits<T>::infinity());
    for (int64_t k = 0; k < top_k; ++k) {
      const Int id = plane<Int>(p.ids, k, i);
      Vec value = {};
      for (int64_t e = 0; e < experts; ++e) {
        value = id == splat<Int>(static_cast<Key>(e)) ? plane<Vec>(p.x, e, i) : value;
      }
      score[k] = value;
      grad[k] = id < 0 ? none : plane<Vec>(p.weights, k, i);
      if (!over_all) most = ((id >= 0) & (value > most)) ? value : most;  // NaN is passed over
    }
    Vec sum = {};
    for (int64_t e = 0; e < experts; ++e) exps[e] = none;
    if (over_all) {
      for (int64_t e = 0; e < experts; ++e) most = max(plane<Vec>(p.x, e, i), most);
      for (int64_t e = 0; e < experts; ++e) {
        exps[e] = exp_nonpositive<T, S>(plane<Vec>(p.x, e, i) - most);
        sum += exps[e];
      }
    }
    for (int64_t k = 0; k < top_k; ++k) {
      const Int absent = plane<Int>(p.ids, k, i) < 0;
      const Vec value = score[k];
      if (p.softmax) {
        score[k] = absent ? none : exp_nonpositive<T, S>(value - most);
        if (!over_all) sum += score[k];
      } else {
        // s(-x) is 1 - s(x) without the cancellation.
        score[k] = absent ? none : sigmoid_of<T, S>(value);
        slope[k] = score[k] * sigmoid_of<T, S>(-value);
      }
    }
    if (p.softmax) {
      for (int64_t k = 0; k < top_k; ++k) {
        score[k] = plane<Int>(p.ids, k, i) < 0 ? none : score[k] / sum;
      }
    }
    Vec mean = {};  // D
    if (p.renormalize) {
      Vec total = {}, weighted = {};
      for (int64_t k = 0; k < top_k; ++k) total += score[k];
      const Vec r = total + T(1e-20);
      for (int64_t k = 0; k < top_k; ++k) weighted += grad[k] * (score[k] / r);
      for (int64_t k = 0; k < top_k; ++k) {
        const Vec g = p.scale * (grad[k] - weighted) / r;
        grad[k] = plane<Int>(p.ids, k, i) < 0 ? none : g;
      }
      mean = p.scale * weighted * ((r - total) / r);
    } else {
      for (int64_t k = 0; k < top_k; ++k) {
        grad[k] *= p.scale;
        mean += score[k] * grad[k];
      }
    }
    // An id may stand in several slots, hence the sums.
    const Vec inverse = T(1) / sum;
    for (int64_t e = 0; e < experts; ++e) {
      Vec of_slots = {}, out = {};
      for (int64_t k = 0; k < top_k; ++k) {
        const Int here = plane<Int>(p.ids, k, i) == splat<Int>(static_cast<Key>(e));
        of_slots += here ? grad[k] : none;
        out += here ? (p.softmax ? score[k] * (grad[k] - mean) : slope[k] * grad[k]) : none;
      }
      if (over_all) {
        out = mean != T(0) ? exps[e] * inverse * (of_slots - mean) : out;
      }
      store(p.grad_x + e * kLaneTokens + i, out);
    }
  }
}

template <class T, int Bytes>
MOE_TEXT void route_lanes_text(const RouterLanes<T>& p) {
  if (p.top_k == 2 && p.experts == 4) return route_lanes_of<T, Bytes, 4, 2>(p);
  if (p.top_k == 2 && p.experts == 8) return route_lanes_of<T, Bytes, 8, 2>(p);
  route_lanes_of<T, Bytes, 0, 0>(p);
}

template <class T, int Bytes>
MOE_TEXT void route_lanes_bwd_text(const RouterLanes<T>& p) {
  if (p.top_k == 2 && p.experts == 4) return route_lanes_bwd_of<T, Bytes, 4, 2>(p);
  if (p.top_k == 2 && p.experts == 8) return route_lanes_bwd_of<T, Bytes, 8, 2>(p);
  route_lanes_bwd_of<T, Bytes, 0, 0>(p);
}
