// Stages of an attention block on a few new tokens, around its products of queries with keys.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/gemm/dense_layer.h"
#include "cpu/gemm/desc.h"
#include "cpu/kernels/attention.h"
#include "cpu/kernels/router.h"
#include "cpu/kernels/rows.h"
#include "moe_ops/add_rms_norm.h"
#include "moe_ops/attention_block.h"

namespace moe_ops::cpu {

// Tokens are rows, sequence by sequence; what is not of the type of x is of T.
template <class T>
class AttentionParts {
 protected:
  using Block = moe_ops::AttentionBlock;  // and not the one of kernels

  AttentionParts(const Block& p, const Parallel& par)
      : block_(p),
        par_(par),
        tokens_(p.batch * p.num_tokens),
        keys_(p.start + p.num_tokens),
        sink_(p.sinks != nullptr ? 1 : 0),
        // A row of scores has room for the sink before its keys, and for what exp_sum reads after
        // the last of them.
        ld_(round_up(sink_ + keys_ + kRowUnit - 1, kRowUnit)) {
    if (p.mask.data == nullptr) return;
    spans_.reserve(static_cast<size_t>(tokens_));
    for (int64_t t = 0; t < tokens_; ++t) spans_.push_back(span_of_mask(t));
  }

  // Returns the rows that the first GEMMs read: x, or norm(x), which is written to `room`.
  // `scratch` is [tokens].
  Rows input(char* room, T* scratch) {
    const Block& p = block_;
    Rows x{p.x, p.type, p.hidden_size, nullptr};
    if (p.norm_weight == nullptr) return x;
    add_rms_norm({p.x, nullptr, p.norm_weight, nullptr, p.type, tokens_, p.hidden_size, p.eps, room,
                  nullptr, scratch},
                 par_);
    x.data = room;
    return x;
  }

  // Normalizes `count` rows of `cols` elements, ld apart, by their root mean squares, in place.
  // `buffer` is [2 cols], `rstd` [count].
  void norm(const void* weight, double eps, T* rows, int64_t count, int64_t cols, int64_t ld,
            T* buffer, T* rstd) {
    NormRows<T> r = {};
    r.type = kAccumulate<T>;
    r.rows = ld == cols ? count : 1;
    r.cols = cols;
    r.eps = static_cast<T>(eps);
    rows_.load_row(block_.type, weight, buffer, cols, T(1));
    r.weight = buffer;
    r.wide = buffer + cols;
    r.rstd = rstd;
    for (int64_t i = 0; i < count; i += r.rows) {
      r.x = r.y = rows + i * ld;
      rows_.norm_rows(r);
    }
  }

  // Which features of a head form a pair: i and i + half, or 2 i and 2 i + 1.
  struct Pairs {
    bool interleaved = false, interleaved_after = false;
  };

  // Rotates the first 2 * half features of heads ld_head apart, of tokens ld_token apart. `buffer`
  // is [4 half].
  void rotate(T* heads, int64_t num_heads, int64_t ld_head, int64_t ld_token, Pairs pairs,
              T* buffer) {
    const Block& p = block_;
    const int64_t half = p.half;
    if (half == 0) return;
    const bool whole = 2 * half == ld_head && !pairs.interleaved && !pairs.interleaved_after;
    T *const cos = buffer, *const sin = cos + half, *const pair = sin + half;
    for (int64_t t = 0; t < tokens_; ++t) {
      const int64_t angle =
          t / p.num_tokens * p.angle_stride_batch + t % p.num_tokens * p.angle_stride_token;
      rows_.load_row(p.angle_type, element(p.cos, p.angle_type, angle), cos, half, T(1));
      rows_.load_row(p.angle_type, element(p.sin, p.angle_type, angle), sin, half, T(1));
      for (int64_t h = 0; h < (whole ? 1 : num_heads); ++h) {
        T* const first = heads + t * ld_token + h * ld_head;
        if (pairs.interleaved) {
          std::copy(first, first + 2 * half, pair);
          for (int64_t i = 0; i < half; ++i) {
            first[i] = pair[2 * i];
            first[half + i] = pair[2 * i + 1];
          }
        }
        rows_.rotate_rows(
            {1, first, ld_head, cos, sin, T(1), whole ? num_heads : 1, half, first, ld_head});
        if (pairs.interleaved_after) {
          std::copy(first, first + 2 * half, pair);
          for (int64_t i = 0; i < half; ++i) {
            first[2 * i] = pair[i];
            first[2 * i + 1] = pair[half + i];
          }
        }
      }
    }
  }

  // Writes heads of d features side by side, of tokens ld_token apart, to where they are kept.
  void keep(const KeptHeads<void>& kept, const T* heads, int64_t num_heads, int64_t d,
            int64_t ld_token) {
    const Block& p = block_;
    for (int64_t t = 0; t < tokens_; ++t) {
      const int64_t b = t / p.num_tokens, s = p.start + t % p.num_tokens;
      for (int64_t h = 0; h < num_heads; ++h) {
        const int64_t to = b * kept.stride_batch + h * kept.stride_head + s * kept.stride_token;
        rows_.store_row(p.type, heads + t * ld_token + h * d,
                        static_cast<char*>(kept.data) + to * dtype_size(p.type), d);
      }
    }
  }

