#include "cpu/kernels/self_test.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace moe_ops::cpu {

namespace {

// Numbers in [-1, 1) that bfloat16 and float16 hold exactly, so that all types see the same ones.
template <class T>
class Numbers {
 public:
  std::vector<T> take(int64_t n) {
    std::vector<T> v(static_cast<size_t>(n));
    for (T& x : v) {
      state_ = state_ * 1664525u + 1013904223u;
      x = static_cast<T>(static_cast<int32_t>(state_ >> 25) - 64) / T(64);
    }
    return v;
  }

 private:
  uint32_t state_ = 1;
};

// Sums of at most 64 products below 1 in another order, and activations of another exponential.
template <class T>
bool close(const std::vector<T>& a, const std::vector<T>& b) {
  const T bound = sizeof(T) == 8 ? T(1e-12) : T(1e-4);
  for (size_t i = 0; i < a.size(); ++i) {
    if (!(std::abs(a[i] - b[i]) <= bound)) return false;
  }
  return true;
}

constexpr int64_t kDepth = 37;  // not a multiple of anything
constexpr int64_t kPitch = 64;

template <class T>
const DType* types(int* count) {
  static constexpr DType kHalves[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  static constexpr DType kDouble[] = {DType::kFloat64};
  *count = sizeof(T) == 8 ? 1 : 3;
  return sizeof(T) == 8 ? kDouble : kHalves;
}

template <class T>
std::vector<char> as_type(const Kernels<T>& portable, DType type, const std::vector<T>& v) {
  std::vector<char> out(v.size() * 8);
  portable.store_row(type, v.data(), out.data(), static_cast<int64_t>(v.size()));
  return out;
}

template <class T>
bool tiles_right(const Kernels<T>& k, Numbers<T>& numbers) {
  for (int nv = 1; nv <= 2; ++nv) {
    const int width = nv * k.lanes;
    const std::vector<T> b = numbers.take(kDepth * width);
    for (int m = 1; m <= (nv == 1 ? k.mr1 : k.mr2); ++m) {
      const std::vector<T> values = numbers.take(m * kDepth), start = numbers.take(m * width);
      std::vector<T> rows(static_cast<size_t>(m * kLda)), cols(static_cast<size_t>(kDepth * kLdm));
      std::vector<T> truth = start;
      for (int i = 0; i < m; ++i) {
        for (int64_t s = 0; s < kDepth; ++s) {
          const T a = rows[i * kLda + s] = cols[s * kLdm + i] = values[i * kDepth + s];
          for (int j = 0; j < width; ++j) truth[i * width + j] += a * b[s * width + j];
        }
      }
      TileHints hints;
      std::vector<T> c = start, d = start;
      k.row_a[nv - 1][m - 1](kDepth, rows.data(), b.data(), c.data(), width, true, hints);
      k.col_a[nv - 1][m - 1](kDepth, cols.data(), b.data(), d.data(), width, true, hints);
      if (!close(c, truth) || !close(d, truth)) return false;
      if (m > k.mr2) continue;
      c = start;
      std::vector<T> copy(b.size(), T(NAN));
      k.copying_row_a[nv - 1][m - 1](kDepth, rows.data(), b.data(), c.data(), width, true, hints,
                                     copy.data());
      if (!close(c, truth) || copy != b) return false;
    }
  }
  return true;
}

template <class T>
bool panels_right(const Kernels<T>& k, const Kernels<T>& portable, Numbers<T>& numbers) {
  const int P = 2 * k.lanes;
  int num_types;
  const DType* all = types<T>(&num_types);
  constexpr int64_t depth = 36, kStreams = 4;
  for (int type = 0; type < num_types; ++type) {
    const int64_t pair = dtype_size(all[type]) == 2 ? 2 : 1;
    const std::vector<T> w = numbers.take(kStreams * depth * P);  // [stream][k / pair][P][pair]
    const std::vector<char> panels = as_type(portable, all[type], w);
    const int64_t panel_bytes = depth * P * dtype_size(all[type]);
    const int index = static_cast<int>(all[type]);
    if (k.widen_panel[index] != nullptr) {
      std::vector<T> wide(static_cast<size_t>(depth * P), T(NAN)), expected(wide.size());
      for (int64_t s = 0; s < depth; ++s) {
        for (int64_t j = 0; j < P; ++j) {
          expected[s * P + j] = w[(s / pair * P + j) * pair + s % pair];
        }
      }
      k.widen_panel[index](depth, panels.data(), wide.data());
      if (!close(wide, expected)) return false;
    }
    for (int m = 1; m <= k.mr2; ++m) {
      const int64_t size = m * P;
      std::vector<T> a(static_cast<size_t>(m * kPanelLda)),
          truth(static_cast<size_t>(kStreams * size));
      const std::vector<T> values = numbers.take(m * depth);
      for (int i = 0; i < m; ++i) {
        for (int64_t s = 0; s < depth; ++s) {
          a[i * kPanelLda + s] = values[i * depth + s];
          for (int64_t j = 0; j < kStreams * P; ++j) {
            truth[j / P * size + i * P + j % P] +=
                values[i * depth + s] *
                w[j / P * depth * P + (s / pair * P + j % P) * pair + s % pair];
          }
        }
      }
      // Asking ahead for a line a step, and for few.
      for (const int64_t ahead_step : {64, 4}) {
        std::vector<T> c(static_cast<size_t>(size), T(NAN));
        k.panel_tile[index][m - 1](depth, a.data(), panels.data(), c.data(), P, false,
                                   panels.data(), 0, ahead_step);
        if (!close(c, {truth.begin(), truth.begin() + size})) return false;
      }
      if (m > k.stream_rows) continue;
      const int64_t read = k.num_panel_streams[m - 1] * size;
      for (const auto& table : k.panel_streams[index]) {
        std::vector<T> sums(static_cast<size_t>(read), T(NAN));
        T* streams[kStreams];
        for (int64_t s = 0; s < kStreams; ++s) streams[s] = sums.data() + s * size;
        table[m - 1](depth, a.data(), panels.data(), panel_bytes, streams, P, false, 0);
        if (!close(sums, {truth.begin(), truth.begin() + read})) return false;
      }
    }
  }
  return true;
}

template <class T>
bool rank_right(const Kernels<T>& k, const Kernels<T>& portable, Numbers<T>& numbers) {
  constexpr int64_t kTokens = 7;  // 4 + 2 + 1
  int num_types;
  const DType* all = types<T>(&num_types);
  for (int type = 0; type < num_types; ++type) {
    const std::vector<T> w = numbers.take((2 * kRankRows) * kPitch);  // the kernel fetches ahead
    const std::vector<char> stored = as_type(portable, all[type], w);
    for (int rows = 1; rows <= kRankRows; ++rows) {
      const std::vector<T> a = numbers.take(kTokens * kRankRows);
      std::vector<T> c = numbers.take(kTokens * kDepth), truth = c;
      for (int64_t t = 0; t < kTokens; ++t) {
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t j = 0; j < kDepth; ++j) {
            truth[t * kDepth + j] += a[t * kRankRows + r] * w[r * kPitch + j];
          }
        }
      }
      k.rank_update(all[type], rows, kTokens, stored.data(), kPitch, a.data(), kRankRows, c.data(),
                    kDepth, kDepth, true);
      if (!close(c, truth)) return false;
    }
  }
  return true;
}

