// A token at a time: its outputs, what the activation makes of them and the mixtures fit in L1, so
// that memory sees outputs once forward and once (with batch statistics twice) backward.
#include "moe_ops/mix_expert_outputs.h"

#include <algorithm>
#include <cmath>

#include "cpu/gemm/blocking.h"
#include "cpu/kernels/mix.h"
#include "cpu/kernels/rows.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/workspace.h"

namespace moe_ops::cpu {

namespace {

template <class P>
int64_t parts_of(const P& p) {
  return std::clamp<int64_t>(ceil_div(p.num_tokens, kMixTokens) / kMixPartBlocks, 1, kMixMostParts);
}

// Returns the elementary operations per token, in vectors.
template <class P>
double cost_of(const P& p) {
  return static_cast<double>(p.num_experts * p.size) * (4.0 + static_cast<double>(p.num_mixtures)) /
         8;
}

// Rows of `size` elements of some type as T, `pitch` apart with zeros between, and back.
template <class T>
struct Padded {
  const RowKernels<T>& k;
  DType type;
  int64_t size, pitch;
  bool direct;  // rows in memory are such rows already

  Padded(const RowKernels<T>& kernels, DType t, int64_t n)
      : k(kernels),
        type(t),
        size(n),
        pitch(round_up<int64_t>(n, kernels.lanes)),
        direct(t == kAccumulate<T> && n == pitch) {}

  const T* load(const void* data, int64_t row, int64_t rows, T* buffer) const {
    const char* src = static_cast<const char*>(data) + row * size * dtype_size(type);
    if (direct) return reinterpret_cast<const T*>(src);
    if (size == pitch) {
      k.load_row(type, src, buffer, rows * size, T(1));
      return buffer;
    }
    for (int64_t r = 0; r < rows; ++r) {
      k.load_row(type, src + r * size * dtype_size(type), buffer + r * pitch, size, T(1));
      std::fill(buffer + r * pitch + size, buffer + (r + 1) * pitch, T(0));
    }
    return buffer;
  }
  T* target(void* data, int64_t row, T* buffer) const {
    return direct ? static_cast<T*>(data) + row * size : buffer;
  }
  void store(const T* buffer, void* data, int64_t row, int64_t rows) const {
    if (direct) return;
    char* dst = static_cast<char*>(data) + row * size * dtype_size(type);
    if (size == pitch) return k.store_row(type, buffer, dst, rows * size);
    for (int64_t r = 0; r < rows; ++r) {
      k.store_row(type, buffer + r * pitch, dst + r * size * dtype_size(type), size);
    }
  }
};

// Backpropagates y = factor * mixture from g, the gradient of y: writes the gradient of the mixture
// to `scaled`, and adds the gradient of the factor up over the tokens that share it.
template <class T>
const T* through_factor(const MixExpertOutputsBwdParams& p, const Padded<T>& rows, int64_t t,
                        const T* w, const T* z, const T* g, T* buffer) {
  const MixKernels<T>& mix = mix_kernels<T>();
  const RowKernels<T>& k = rows.k;
  const int64_t E = p.num_experts, M = p.num_mixtures, mixed = M * rows.pitch;
  T *scaled = buffer, *f_rows = scaled + mixed, *mixture = f_rows + mixed, *sum = mixture + mixed;
  const int64_t at = t / p.repeats * M;
  k.load_row(kAccumulate<T>, g, scaled, mixed, T(1));
  mix.slope(
      {mixed, rows.load(p.factor, at, M, f_rows), nullptr, nullptr, scaled, nullptr, nullptr});
  if (p.grad_factor == nullptr) return scaled;
  mix.product({M, E, w, E, 1, z, mixture, rows.pitch});
  mix.slope({mixed, g, nullptr, nullptr, mixture, nullptr, nullptr});
  if (t % p.repeats == 0) std::fill(sum, sum + mixed, T(0));
  k.axpy(kAccumulate<T>, mixture, T(1), sum, mixed);
  if (t % p.repeats == p.repeats - 1) {
    T* to = rows.target(p.grad_factor, at, sum);
    if (to != sum) k.load_row(kAccumulate<T>, sum, to, mixed, T(1));
    rows.store(sum, p.grad_factor, at, M);
  }
  return scaled;
}

// Returns the weights [M, E] of token t as T.
template <class T, class P>
const T* load_weights(const RowKernels<T>& k, const P& p, int64_t t, T* buffer) {
  const int64_t n = p.num_mixtures * p.num_experts;
  const char* src = static_cast<const char*>(p.weights) + t * n * dtype_size(p.type);
  if (p.type == kAccumulate<T>) return reinterpret_cast<const T*>(src);
  k.load_row(p.type, src, buffer, n, T(1));
  return buffer;
}

// Mean, scale = norm_weight / sqrt(var + eps), shift = norm_bias, as padded rows.
template <class T>
struct NormRows {
  MixNormRows<T> rows;
  int64_t n;