  // Replaces a row of scores, of `query` = (b, token, head), by unnormalized weights; returns the
  // factor that normalizes them. A query that sees nothing has weights 0. The sink lies before the
  // first key that the query sees, and sums start there: they do not depend on keys before or after
  // those. hide: what a float mask hides by -inf stays hidden where a score is not finite.
  T softmax(T* row, int64_t query, bool hide) {
    const Block& p = block_;
    const int64_t head = query % p.heads, t = query / p.heads;
    Span seen{0, p.start + t % p.num_tokens + 1};
    if (p.mask.data != nullptr) {
      seen = spans_[static_cast<size_t>(t)];
      const void* mask = mask_of(t);
      if (p.mask.is_bool) {
        const auto* sees = static_cast<const uint8_t*>(mask);
        for (int64_t j = seen.first; j < seen.last; ++j) row[j] = sees[j] != 0 ? row[j] : kHidden;
      } else {
        rows_.axpy(p.mask.type, mask, T(1), row, keys_);
        if (hide) hide_by_mask(mask, row);
      }
    }
    T sink = kHidden;
    if (sink_ != 0) rows_.load_row(p.type, element(p.sinks, p.type, head), &sink, 1, T(1));
    const bool adds = p.mask.data != nullptr && !p.mask.is_bool;
    if (adds && !outside_vanishes(row, seen, sink)) seen = {0, keys_};
    T* const first = row + seen.first - sink_;
    const int64_t count = seen.last - seen.first + sink_, padded = round_up(count, kRowUnit);
    if (sink_ != 0) *first = sink;
    T factor = T(1);
    if (std::all_of(first, first + count, [](T x) { return x == kHidden; })) {
      std::fill(first, first + count, T(0));
    } else {
      std::fill(first + count, first + padded, kHidden);
      T sum;
      router_kernels<T>().exp_sum(first, first, 1, ld_, padded, &sum);
      factor = T(1) / sum;
    }
    std::fill(row, row + seen.first, T(0));
    std::fill(row + seen.last, row + keys_, T(0));
    return factor;
  }

  // True if a query of token t may see key j.
  bool may_see(int64_t t, int64_t j) const {
    const Block& p = block_;
    if (p.mask.data == nullptr) return j <= p.start + t % p.num_tokens;
    if (p.mask.is_bool) return static_cast<const uint8_t*>(mask_of(t))[j] != 0;
    T x;
    rows_.load_row(p.mask.type, element(mask_of(t), p.mask.type, j), &x, 1, T(1));
    return x != kHidden;
  }

  // Returns whether n elements of `type` are all finite.
  bool all_finite(DType type, const void* data, int64_t n) const {
    constexpr int64_t kPart = 256;
    if (type == kAccumulate<T>) {
      return attention_kernels<T>().all_finite(static_cast<const T*>(data), n);
    }
    T part[kPart];
    for (int64_t i = 0; i < n; i += kPart) {
      const int64_t count = std::min(kPart, n - i);
      rows_.load_row(type, element(data, type, i), part, count, T(1));
      if (!attention_kernels<T>().all_finite(part, count)) return false;
    }
    return true;
  }

  // Repeats GEMM `g` of weights with the cache of expert e, a head of sequence b whose queries are
  // p.num_tokens times `group` rows, for the tokens whose result is not finite. A weight of zero
  // times a value that is not finite is no zero, so that each of these tokens gets a copy in which
  // what it may not see is zero. Products have the rows, hence the bits, that they have without.
  void multiply_apart(const GroupedGemmParams& g, int64_t e, int64_t b, int64_t group) {
    const int64_t S = block_.num_tokens, width = g.out_features, rows = S * group;
    const int64_t first = g.expert_offsets[e], size = dtype_size(block_.type);
    const int64_t row_bytes = width * dtype_size(g.out.type);
    const auto out_row = [&](int64_t r) {
      const int64_t row = g.out.index != nullptr ? g.out.index[first + r] : first + r;
      return static_cast<char*>(g.out.data) + row * g.out.stride * dtype_size(g.out.type);
    };
    const auto finite = [&](int64_t s) {
      for (int64_t r = s * group; r < (s + 1) * group; ++r) {
        if (!all_finite(g.out.type, out_row(r), width)) return false;
      }
      return true;
    };
    // Strides choose the kernel, too.
    const int64_t ld = g.b.stride_k == 1 ? 1 : std::max(width, int64_t{2});
    const int32_t offsets[] = {0, static_cast<int32_t>(rows)};
    std::vector<char> copy, out;
    for (int64_t s = 0; s < S; ++s) {
      if (finite(s)) continue;
      copy.assign(static_cast<size_t>(keys_ * ld * size), 0);
      out.resize(static_cast<size_t>(rows * row_bytes));
      for (int64_t j = 0; j < keys_; ++j) {
        if (may_see(b * S + s, j)) {
          std::memcpy(copy.data() + j * ld * size, weights_at(g.b, e, 0, j),
                      static_cast<size_t>(width * size));
        }
      }
      GroupedGemmParams one = g;
      one.expert_offsets = offsets;
      one.num_experts = 1;
      one.a.data = element(g.a.data, g.a.type, first * g.a.stride);
      one.a_scale = static_cast<const T*>(g.a_scale) + first;
      one.b = {copy.data(), g.b.type, 0, 1, ld};
      one.out = {.data = out.data(), .type = g.out.type, .stride = width};
      grouped_gemm(one, par_);
      for (int64_t r = s * group; r < (s + 1) * group; ++r) {
        std::memcpy(out_row(r), out.data() + r * row_bytes, static_cast<size_t>(row_bytes));
      }
    }
  }