template <class T>
bool dot_right(const Kernels<T>& k, const Kernels<T>& portable, Numbers<T>& numbers) {
  int num_types;
  const DType* all = types<T>(&num_types);
  // Four rows a time, of which three are of the time before as well, and one.
  constexpr int64_t kTimes = 5, kRows = kDotFeatures + kTimes - 1;
  const std::vector<T> w = numbers.take(kRows * kPitch);
  std::vector<T> x = numbers.take(k.dot_tokens * kPitch);
  for (int t = 0; t < k.dot_tokens; ++t) {
    std::fill(x.begin() + t * kPitch + kDepth, x.begin() + (t + 1) * kPitch, T(0));
  }
  std::vector<T> products(static_cast<size_t>(k.dot_tokens * kRows));
  for (int64_t t = 0; t < k.dot_tokens; ++t) {
    for (int64_t row = 0; row < kRows; ++row) {
      for (int64_t s = 0; s < kDepth; ++s) {
        products[t * kRows + row] += w[row * kPitch + s] * x[t * kPitch + s];
      }
    }
  }
  for (int type = 0; type < num_types; ++type) {
    const std::vector<char> stored = as_type(portable, all[type], w);
    for (int tokens = 1; tokens <= k.dot_tokens; ++tokens) {
      for (const int64_t features : {int64_t{1}, kDotFeatures}) {
        std::vector<T> out(static_cast<size_t>(tokens * features * kTimes), T(NAN)), truth;
        for (int64_t t = 0; t < tokens; ++t) {
          for (int64_t f = 0; f < features; ++f) {
            for (int64_t i = 0; i < kTimes; ++i) truth.push_back(products[t * kRows + f + i]);
          }
        }
        k.dot(all[type], static_cast<int>(features), kTimes, tokens, kDepth, stored.data(), kPitch,
              kPitch, x.data(), kPitch, out.data(), features * kTimes, kTimes, 0);
        if (!close(out, truth)) return false;
      }
    }
  }
  return true;
}

// Two blocks of k of a strip: of numbers, of half types, and of pairs of bfloat16.
template <class T>
bool strip_right(const Kernels<T>& k, const Kernels<T>& portable, Numbers<T>& numbers) {
  // Whole runs between two prefetches, whole vectors, and a part of one.
  constexpr int64_t kLong = 16 * kPrefetchStep + kDepth;
  const int64_t tokens = k.strip_tokens, pitch = round_up<int64_t>(kLong, 16);
  const std::vector<T> w = numbers.take(kDotFeatures * 2 * pitch);
  std::vector<T> x = numbers.take(tokens * 2 * pitch);
  for (int64_t t = 0; t < tokens; ++t) {
    std::fill(x.begin() + 2 * t * pitch + kLong, x.begin() + 2 * (t + 1) * pitch, T(0));
  }
  std::vector<T> truth(static_cast<size_t>(tokens * kDotFeatures));
  for (int64_t i = 0; i < tokens * kDotFeatures; ++i) {
    for (int64_t s = 0; s < kLong; ++s) {
      truth[i] += 2 * w[i % kDotFeatures * 2 * pitch + s] * x[i / kDotFeatures * 2 * pitch + s];
    }
  }
  const auto right = [&](const auto& run, int64_t depth, int64_t pitch_w, const T* weights,
                         const T* rows) {
    for (int m = 1; m <= tokens; ++m) {
      for (const int features : {1, static_cast<int>(kDotFeatures)}) {
        std::vector<T> sums(static_cast<size_t>(m * features * k.lanes), T(NAN));
        std::vector<T> out(static_cast<size_t>(m * features), T(NAN)), want(out);
        TileHints none;
        run(features, m, depth, weights, pitch_w, rows, pitch_w, sums.data(), false, none);
        run(features, m, depth, weights, pitch_w, rows, pitch_w, sums.data(), true, none);
        k.strip_sums(features, m, sums.data(), out.data(), features);
        for (int64_t i = 0; i < m * features; ++i) {
          want[i] = truth[i / features * kDotFeatures + i % features];
        }
        if (!close(out, want)) return false;
      }
    }
    return true;
  };
  if (!right(k.strip, kLong, 2 * pitch, w.data(), x.data())) return false;
  if constexpr (sizeof(T) == 4) {
    for (const DType type : {DType::kBFloat16, DType::kFloat16}) {
      const std::vector<char> w16 = as_type(portable, type, w);
      std::vector<T> wide(w.size(), T(NAN));
      const auto widen = [&](int features, int tokens, int64_t depth, const T* weights,
                             int64_t pitch_w, const T* rows, int64_t pitch_x, T* sums, bool add,
                             TileHints& hints) {
        std::fill(wide.begin(), wide.end(), T(NAN));
        k.strip_widen(type, features, tokens, depth, weights, pitch_w, wide.data(), pitch_w, rows,
                      pitch_x, sums, add, hints);
        for (int64_t i = 0; i < features * depth; ++i) {
          const int64_t at = i / depth * pitch_w + i % depth;
          if (wide[at] != w[at]) sums[0] = T(NAN);
        }
      };
      if (!right(widen, kLong, 2 * pitch, reinterpret_cast<const T*>(w16.data()), x.data())) {
        return false;
      }
    }
    if (k.pairs) {
      const std::vector<char> w16 = as_type(portable, DType::kBFloat16, w);
      const std::vector<char> x16 = as_type(portable, DType::kBFloat16, x);
      // What an odd depth lacks to a pair is a weight times a zero.
      const T* weights = reinterpret_cast<const T*>(w16.data());
      const T* rows = reinterpret_cast<const T*>(x16.data());
      if (!right(k.pair_strip, (kLong + 1) / 2, pitch, weights, rows)) return false;
      for (int m = 1; m <= k.dot_tokens; ++m) {
        for (const int features : {1, static_cast<int>(kDotFeatures)}) {
          std::vector<T> out(static_cast<size_t>(m * features), T(NAN)), want(out);
          k.pair_dot(features, 1, m, (kLong + 1) / 2, weights, 0, pitch, rows, pitch, out.data(),
                     features, 1, 0);
          for (int64_t i = 0; i < m * features; ++i) {
            want[i] = truth[i / features * kDotFeatures + i % features] / 2;
          }
          if (!close(out, want)) return false;
        }
      }
    }
  }
  return true;
}