  template <class P>
  NormRows(const P& p, const Padded<T>& layout, T* memory) : n(p.num_experts * layout.pitch) {
    if (p.norm.norm_weight == nullptr) return;
    const int64_t E = p.num_experts, O = p.size;
    T *mean = memory, *scale = memory + n, *shift = memory + 2 * n;
    std::fill(memory, memory + 3 * n, T(0));
    for (int64_t e = 0; e < E; ++e) {
      for (int64_t o = 0; o < O; ++o) {
        const int64_t to = e * layout.pitch + o, from = e * O + o;
        mean[to] = static_cast<const T*>(p.norm.mean)[from];
        scale[to] = static_cast<const T*>(p.norm.norm_weight)[from] /
                    std::sqrt(static_cast<const T*>(p.norm.var)[from] + T(p.norm.eps));
        shift[to] = static_cast<const T*>(p.norm.norm_bias)[from];
      }
    }
    rows = {mean, scale, shift};
  }
};

// Statistics of all tokens: those of blocks are joined in order (Chan et al. 1979), which loses no
// digits where a mean is large beside its deviation.
template <class T>
void batch_statistics(const MixExpertOutputsParams& p, const Padded<T>& layout,
                      const Parallel& par) {
  const MixKernels<T>& mix = mix_kernels<T>();
  const int64_t E = p.num_experts, O = p.size, n = E * layout.pitch, parts = parts_of(p);
  const int64_t blocks = ceil_div(p.num_tokens, kMixTokens);
  ScratchScope scratch;
  T* moments = scratch.take<T>(Scratch::kRows, 2 * parts * n);
  const auto join = [n](T* mean, T* squares, int64_t before, const T* mean_b, const T* squares_b,
                        int64_t count) {
    const T share = T(count) / T(before + count), both = T(before) * share;
    for (int64_t i = 0; i < n; ++i) {
      const T apart = mean_b[i] - mean[i];
      squares[i] += squares_b[i] + apart * apart * both;
      mean[i] += apart * share;
    }
  };
  const auto first_of = [&](int64_t part) {
    return std::min(blocks * part / parts * kMixTokens, p.num_tokens);
  };
  parallel_items(par, parts, cost_of(p) * static_cast<double>(p.num_tokens), [&](int64_t part) {
    T *mean = moments + 2 * part * n, *squares = mean + n;
    ScratchScope scratch;
    T* block = scratch.take<T>(Scratch::kTile, 2 * n);
    T* buffer = layout.direct ? nullptr : scratch.take<T>(Scratch::kTokens, kMixTokens * n);
    std::fill(mean, mean + 2 * n, T(0));
    const int64_t begin = first_of(part), end = first_of(part + 1);
    for (int64_t t = begin; t < end; t += kMixTokens) {
      const int64_t count = std::min(kMixTokens, end - t);
      mix.moments(count, n, layout.load(p.outputs, t * E, count * E, buffer), block, block + n);
      join(mean, squares, t - begin, block, block + n, count);
    }
  });
  for (int64_t part = 1; part < parts; ++part) {
    const T* other = moments + 2 * part * n;
    const int64_t begin = first_of(part);
    join(moments, moments + n, begin, other, other + n, first_of(part + 1) - begin);
  }
  for (int64_t e = 0; e < E; ++e) {
    for (int64_t o = 0; o < O; ++o) {
      static_cast<T*>(p.norm.mean)[e * O + o] = moments[e * layout.pitch + o];
      static_cast<T*>(p.norm.var)[e * O + o] =
          moments[n + e * layout.pitch + o] / T(std::max<int64_t>(p.num_tokens, 1));
    }
  }
}

template <class T>
void run(const MixExpertOutputsParams& p, const Parallel& par) {
  const MixKernels<T>& mix = mix_kernels<T>();
  const RowKernels<T>& k = row_kernels<T>();
  const int64_t E = p.num_experts, M = p.num_mixtures;
  const Padded<T> rows(k, p.type, p.size);
  const int64_t n = E * rows.pitch;
  if (p.norm.batch) batch_statistics<T>(p, rows, par);
  ScratchScope scratch;
  const NormRows<T> norm(p, rows, scratch.take<T>(Scratch::kRows, 3 * n));
  parallel_range(par, p.num_tokens, cost_of(p), [&](int64_t begin, int64_t end) {
    const int64_t mixed = M * rows.pitch;
    ScratchScope scratch;
    T* x_rows = scratch.take<T>(Scratch::kTile, 2 * n + 2 * mixed + M * E);
    T *z = x_rows + n, *y_rows = z + n, *f_rows = y_rows + mixed, *w_row = f_rows + mixed;
    for (int64_t t = begin; t < end; ++t) {
      const T* x = rows.load(p.outputs, t * E, E, x_rows);
      const T* w = load_weights(k, p, t, w_row);
      T* y = rows.target(p.y, t * M, y_rows);
      mix.act(p.act, norm.rows, x, n, z, nullptr);
      mix.product({M, E, w, E, 1, z, y, rows.pitch});
      if (p.factor != nullptr) {
        mix.slope({mixed, rows.load(p.factor, t / p.repeats * M, M, f_rows), nullptr, nullptr, y,
                   nullptr, nullptr});
      }
      rows.store(y, p.y, t * M, M);
    }
  });
}

template <class T>
void run_bwd(const MixExpertOutputsBwdParams& p, const Parallel& par) {
  const MixKernels<T>& mix = mix_kernels<T>();
  const RowKernels<T>& k = row_kernels<T>();
  const int64_t E = p.num_experts, O = p.size, M = p.num_mixtures;
  const Padded<T> rows(k, p.type, O), kept(k, kAccumulate<T>, O);
  const int64_t n = E * rows.pitch, mixed = M * rows.pitch, parts = parts_of(p);
  const int64_t length = round_up(kMixTokens, p.repeats);  // of a block: whole runs of one factor
  const int64_t blocks = ceil_div(p.num_tokens, length);
  const bool normed = p.norm.norm_weight != nullptr;
  // mean, scale, shift; at, by; then sums of a part: of gradients, of them times (x - mean).
  ScratchScope scratch;
  T* shared = scratch.take<T>(Scratch::kRows, 5 * n + 2 * parts * n);
  T *at = shared + 3 * n, *by = at + n, *sums = by + n;
  std::fill(at, at + 2 * n, T(0));
  const NormRows<T> norm(p, rows, shared);
  const double cost = 2 * cost_of(p) * static_cast<double>(p.num_tokens);
  parallel_items(par, parts, cost, [&](int64_t part) {
    ScratchScope scratch;
    T* x_rows = scratch.take<T>(Scratch::kTile, 6 * n + 5 * mixed + 2 * M * E);
    T *z = x_rows + n, *slope = z + n, *d_rows = slope + n, *block = d_rows + n;
    T *g_rows = block + 2 * n, *f_rows = g_rows + mixed;
    T *w_row = f_rows + 4 * mixed, *dw_row = w_row + M * E;
    T* total = sums + 2 * part * n;
    std::fill(total, total + 2 * n, T(0));
    for (int64_t b = blocks * part / parts; b < blocks * (part + 1) / parts; ++b) {
      std::fill(block, block + 2 * n, T(0));
      for (int64_t t = b * length; t < std::min((b + 1) * length, p.num_tokens); ++t) {
        const T* x = rows.load(p.outputs, t * E, E, x_rows);
        const T* g = rows.load(p.grad_y, t * M, M, g_rows);
        const T* w = load_weights(k, p, t, w_row);
        mix.act(p.act, norm.rows, x, n, z, slope);
        if (p.factor != nullptr) g = through_factor(p, rows, t, w, z, g, f_rows);
        if (p.grad_weights != nullptr) {
          T* dw = p.type == kAccumulate<T> ? static_cast<T*>(p.grad_weights) + t * M * E : dw_row;
          mix.weight_grads(M, E, g, z, dw, rows.pitch);
          if (dw == dw_row) {
            k.store_row(p.type, dw,
                        static_cast<char*>(p.grad_weights) + t * M * E * dtype_size(p.type), M * E);
          }
        }
        if (p.norm.batch) {
          T* d = kept.target(p.grad_normed, t * E, d_rows);
          mix.product({E, M, w, 1, E, g, d, rows.pitch});
          mix.slope({n, slope, norm.rows.mean, x, d, block, block + n});
          kept.store(d, p.grad_normed, t * E, E);
          continue;
        }
        T* d = rows.target(p.grad_outputs, t * E, d_rows);
        mix.product({E, M, w, 1, E, g, d, rows.pitch});
        mix.slope({n, slope, norm.rows.mean, x, d, normed ? block : nullptr, block + n});
        if (normed) mix.norm_grad({n, norm.rows, nullptr, nullptr, x, d, d});
        rows.store(d, p.grad_outputs, t * E, E);
      }
      if (normed) k.axpy(kAccumulate<T>, block, T(1), total, 2 * n);
    }
  });
  if (!normed) return;
  for (int64_t part = 1; part < parts; ++part) {
    k.axpy(kAccumulate<T>, sums + 2 * part * n, T(1), sums, 2 * n);
  }
  const T count = T(std::max<int64_t>(p.num_tokens, 1));
  for (int64_t e = 0; e < E; ++e) {
    for (int64_t i = e * rows.pitch, o = e * O; o < (e + 1) * O; ++i, ++o) {
      const T var = static_cast<const T*>(p.norm.var)[o] + T(p.norm.eps);
      if (p.grad_norm_bias != nullptr) static_cast<T*>(p.grad_norm_bias)[o] = sums[i];
      if (p.grad_norm_weight != nullptr) {
        static_cast<T*>(p.grad_norm_weight)[o] = sums[n + i] / std::sqrt(var);
      }
      at[i] = sums[i] / count;
      by[i] = sums[n + i] / (count * var);
    }
  }
  if (!p.norm.batch) return;
  parallel_range(par, p.num_tokens, static_cast<double>(n) / 4, [&](int64_t begin, int64_t end) {
    ScratchScope scratch;
    T* x_rows = scratch.take<T>(Scratch::kTile, 3 * n);
    T *d_rows = x_rows + n, *out_rows = d_rows + n;
    for (int64_t t = begin; t < end; ++t) {
      const T* x = rows.load(p.outputs, t * E, E, x_rows);
      const T* d = kept.load(p.grad_normed, t * E, E, d_rows);
      T* out = rows.target(p.grad_outputs, t * E, out_rows);
      mix.norm_grad({n, norm.rows, at, by, x, d, out});
      rows.store(out, p.grad_outputs, t * E, E);
    }
  });
}

}  // namespace

void mix_expert_outputs(const MixExpertOutputsParams& p, const Parallel& par) {
  p.type == DType::kFloat64 ? run<double>(p, par) : run<float>(p, par);
}

void mix_expert_outputs_bwd(const MixExpertOutputsBwdParams& p, const Parallel& par) {
  p.type == DType::kFloat64 ? run_bwd<double>(p, par) : run_bwd<float>(p, par);
}

}  // namespace moe_ops::cpu