  // Computes y = x + residual_scale * the output projection of `mixed` [tokens, width], which has
  // the type of x. `wide` is [tokens, H].
  void finish(const char* mixed, int64_t width, T* wide) {
    const Block& p = block_;
    const int64_t H = p.hidden_size;
    multiply(p.out, {mixed, p.type, width, nullptr}, tokens_, wide, kAccumulate<T>, par_);
    for (int64_t t = 0; t < tokens_; ++t) {
      add_to_residual(wide + t * H, static_cast<T>(p.residual_scale), element(p.x, p.type, t * H),
                      p.type, static_cast<char*>(p.y) + t * H * dtype_size(p.type), H);
    }
  }

  const Block& block_;
  const Parallel& par_;
  const RowKernels<T>& rows_ = row_kernels<T>();
  const int64_t tokens_, keys_, sink_, ld_;  // ld_: of rows of scores, whose keys start at sink_

 private:
  static constexpr T kHidden = -std::numeric_limits<T>::infinity();

  // Keys from `first` to `last` - 1.
  struct Span {
    int64_t first, last;
  };

  const void* mask_of(int64_t t) const {
    const AttentionMask& m = block_.mask;
    const int64_t S = block_.num_tokens;
    const int64_t at = t / S * m.stride_batch + t % S * m.stride_token;
    return m.is_bool ? static_cast<const char*>(m.data) + at : element(m.data, m.type, at);
  }

  // Returns the range from the first to the last key that the mask does not hide from token t. A
  // float mask hides by the lowest number of float16, or anything below.
  Span span_of_mask(int64_t t) const {
    constexpr T kLowest = T(-65504);
    const AttentionMask& m = block_.mask;
    const void* mask = mask_of(t);
    const auto hides = [&](int64_t j) {
      if (m.is_bool) return static_cast<const uint8_t*>(mask)[j] == 0;
      T x;
      rows_.load_row(m.type, element(mask, m.type, j), &x, 1, T(1));
      return x <= kLowest;
    };
    Span seen{0, keys_};
    while (seen.first < seen.last && hides(seen.first)) ++seen.first;
    while (seen.last > seen.first && hides(seen.last - 1)) --seen.last;
    return seen;
  }

  void hide_by_mask(const void* mask, T* row) const {
    const DType type = block_.mask.type;
    for (int64_t j = 0; j < keys_; ++j) {
      T x;
      rows_.load_row(type, element(mask, type, j), &x, 1, T(1));
      if (x == kHidden) row[j] = kHidden;
    }
  }

  // True if scores outside of `seen` get weights of exactly zero, as they do beside scores that
  // the mask leaves alone.
  bool outside_vanishes(const T* row, Span seen, T sink) const {
    constexpr T kNoWeight = sizeof(T) == 8 ? T(-746) : T(-105);  // e^x rounds to zero below it
    if (seen.first == 0 && seen.last == keys_) return true;
    constexpr int64_t kLanes = 16;  // Loops of so many are made of vectors by the compiler.
    T lanes[kLanes];
    std::fill(lanes, lanes + kLanes, sink);
    int64_t j = seen.first;
    for (; j + kLanes <= seen.last; j += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) lanes[i] = row[j + i] > lanes[i] ? row[j + i] : lanes[i];
    }
    for (; j < seen.last; ++j) lanes[0] = row[j] > lanes[0] ? row[j] : lanes[0];
    const T most = *std::max_element(lanes, lanes + kLanes);
    const auto vanish = [&](int64_t begin, int64_t end) {
      int64_t others = 0;
      for (int64_t i = begin; i < end; ++i) others += row[i] - most < kNoWeight ? 0 : 1;
      return others == 0;
    };
    return vanish(0, seen.first) && vanish(seen.last, keys_);
  }

  std::vector<Span> spans_;  // of tokens, where there is a mask
};

}  // namespace moe_ops::cpu