template <class T>
bool rows_right(const Kernels<T>& k, const Kernels<T>& portable, Numbers<T>& numbers) {
  int num_types;
  const DType* all = types<T>(&num_types);
  for (int type = 0; type < num_types; ++type) {
    // Values between those of a half type, so that rounding is tested too.
    std::vector<T> v = numbers.take(kDepth);
    for (size_t i = 0; i < v.size(); ++i) v[i] *= T(1) + static_cast<T>(i) / T(4099);
    std::vector<char> a(kDepth * 8, 0), b(kDepth * 8, 0);
    k.store_row(all[type], v.data(), a.data(), kDepth);
    portable.store_row(all[type], v.data(), b.data(), kDepth);
    if (a != b) return false;
    alignas(64) char streamed[2][64 * sizeof(T)] = {};
    std::vector<T> line(v.begin(), v.begin() + 32);
    line.insert(line.end(), line.begin(), line.end());
    k.stream_row(all[type], line.data(), streamed[0], 64);
    k.stream_fence();
    portable.store_row(all[type], line.data(), streamed[1], 64);
    if (std::memcmp(streamed[0], streamed[1], sizeof(streamed[0])) != 0) return false;
    std::vector<T> x(kDepth), y(kDepth);
    k.load_row(all[type], a.data(), x.data(), kDepth, T(0.5));
    portable.load_row(all[type], a.data(), y.data(), kDepth, T(0.5));
    if (x != y) return false;
    // Two rows of 18, the second one behind the first.
    std::vector<char> c(kDepth * 8, 0), d(kDepth * 8, 0);
    std::fill(x.begin(), x.end(), T(0));
    std::fill(y.begin(), y.end(), T(0));
    k.load_rows(all[type], a.data(), 18, 2, 17, x.data(), 18, T(0.5));
    portable.load_rows(all[type], a.data(), 18, 2, 17, y.data(), 18, T(0.5));
    k.store_rows(all[type], v.data(), 18, 2, 17, c.data(), 18);
    portable.store_rows(all[type], v.data(), 18, 2, 17, d.data(), 18);
    if (x != y || c != d) return false;
    const void* rows[] = {a.data(), b.data()};
    const T weights[] = {T(0.25), T(2)};
    k.weighted_sum(all[type], rows, weights, 2, x.data(), kDepth);
    portable.weighted_sum(all[type], rows, weights, 2, y.data(), kDepth);
    if (!close(x, y)) return false;
    // Two rows of 18 from there, and a token with both and one with one of them.
    const int32_t index[] = {1, 0, -1, 1};
    const T factors[] = {T(0.25), T(2), T(1), T(-1)};
    std::vector<T> near(kDepth, T(0)), far(kDepth, T(0));
    std::vector<char> joined[2];
    T products[2][2];
    for (int level = 0; level < 2; ++level) {
      const Kernels<T>& table = level == 0 ? k : portable;
      std::vector<T>& wide = level == 0 ? near : far;
      table.gather_rows(all[type], rows, 2, 17, weights, wide.data(), 18);
      table.dot_rows(all[type], rows, wide.data(), 18, 2, 17, products[level]);
      joined[level].assign(kDepth * 8, 0);
      table.combine_rows(all[type], wide.data(), 18, index, factors, 2, 2, 17,
                         joined[level].data());
      std::vector<char> one(kDepth * 8, 0), two(kDepth * 8, 0);
      void* const apart[] = {one.data(), two.data()};
      table.scatter_rows(all[type], wide.data(), 18, 2, 17, factors, apart);
      joined[level].insert(joined[level].end(), one.begin(), one.end());
      joined[level].insert(joined[level].end(), two.begin(), two.end());
    }
    // Products with powers of two are exact, and a sum of two is rounded once.
    if (near != far || joined[0] != joined[1]) return false;
    for (int r = 0; r < 2; ++r) {
      if (!(std::abs(products[0][r] - products[1][r]) <= T(1e-4))) return false;
    }
    k.axpy(all[type], a.data(), T(-3), x.data(), kDepth);
    portable.axpy(all[type], a.data(), T(-3), y.data(), kDepth);
    if (!close(x, y)) return false;
    const T dots[] = {k.dot_row(all[type], a.data(), all[type], b.data(), kDepth),
                      portable.dot_row(all[type], a.data(), all[type], b.data(), kDepth)};
    if (!(std::abs(dots[0] - dots[1]) <= T(1e-4))) return false;
    // Panels of this level's width against the definition.
    const int64_t P = 2 * k.lanes, last = round_up<int64_t>(kDepth % P, k.lanes);
    std::vector<T> packed(static_cast<size_t>(2 * (kDepth / P * P + last)), T(NAN));
    k.pack_panels(all[type], rows, 0, 2, kDepth, nullptr, packed.data(), 2 * P);
    portable.load_row(all[type], a.data(), y.data(), kDepth, T(1));
    for (int64_t c = 0; c < kDepth; ++c) {
      const int64_t j = c / P * P, width = j + P <= kDepth ? P : last;
      for (int64_t r = 0; r < 2; ++r) {
        if (packed[j * 2 + r * width + c - j] != y[c]) return false;
      }
    }
  }
  return true;
}

template <class T>
bool norm_right(const Kernels<T>& k, const Kernels<T>& portable, Numbers<T>& numbers) {
  constexpr int64_t kRows = 2;
  int num_types;
  const DType* all = types<T>(&num_types);
  const std::vector<T> weight = numbers.take(kDepth), bias = numbers.take(kDepth);
  std::vector<T> x = numbers.take(kRows * kDepth), more = numbers.take(kRows * kDepth);
  for (int i = 0; i < num_types; ++i) {
    const std::vector<char> a = as_type(portable, all[i], x), b = as_type(portable, all[i], more);
    std::vector<T> out[2], stored[2];
    for (int level = 0; level < 2; ++level) {
      const Kernels<T>& table = level == 0 ? k : portable;
      std::vector<T> wide(kDepth), rstd(kRows), sums[2];
      for (auto& v : sums) v.assign(kDepth, T(1));
      std::vector<char> y(a.size()), sum(a.size()), grad(a.size());
      table.norm_rows({all[i], kRows, kDepth, T(1e-6), weight.data(), bias.data(), wide.data(),
                       a.data(), b.data(), y.data(), sum.data(), rstd.data()});
      table.norm_rows_bwd({all[i], kRows, kDepth, weight.data(), b.data(), a.data(), sum.data(),
                           rstd.data(), grad.data(), sums[0].data(), sums[1].data()});
      out[level] = rstd;
      for (const auto& v : sums) out[level].insert(out[level].end(), v.begin(), v.end());
      for (const auto& half : {y, sum, grad}) {
        std::vector<T> v(static_cast<size_t>(kRows * kDepth));
        portable.load_row(all[i], half.data(), v.data(), kRows * kDepth, T(1));
        stored[level].insert(stored[level].end(), v.begin(), v.end());
      }
    }
    if (!close(out[0], out[1])) return false;
    // A root in another order may make a half type round to its next number.
    const T step = sizeof(T) == 4 && all[i] != DType::kFloat32 ? T(1.0 / 128) : T(0);
    for (size_t j = 0; j < stored[0].size(); ++j) {
      const T difference = std::abs(stored[0][j] - stored[1][j]);
      if (!(difference <= T(1e-4) + step * std::abs(stored[1][j]))) return false;
    }
  }
  return true;
}

