// What a block of attention on a few new tokens does around its products of queries with keys.
#pragma once

#include <algorithm>
#include <limits>

#include "cpu/gemm/dense_layer.h"
#include "cpu/gemm/desc.h"
#include "cpu/kernels/router.h"
#include "cpu/kernels/rows.h"
#include "moe_ops/add_rms_norm.h"
#include "moe_ops/attention_block.h"

namespace moe_ops::cpu {

// Tokens are rows, sequence by sequence; what is not of the type of x is of T.
template <class T>
class AttentionParts {
 protected:
  AttentionParts(const AttentionBlock& p, const Parallel& par)
      : block_(p),
        par_(par),
        tokens_(p.batch * p.num_tokens),
        keys_(p.start + p.num_tokens),
        // A row of scores has room for the sink, and the width that exp_sum wants.
        ld_(round_up(keys_ + 1, kRowUnit)) {}

  // The rows that the first products read: x, or norm(x), which `room` holds. `scratch` is
  // [tokens].
  Rows input(char* room, T* scratch) {
    const AttentionBlock& p = block_;
    Rows x{p.x, p.type, p.hidden_size, nullptr};
    if (p.norm_weight == nullptr) return x;
    add_rms_norm({p.x, nullptr, p.norm_weight, nullptr, p.type, tokens_, p.hidden_size, p.eps, room,
                  nullptr, scratch},
                 par_);
    x.data = room;
    return x;
  }

  // `count` rows of `cols` elements, ld apart, over their root mean squares, in place. `buffer` is
  // [2 cols], `rstd` [count].
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
    const AttentionBlock& p = block_;
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
    const AttentionBlock& p = block_;
    for (int64_t t = 0; t < tokens_; ++t) {
      const int64_t b = t / p.num_tokens, s = p.start + t % p.num_tokens;
      for (int64_t h = 0; h < num_heads; ++h) {
        const int64_t to = b * kept.stride_batch + h * kept.stride_head + s * kept.stride_token;
        rows_.store_row(p.type, heads + t * ld_token + h * d,
                        static_cast<char*>(kept.data) + to * dtype_size(p.type), d);
      }
    }
  }

  // A row of scores, of `query` = (b, token, head), becomes weights times an unknown that the
  // result takes away. A query that sees nothing has weights 0.
  T softmax(T* row, int64_t query) {
    constexpr T kHidden = -std::numeric_limits<T>::infinity();
    const AttentionBlock& p = block_;
    const int64_t S = p.num_tokens, head = query % p.heads;
    const int64_t s = query / p.heads % S, b = query / p.heads / S;
    int64_t last = keys_;
    if (p.mask.data == nullptr) {
      last = p.start + s + 1;
    } else {
      const int64_t from = b * p.mask.stride_batch + s * p.mask.stride_token;
      if (p.mask.is_bool) {
        const auto* sees = static_cast<const uint8_t*>(p.mask.data) + from;
        for (int64_t j = 0; j < keys_; ++j) row[j] = sees[j] != 0 ? row[j] : kHidden;
      } else {
        rows_.axpy(p.mask.type, element(p.mask.data, p.mask.type, from), T(1), row, keys_);
      }
    }
    std::fill(row + last, row + ld_, kHidden);
    if (p.sinks != nullptr) {
      rows_.load_row(p.type, element(p.sinks, p.type, head), row + keys_, 1, T(1));
    }
    if (std::all_of(row, row + ld_, [](T x) { return x == kHidden; })) {
      std::fill(row, row + ld_, T(0));
      return T(1);
    }
    T sum;
    router_kernels<T>().exp_sum(row, row, 1, ld_, ld_, &sum);
    return T(1) / sum;
  }

  // y = x + residual_scale * the last product, of `mixed` [tokens, width] of the type of x. `wide`
  // is [tokens, H].
  void finish(const char* mixed, int64_t width, T* wide) {
    const AttentionBlock& p = block_;
    const int64_t H = p.hidden_size;
    multiply(p.out, {mixed, p.type, width, nullptr}, tokens_, wide, kAccumulate<T>, par_);
    for (int64_t t = 0; t < tokens_; ++t) {
      add_to_residual(wide + t * H, static_cast<T>(p.residual_scale), element(p.x, p.type, t * H),
                      p.type, static_cast<char*>(p.y) + t * H * dtype_size(p.type), H);
    }
  }

  const AttentionBlock& block_;
  const Parallel& par_;
  const RowKernels<T>& rows_ = row_kernels<T>();
  const int64_t tokens_, keys_, ld_;  // ld_: of rows of scores
};

}  // namespace moe_ops::cpu