template <class T>
bool rotary_right(const Kernels<T>& k, const Kernels<T>& portable, Numbers<T>& numbers) {
  constexpr int64_t kTokens = 2, kHeads = 3;
  for (const int64_t half : {int64_t{3}, int64_t{k.lanes / 2}, int64_t{k.lanes + 1}}) {
    const int64_t n = kHeads * 2 * half;
    const std::vector<T> in = numbers.take(kTokens * n);
    const std::vector<T> cos = numbers.take(kTokens * half), sin = numbers.take(kTokens * half);
    std::vector<T> out[2];
    for (int level = 0; level < 2; ++level) {
      out[level].resize(in.size());
      (level == 0 ? k : portable)
          .rotate_rows(kTokens, in.data(), n, cos.data(), sin.data(), T(-1), kHeads, half,
                       out[level].data(), n);
    }
    if (!close(out[0], out[1])) return false;
  }
  return true;
}

template <class T>
bool router_right(const Kernels<T>& k, const Kernels<T>& portable, Numbers<T>& numbers) {
  constexpr int64_t kTokens = 5, kExperts = 2 * kRouterExperts;
  const int64_t n = 2 * k.lanes;
  const std::vector<T> x = numbers.take(kTokens * n), w = numbers.take(kExperts * n),
                       g = numbers.take(kTokens * kExperts), bias = numbers.take(kExperts);
  for (int want = 1; want < 4; ++want) {
    std::vector<T> out[2];
    for (int level = 0; level < 2; ++level) {
      const Kernels<T>& table = level == 0 ? k : portable;
      std::vector<T> logits(kTokens * kExperts), grad_x(x.size()), grad_w(w.size(), T(1));
      table.router_linear(kTokens, kExperts, n, x.data(), n, w.data(), n, bias.data(),
                          logits.data(), kExperts);
      table.router_linear_bwd({kTokens, kExperts, n, g.data(), kExperts, x.data(), n, w.data(), n,
                               want & 1 ? grad_x.data() : nullptr, n,
                               want & 2 ? grad_w.data() : nullptr, n});
      for (const auto& v : {logits, grad_x, grad_w}) {
        out[level].insert(out[level].end(), v.begin(), v.end());
      }
    }
    if (!close(out[0], out[1])) return false;
  }
  return true;
}

template <class T>
bool transpose_right(const Kernels<T>& k, Numbers<T>& numbers) {
  const int64_t rows = 2 * k.lanes;
  const std::vector<T> src = numbers.take(rows * kPitch);
  std::vector<T> dst(static_cast<size_t>(kDepth * rows), T(NAN));
  k.transpose(src.data(), kPitch, rows, kDepth, dst.data(), rows);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < kDepth; ++c) {
      if (dst[c * rows + r] != src[r * kPitch + c]) return false;
    }
  }
  return true;
}

template <class T>
bool activations_right(const Kernels<T>& k, const Kernels<T>& portable, Numbers<T>& numbers) {
  std::vector<T> gate = numbers.take(kDepth), up = numbers.take(kDepth), dh = numbers.take(kDepth);
  for (T& g : gate) g *= T(9);
  for (int kind = 0; kind <= static_cast<int>(Activation::kRelu2); ++kind) {
    std::vector<T> out[2][13];
    for (int level = 0; level < 2; ++level) {
      const Kernels<T>& table = level == 0 ? k : portable;
      for (auto& v : out[level]) v.assign(kDepth, T(0));
      auto& o = out[level];
      table.act_fwd(static_cast<Activation>(kind), gate.data(), up.data(), o[0].data(), kDepth,
                    T(1.7), T(7));
      table.act_bwd(static_cast<Activation>(kind), gate.data(), up.data(), dh.data(), o[1].data(),
                    o[2].data(), o[3].data(), kDepth, T(1.7), T(7));
      // In place, over the whole depth.
      const T weight = T(0.3);
      o[4] = dh;
      table.act_bwd_rows({static_cast<Activation>(kind), 1, kDepth, T(1.7), T(7), gate.data(),
                          up.data(), kDepth, o[4].data(), kDepth, &weight, o[4].data(), kDepth,
                          o[5].data(), o[6].data(), kDepth, o[7].data()});
      // The same as rows of one vector and a tail.
      const int64_t rows = 2, n = k.lanes + 1, ld = n + 2;
      const T weights[rows] = {T(0.3), T(2)};
      table.act_rows({static_cast<Activation>(kind), rows, n, T(1.7), T(7), gate.data(), up.data(),
                      ld, o[8].data(), ld});
      table.act_bwd_rows({static_cast<Activation>(kind), rows, n, T(1.7), T(7), gate.data(),
                          up.data(), ld, dh.data(), ld, weights, o[9].data(), ld, o[10].data(),
                          o[11].data(), ld, o[12].data()});
    }
    for (int i = 0; i < 13; ++i) {
      if (!close(out[0][i], out[1][i])) return false;
    }
  }
  return true;
}

// Weights and gradients of a block of attention against their definitions, a lane at a time.
template <class T>
bool attention_right(const Kernels<T>& k, Numbers<T>& numbers) {
  constexpr int64_t kKeys = 5;
  for (const int width : {k.lanes, 2 * k.lanes}) {
    for (const T softcap : {T(0), T(3)}) {
      const std::vector<T> scores = numbers.take(kKeys * width), dp = numbers.take(kKeys * width);
      // Keys are numbered from kBegin on.
      constexpr KeyIndex<T> kBegin = 7;
      std::vector<KeyIndex<T>> first(width), last(width);
      std::vector<T> max(width, k.attention.lowest), sum(width);
      std::vector<T> rest(width), start(width), before(width), lse(width), delta(width, T(0.5));
      std::vector<T> x = scores, factor = rest, slopes = scores;
      for (T& v : x) v *= T(5);
      for (int r = 0; r < width; ++r) {
        first[r] = kBegin + static_cast<KeyIndex<T>>(r % 3);
        last[r] = kBegin + static_cast<KeyIndex<T>>(kKeys - r % 2);
      }
      const AttentionBlock<T> block = {kKeys,        width,       true,   kBegin,
                                       first.data(), last.data(), softcap};
      std::vector<T> p = x, w = x, ds = x, stick_ds = x;
      std::vector<T> rows[3] = {std::vector<T>(kKeys * kLda), std::vector<T>(kKeys * kLda),
                                std::vector<T>(kKeys * kLda)};
      k.attention.softmax(block, p.data(), max.data(), sum.data(), factor.data());
      for (int r = 0; r < width; ++r) lse[r] = max[r] + std::log(sum[r]);
      k.attention.softmax_bwd(block, ds.data(), dp.data(), lse.data(), delta.data(), rows[0].data(),
                              rows[1].data());
      k.attention.stick(block, w.data(), rest.data());
      k.attention.stick_bwd(block, stick_ds.data(), dp.data(), start.data(), slopes.data(),
                            before.data(), rows[1].data(), rows[2].data());
      std::vector<T> truth[4] = {p, p, p, p}, lanes[2] = {rest, before};
      for (int r = 0; r < width; ++r) {
        std::vector<double> logit(kKeys), slope(kKeys, 1.0), weight(kKeys);
        double largest = -1e300, total = 0, left = 1, sum_before = 0;
        const auto seen = [&](int64_t j) { return kBegin + j >= first[r] && kBegin + j < last[r]; };
        for (int64_t j = 0; j < kKeys; ++j) {
          logit[j] = x[j * width + r];
          if (softcap > 0) {
            const double t = std::tanh(logit[j] / softcap);
            logit[j] = softcap * t;
            slope[j] = 1 - t * t;
          }
          if (seen(j)) largest = std::max(largest, logit[j]);
        }
        for (int64_t j = kKeys - 1; j >= 0; --j) {
          const double z = seen(j) ? 1 / (1 + std::exp(-logit[j])) : 0;
          weight[j] = left * z;
          left *= 1 - z;
          if (seen(j)) total += std::exp(logit[j] - largest);
        }
        for (int64_t j = 0; j < kKeys; ++j) {
          const int64_t i = j * width + r;
          const double e = seen(j) ? std::exp(logit[j] - largest) : 0;
          const double z = seen(j) ? 1 / (1 + std::exp(-logit[j])) : 0, g = weight[j] * dp[i];
          truth[0][i] = static_cast<T>(e);
          truth[1][i] = static_cast<T>(e / total * (dp[i] - 0.5) * slope[j]);
          truth[2][i] = static_cast<T>(weight[j]);
          truth[3][i] = static_cast<T>((g * (1 - z) - z * sum_before) * slope[j]);
          sum_before += g;
        }
        lanes[0][r] = static_cast<T>(std::log(left));
        lanes[1][r] = static_cast<T>(sum_before);
      }
      if (!close(p, truth[0]) || !close(ds, truth[1]) || !close(w, truth[2])) return false;
      if (!close(stick_ds, truth[3]) || !close(rest, lanes[0]) || !close(before, lanes[1])) {
        return false;
      }
      for (int64_t i = 0; i < kKeys * width; ++i) {
        if (rows[2][i / width * kLda + i % width] != stick_ds[i]) return false;
      }
    }
  }
  return true;
}

// The kernels of narrow heads: keys that all rows see, keys that some see, and a short step.
template <class T>
bool narrow_right(const Kernels<T>& k, Numbers<T>& numbers) {
  if (k.attention.narrow_size == 0) return true;
  constexpr int64_t kKeys = 2 * kNarrowKeys + 3, kRoom = (kKeys + kNarrowKeys) * kLda;
  const int W = k.lanes;
  for (const int size : {8, 16}) {
    const std::vector<T> keys = numbers.take(kKeys * kNarrowSize), q = numbers.take(size * W);
    const std::vector<T> values = numbers.take(kKeys * kNarrowSize), grad = numbers.take(size * W);
    std::vector<KeyIndex<T>> first(W), last(W);
    for (int r = 0; r < W; ++r) {
      first[r] = static_cast<KeyIndex<T>>(r % 3);
      last[r] = static_cast<KeyIndex<T>>(kKeys - r % 5);
    }
    AttentionBlock<T> block = {kKeys, W, true, 0, first.data(), last.data(), 0};
    block.all_first = 2;
    block.all_last = kKeys - 4;
    std::vector<T> out(size * W), max(W, k.attention.lowest), sum(W), lse(W), delta(W, T(0.5));
    std::vector<T> grad_q(size * W), p_rows(kRoom), ds_rows(kRoom), true_out = out, true_q = out;
    std::vector<T> p(kKeys * W), ds = p, found_p = p, found_ds = p;
    for (int r = 0; r < W; ++r) {
      const auto dot = [&](const std::vector<T>& a, int64_t j, const std::vector<T>& b) {
        double x = 0;
        for (int f = 0; f < size; ++f) x += double(a[j * kNarrowSize + f]) * b[f * W + r];
        return x;
      };
      double total = 0;
      const double power = k.attention.power_scale;
      const auto weight = [&](int64_t j) {
        return first[r] <= j && j < last[r] ? std::exp(dot(keys, j, q) / power) : 0.0;
      };
      for (int64_t j = 0; j < kKeys; ++j) total += weight(j);
      lse[r] = static_cast<T>(std::log(total));
      for (int64_t j = 0; j < kKeys; ++j) {
        p[j * W + r] = static_cast<T>(weight(j) / total);
        ds[j * W + r] = static_cast<T>(weight(j) / total * (dot(values, j, grad) - 0.5));
        for (int f = 0; f < size; ++f) {
          true_out[f * W + r] += p[j * W + r] * values[j * kNarrowSize + f];
          true_q[f * W + r] += ds[j * W + r] * keys[j * kNarrowSize + f];
        }
      }
    }
    k.attention.narrow(size, block, keys.data(), values.data(), q.data(), out.data(), max.data(),
                       sum.data());
    for (int i = 0; i < size * W; ++i) out[i] /= sum[i % W];
    k.attention.narrow_bwd(size, block, keys.data(), values.data(), q.data(), grad.data(),
                           lse.data(), delta.data(), grad_q.data(), p_rows.data(), ds_rows.data());
    for (int64_t i = 0; i < kKeys * W; ++i) {
      found_p[i] = p_rows[i / W * kLda + i % W];
      found_ds[i] = ds_rows[i / W * kLda + i % W];
    }
    for (int r = 0; r < W; ++r) {
      max[r] = static_cast<T>(max[r] / k.attention.power_scale + std::log(sum[r]));
    }
    if (!close(out, true_out) || !close(max, lse) || !close(grad_q, true_q)) return false;
    if (!close(found_p, p) || !close(found_ds, ds)) return false;
  }
  return true;
}

// Integer products, tiles of words and rounding of tokens against their definitions. Tokens are
// integers over 64 with a 127 in every block, so that rounding them to integers changes nothing.
bool quant_right(const Kernels<float>& k, Numbers<float>& numbers) {
  // dot4 and dot8 end the sums of several times together, the last of five alone.
  constexpr int64_t kMost = 384, kBytes = 384, kTimes = 5;
  const int64_t num_features = std::max<int64_t>(kDotFeatures, k.quant.dot8_features) + kTimes - 1;
  const std::vector<float> weights = numbers.take(2 * num_features * kBytes);
  const std::vector<float> scales = numbers.take(num_features * 16);
  std::vector<uint8_t> w(weights.size());
  for (size_t i = 0; i < w.size(); ++i) {
    const float parts = (weights[i] + weights[(i * 7 + 3) % w.size()]) * 64;
    w[i] = static_cast<uint8_t>(static_cast<int>(parts));
    if (w[i] == 0x80) w[i] = 0x81;
  }
  std::vector<float> x = numbers.take(4 * kMost);
  for (size_t i = 0; i < x.size(); i += kQuantBlock)
    x[i + i / kQuantBlock % kQuantBlock] = 127 / 64.0f;
  for (const int64_t group : {int64_t{0}, int64_t{32}, int64_t{64}, int64_t{128}}) {
    const int bits = group == 0 ? 8 : 4;
    for (const int64_t K : {int64_t{37}, int64_t{96}, int64_t{128}, kMost}) {
      if (bits == 4 && K % group != 0) continue;
      const auto code = [&](int64_t f, int64_t i) {
        const uint8_t byte = w[f * kBytes + i * bits / 8];
        if (bits == 8) return static_cast<int>(static_cast<int8_t>(byte));
        return (i % 2 == 0 ? byte & 15 : byte >> 4) - 8;
      };
      const auto scale = [&](int64_t f, int64_t i) {
        return scales[f * 16 + (bits == 8 ? 0 : i / group)];
      };
      const int64_t row_bytes = bits == 8 ? k.quant.row8_bytes(K) : k.quant.row4_bytes(K);
      std::vector<char> rows(static_cast<size_t>(row_bytes * k.dot_tokens));
      std::vector<double> truth(static_cast<size_t>(k.dot_tokens * num_features));
      std::vector<double> magnitude = truth;
      for (int t = 0; t < k.dot_tokens; ++t) {
        std::vector<float> row(static_cast<size_t>(round_up<int64_t>(K, 64)));
        std::copy_n(x.begin() + t * kMost, K, row.begin());
        // The block that K cuts has its 127 where there is a token.
        row[K / kQuantBlock * kQuantBlock - (K % kQuantBlock == 0)] = 127 / 64.0f;
        (bits == 8 ? k.quant.row8 : k.quant.row4)(K, row.data(), rows.data() + t * row_bytes);
        for (int64_t f = 0; f < num_features; ++f) {
          for (int64_t i = 0; i < K; ++i) {
            const double product = static_cast<double>(row[i]) * code(f, i) * scale(f, i);
            truth[t * num_features + f] += product;
            magnitude[t * num_features + f] += std::abs(product);
          }
        }
      }
      const int64_t most_features = bits == 8 ? k.quant.dot8_features : kDotFeatures;
      for (int tokens = 1; tokens <= k.dot_tokens; ++tokens) {
        for (const int features : {1, static_cast<int>(most_features)}) {
          const int64_t count = features == 1 ? 3 : kTimes;
          std::vector<float> out(truth.size(), NAN);
          if (bits == 8) {
            k.quant.dot8(features, count, tokens, K, w.data(), kBytes, kBytes, rows.data(),
                         row_bytes, out.data(), num_features, 1, w.data(), kBytes, features);
          } else {
            k.quant.dot4(group, features, count, tokens, K, w.data(), kBytes, kBytes, scales.data(),
                         16, 16, rows.data(), row_bytes, out.data(), num_features, 1);
          }
          for (int t = 0; t < tokens; ++t) {
            for (int f = 0; f < features + count - 1; ++f) {
              const int64_t i = t * num_features + f;
              // 16 bits are 1.5e-5 of the largest, at the most, and tokens about half of that.
              const double tolerance = bits == 8 ? 3e-5 : 1e-5;
              const float sum = bits == 8 ? out[i] * scale(f, 0) : out[i];
              if (!(std::abs(sum - truth[i]) <= tolerance * magnitude[i])) return false;
            }
          }
        }
      }
      // The same weights in panels of words and their tiles.
      const int64_t k0 = 32 % K, n = K - k0, P = 2 * k.lanes,
                    count = ceil_div<int64_t>(n, 32 / bits);
      if (n > kKc) continue;
      std::vector<uint32_t> words(static_cast<size_t>(round_up<int64_t>(count, 8) * P));
      const int64_t runs = bits == 4 && count % 2 == 0 ? 2 : 1, run = count / runs * 32 / bits;
      const std::vector<float> column_scale = numbers.take(runs * P);
      std::vector<float> values = numbers.take(k.mr2 * n);
      for (int64_t i = 0; i < k.mr2 * n; ++i) {
        if (i % n % kQuantBlock == 0) values[i] = 127 / 64.0f;
      }
      for (const TokenForm form : {TokenForm::kFloats, TokenForm::kPairs, TokenForm::kBytes}) {
        const bool floats = form == TokenForm::kFloats, bytes = form == TokenForm::kBytes;
        if (form == TokenForm::kPairs && (bits == 4 || k.quant.pairs == nullptr)) continue;
        if (bytes && k.quant.byte_tile[bits == 4][0] == nullptr) continue;
        if (bytes && bits == 4 && run % kQuantBlock != 0) continue;
        k.quant.words(bits, bytes != (bits == 4), w.data(), kBytes, kDotFeatures, k0, n,
                      words.data());
        const int64_t most = floats ? k.mr2 : bytes ? k.quant.byte_rows : k.quant.code_rows;
        for (int64_t m = 1; m <= most; ++m) {
          std::vector<float> rows_of_a(static_cast<size_t>(m * kLda)), c(m * P, NAN);
          for (int64_t i = 0; i < m; ++i) {
            std::vector<float> row(static_cast<size_t>(round_up(n, kQuantBlock)));
            std::copy_n(values.begin() + i * n, n, row.begin());
            float* dst = rows_of_a.data() + i * kLda;
            if (floats) std::copy_n(row.begin(), n, dst);
            if (form == TokenForm::kPairs) k.quant.pairs(n, row.data(), dst);
            if (bytes) k.quant.bytes(bits, n, row.data(), dst);
          }
          const float* a = rows_of_a.data();
          if (bytes) {
            k.quant.byte_tile[bits == 4][m - 1](runs, count / runs, a, a + kByteDepth / 4,
                                                words.data(), column_scale.data(), c.data(), P,
                                                false, nullptr, 0);
          } else {
            (floats ? k.quant.tile[bits == 4] : k.quant.code_tile)[m - 1](
                runs, count / runs, a, a + kKc, words.data(), column_scale.data(), c.data(), P,
                false, nullptr, 0);
          }
          for (int64_t i = 0; i < m; ++i) {
            for (int64_t f = 0; f < kDotFeatures; ++f) {
              double sum = 0, most = 0;
              for (int64_t j = 0; j < n; ++j) {
                const double product = static_cast<double>(values[i * n + j]) * code(f, k0 + j) *
                                       column_scale[j / run * P + f];
                sum += product;
                most += std::abs(product);
              }
              const double tolerance = form == TokenForm::kPairs ? 3e-5 : 1e-5;
              if (!(std::abs(c[i * P + f] - sum) <= tolerance * most)) return false;
            }
          }
        }
      }
    }
  }
  std::vector<float> a = numbers.take(kDepth), b = numbers.take(kDepth), product = a;
  k.quant.multiply_row(b.data(), product.data(), kDepth);
  for (int64_t i = 0; i < kDepth; ++i) {
    if (product[i] != a[i] * b[i]) return false;
  }
  return true;
}

// Codes of e4m3 in and out, their products and the sums of blocks, against their definitions.
bool fp8_right(const Kernels<float>& k, const Kernels<float>& portable, Numbers<float>& numbers) {
  constexpr int64_t K = 2 * kFp8Block + kDepth;
  uint8_t all[256];
  float values[256], again[kFp8Block];
  for (int i = 0; i < 256; ++i) {
    // The two blocks hold one sign each; the code in the place of NaN is 448 again.
    all[i] = static_cast<uint8_t>((i & 0x7f) == kFp8Nan ? i - 1 : i);
    const int exponent = all[i] >> 3 & 15, mantissa = all[i] & 7;
    values[i] = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
    if (i >= 128) values[i] = -values[i];
  }
  for (int sign = 0; sign < 2; ++sign) {
    uint8_t q[kFp8Block];
    const float* exact = values + sign * kFp8Block;
    if (k.fp8.quantize(exact, kFp8Block, q) != 1.0f) return false;
    if (std::memcmp(q, all + sign * kFp8Block, kFp8Block) != 0) return false;
    k.fp8.decode(q, again, kFp8Block);
    if (!std::equal(exact, exact + kFp8Block, again)) return false;
    if (k.pairs) {
      uint16_t halves[kFp8Block];
      k.fp8.decode_bf16(q, halves, kFp8Block);
      portable.load_row(DType::kBFloat16, halves, again, kFp8Block, 1.0f);
      if (!std::equal(exact, exact + kFp8Block, again)) return false;
    }
  }
  const uint8_t nan = kFp8Nan;
  k.fp8.decode(&nan, again, 1);
  if (!std::isnan(again[0])) return false;

  std::vector<uint8_t> w(kDotFeatures * K);
  for (size_t i = 0; i < w.size(); ++i) w[i] = all[(i * 37 + i / 256) % 256];
  const int64_t ldx = round_up<int64_t>(K, 64);
  const std::vector<float> x = numbers.take(kFp8DotTokens * ldx), scales = numbers.take(16);
  const float *w_scale[kDotFeatures], *x_scale[kFp8DotTokens];  // three a row
  for (int f = 0; f < kDotFeatures; ++f) w_scale[f] = scales.data() + f;
  for (int t = 0; t < kFp8DotTokens; ++t) x_scale[t] = scales.data() + 8 + t;
  std::vector<float> row(K);
  for (int tokens = 1; tokens <= kFp8DotTokens; ++tokens) {
    for (const int features : {1, 3, static_cast<int>(kDotFeatures)}) {
      float out[kFp8DotTokens * kDotFeatures];
      k.fp8.dot(features, tokens, K, w.data(), K, w_scale, x.data(), ldx, x_scale, out,
                kDotFeatures, 1);
      std::vector<float> wide(static_cast<size_t>(features * ldx));
      for (int f = 0; f < features; ++f) k.fp8.decode(w.data() + f * K, wide.data() + f * ldx, K);
      float same[kFp8DotTokens * kDotFeatures];
      k.fp8.dot_wide(features, tokens, K, wide.data(), ldx, w_scale, x.data(), ldx, x_scale, same,
                     kDotFeatures, 1);
      for (int t = 0; t < tokens; ++t) {
        for (int f = 0; f < features; ++f) {
          portable.fp8.decode(w.data() + f * K, row.data(), K);
          double sum = 0, most = 0;
          for (int64_t i = 0; i < K; ++i) {
            const double product = static_cast<double>(row[i]) * x[t * ldx + i] *
                                   w_scale[f][i / kFp8Block] * x_scale[t][i / kFp8Block];
            sum += product;
            most += std::abs(product);
          }
          if (!(std::abs(out[t * kDotFeatures + f] - sum) <= 1e-5 * most)) return false;
          if (same[t * kDotFeatures + f] != out[t * kDotFeatures + f]) return false;
        }
      }
    }
  }
  const int64_t cols = 2 * k.lanes;
  const std::vector<float> block = numbers.take(2 * cols), row_scale = numbers.take(2);
  const std::vector<float> col_scale = numbers.take(cols), start = numbers.take(2 * cols);
  std::vector<float> sums = start, truth = start;
  for (int64_t i = 0; i < 2 * cols; ++i) {
    truth[i] += block[i] * row_scale[i / cols] * col_scale[i % cols];
  }
  k.fp8.promote(2, cols, block.data(), cols, row_scale.data(), col_scale.data(), sums.data(), cols,
                true);
  return close(sums, truth);
}

// Tiles on pairs of bfloat16: rows of a against one and two vectors of columns.
bool pairs_right(const Kernels<float>& k, const Kernels<float>& portable, Numbers<float>& numbers) {
  if (!k.pairs) return true;
  constexpr int64_t kPairs = 18, kCols = 32, kStreams = 4;
  const std::vector<float> b = numbers.take(2 * kPairs * kStreams * kCols);  // [k][columns]
  const std::vector<char> b16 = as_type(portable, DType::kBFloat16, b);
  const auto* wb = reinterpret_cast<const uint16_t*>(b16.data());
  const uint16_t* rows[2 * kPairs];
  for (int64_t s = 0; s < 2 * kPairs; ++s) rows[s] = wb + s * kStreams * kCols;
  std::vector<float> panels(kPairs * kStreams * kCols);
  k.pack_pairs(rows, 0, 2 * kPairs, kStreams * kCols, reinterpret_cast<uint16_t*>(panels.data()),
               2 * kPairs * kCols);
  std::vector<float> narrow;  // the first 16 columns of the first panel
  for (int64_t s = 0; s < kPairs; ++s) {
    narrow.insert(narrow.end(), panels.begin() + s * kCols, panels.begin() + s * kCols + 16);
  }
  for (int64_t m = 1; m <= k.mr1; ++m) {
    const std::vector<float> a = numbers.take(m * 2 * kPairs);
    const std::vector<char> a16 = as_type(portable, DType::kBFloat16, a);
    const auto* wa = reinterpret_cast<const uint16_t*>(a16.data());
    std::vector<float> truth(static_cast<size_t>(kStreams * m * kCols));
    std::vector<float> row(static_cast<size_t>(m * kLda)), col(kPairs * kLdm);
    std::vector<float> panel_row(static_cast<size_t>(m * kPanelLda));
    std::vector<uint16_t> even(static_cast<size_t>(m)), odd(static_cast<size_t>(m));
    for (int64_t i = 0; i < m; ++i) {
      std::memcpy(row.data() + i * kLda, wa + i * 2 * kPairs, 4 * kPairs);
      std::memcpy(panel_row.data() + i * kPanelLda, wa + i * 2 * kPairs, 4 * kPairs);
      for (int64_t s = 0; s < 2 * kPairs; ++s) {
        for (int64_t j = 0; j < kStreams * kCols; ++j) {
          truth[(j / kCols * m + i) * kCols + j % kCols] +=
              a[i * 2 * kPairs + s] * b[s * kStreams * kCols + j];
        }
      }
    }
    for (int64_t s = 0; s < kPairs; ++s) {
      for (int64_t i = 0; i < m; ++i) {
        even[i] = wa[i * 2 * kPairs + 2 * s];
        odd[i] = wa[i * 2 * kPairs + 2 * s + 1];
      }
      k.pair_rows(even.data(), odd.data(), col.data() + s * kLdm, m);
    }
    const std::vector<float> first(truth.begin(), truth.begin() + m * kCols);
    std::vector<float> slim;
    for (int64_t i = 0; i < m; ++i) {
      slim.insert(slim.end(), first.begin() + i * kCols, first.begin() + i * kCols + 16);
    }
    TileHints none;
    std::vector<float> c(slim.size(), NAN), d(slim.size(), NAN);
    k.pair_row_a[0][m - 1](kPairs, row.data(), narrow.data(), c.data(), 16, false, none);
    k.pair_col_a[0][m - 1](kPairs, col.data(), narrow.data(), d.data(), 16, false, none);
    if (!close(c, slim) || !close(d, slim)) return false;
    if (m > k.mr2) continue;
    std::vector<float> e(first.size(), NAN), f(first.size(), NAN), g(first.size(), NAN);
    k.pair_row_a[1][m - 1](kPairs, row.data(), panels.data(), e.data(), kCols, false, none);
    k.pair_col_a[1][m - 1](kPairs, col.data(), panels.data(), f.data(), kCols, false, none);
    k.pair_panel_tile[m - 1](kPairs, panel_row.data(), panels.data(), g.data(), kCols, false,
                             b16.data(), 0, 64);
    if (!close(e, first) || !close(f, first) || !close(g, first)) return false;
    std::vector<float> h(first.size(), NAN);  // Weight rows as they lie, up to four at a time.
    for (int64_t s = 0; s < 2 * kPairs; s += kRankRows) {
      const auto left = static_cast<int>(std::min<int64_t>(kRankRows, 2 * kPairs - s));
      k.pair_rank_update(left, m, rows[s], kStreams * kCols, row.data() + s / 2, kLda, h.data(),
                         kCols, kCols, s > 0);
    }
    if (!close(h, first)) return false;
    // Rounded by the tile itself, in place and past the cache.
    const std::vector<char> rounded = as_type(portable, DType::kBFloat16, f);
    for (const bool stream : {false, true}) {
      alignas(64) uint16_t halves[kMaxMr * kCols];
      TileHints hints;
      hints.half = true;
      hints.stream = stream;
      k.pair_col_a[1][m - 1](kPairs, col.data(), panels.data(), reinterpret_cast<float*>(halves),
                             kCols, false, hints);
      k.stream_fence();
      if (std::memcmp(halves, rounded.data(), 2 * f.size()) != 0) return false;
    }
    if (m > k.stream_rows) continue;
    truth.resize(static_cast<size_t>(k.num_panel_streams[m - 1] * m * kCols));
    for (const auto& table : k.pair_panel_streams) {
      std::vector<float> sums(truth.size(), NAN);
      float* streams[kStreams];
      for (int64_t s = 0; s < kStreams; ++s) streams[s] = sums.data() + s * m * kCols;
      table[m - 1](kPairs, panel_row.data(), panels.data(), kPairs * kCols * 4, streams, kCols,
                   false, 0);
      if (!close(sums, truth)) return false;
    }
  }
  return true;
}

// 32 rows of 96 k against 32 columns, through every AMX entry.
bool amx_right(const Kernels<float>& k, const Kernels<float>& portable, Numbers<float>& numbers) {
  if (k.amx_panel == nullptr) return true;
  constexpr int64_t kRows = 32, kCols = 32, kK = 96;
  const std::vector<float> a = numbers.take(kRows * kK), b = numbers.take(kK * kCols);
  std::vector<float> truth(kRows * kCols);
  for (int64_t i = 0; i < kRows; ++i) {
    for (int64_t s = 0; s < kK; ++s) {
      for (int64_t j = 0; j < kCols; ++j) truth[i * kCols + j] += a[i * kK + s] * b[s * kCols + j];
    }
  }
  const std::vector<char> a16 = as_type(portable, DType::kBFloat16, a);
  const std::vector<char> b16 = as_type(portable, DType::kBFloat16, b);
  const auto* wa = reinterpret_cast<const uint16_t*>(a16.data());
  const auto* wb = reinterpret_cast<const uint16_t*>(b16.data());
  const uint16_t* rows[kK];
  for (int64_t s = 0; s < kK; ++s) rows[s] = wb + s * kCols;
  std::vector<uint16_t> panel(kK * kCols);
  k.pack_pairs(rows, 0, kK, kCols, panel.data(), 0);
  std::vector<float> c(truth.size(), NAN);
  TileHints none;
  k.amx_begin();
  k.amx_panel(kK / 32, wa, kK, 2, panel.data(), c.data(), kCols, false, none);
  k.amx_panel(kK / 32, wa, kK, 2, panel.data(), c.data(), kCols, true, none);
  k.amx_end();
  for (float& v : c) v *= 0.5f;
  if (!close(c, truth)) return false;

  // The same with a as weights and the columns of b as tokens: two tiles of pairs of k.
  std::vector<uint16_t> x(kK * kCols);
  for (int64_t s = 0; s < kK; ++s) {
    for (int64_t j = 0; j < kCols; ++j) {
      x[j / 16 * 16 * kK + (s / 2 * 16 + j % 16) * 2 + s % 2] = wb[s * kCols + j];
    }
  }
  std::fill(c.begin(), c.end(), NAN);
  k.amx_begin();
  for (int64_t i = 0; i < kRows; i += 16) {
    k.amx_rows(kK / 32, wa + i * kK, kK, x.data(), 16 * kK, 2, c.data() + i * kCols, kCols);
  }
  k.amx_end();
  if (!close(c, truth)) return false;

  return true;
}

}  // namespace

template <class T>
const char* failing_kernel(const Kernels<T>& k, const Kernels<T>& portable) {
  Numbers<T> numbers;
  if (!tiles_right(k, numbers)) return "tile";
  if (!panels_right(k, portable, numbers)) return "panel_tile";
  if (!dot_right(k, portable, numbers)) return "dot";
  if (!strip_right(k, portable, numbers)) return "strip";
  if (!rank_right(k, portable, numbers)) return "rank_update";
  if (!rows_right(k, portable, numbers)) return "row";
  if (!norm_right(k, portable, numbers)) return "norm";
  if (!rotary_right(k, portable, numbers)) return "rotary";
  if (!router_right(k, portable, numbers)) return "router";
  if (!transpose_right(k, numbers)) return "transpose";
  if (!activations_right(k, portable, numbers)) return "activation";
  if (!attention_right(k, numbers)) return "attention";
  if (!narrow_right(k, numbers)) return "attention of narrow heads";
  if constexpr (sizeof(T) == 4) {
    if (!pairs_right(k, portable, numbers)) return "pair";
    if (!quant_right(k, numbers)) return "quant";
    if (!fp8_right(k, portable, numbers)) return "fp8";
    if (!amx_right(k, portable, numbers)) return "amx";
  }
  return nullptr;
}

template const char* failing_kernel<float>(const Kernels<float>&, const Kernels<float>&);
template const char* failing_kernel<double>(const Kernels<double>&, const Kernels<double>&);

}  // namespace moe_ops::cpu
