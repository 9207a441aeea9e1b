// The block is made of the products, norms and rotations of other ops. Scores of a key head are the
// product of its queries with its keys, and what comes out of softmax multiplies its values: two
// grouped products in which a key head of a sequence is an expert.
#include "moe_ops/attention_step.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/gemm/dense_layer.h"
#include "cpu/gemm/desc.h"
#include "cpu/kernels/router.h"
#include "cpu/kernels/rows.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/team.h"
#include "cpu/runtime/workspace.h"
#include "moe_ops/add_rms_norm.h"

namespace moe_ops::cpu {

namespace {

template <class T>
class Step {
 public:
  Step(const AttentionStepParams& p, const Parallel& par)
      : p_(p),
        par_(par),
        tokens_(p.batch * p.num_tokens),
        group_(p.heads / p.kv_heads),
        keys_(p.start + p.num_tokens),
        // A row of scores has room for the sink, and the width that exp_sum wants.
        ld_(round_up(keys_ + 1, kRowUnit)) {}

  void run() {
    const int64_t H = p_.hidden_size, d = p_.head_size;
    const int64_t q_width = p_.heads * d, kv_width = p_.kv_heads * d;
    const int64_t size = dtype_size(p_.type);
    const int64_t rows = tokens_ * p_.heads;
    ScratchScope scratch(ScratchScope::Keep::kUpTo256MiB);
    const int64_t wide = tokens_ * (2 * q_width + 2 * kv_width + H) + rows * (ld_ + 1) +
                         std::max(q_width, kv_width) * 2 + kRowUnit * 16;
    Arena arena(scratch, Scratch::kHidden,
                tokens_ * (H + q_width) * size + wide * static_cast<int64_t>(sizeof(T)) +
                    (rows + p_.batch * p_.kv_heads + 1) * 4 + 64 * 16);
    char* const normed = arena.template take<char>(tokens_ * H * size);
    mixed_ = arena.template take<char>(tokens_ * q_width * size);
    q_ = arena.template take<T>(tokens_ * q_width);
    T* const k = arena.template take<T>(tokens_ * kv_width);
    T* const v = arena.template take<T>(tokens_ * kv_width);
    T* const y = arena.template take<T>(tokens_ * std::max(H, int64_t{1}));
    scores_ = arena.template take<T>(rows * ld_);
    factors_ = arena.template take<T>(rows);
    buffer_ = arena.template take<T>(2 * std::max(q_width, kv_width));
    index_ = arena.template take<int32_t>(rows);
    offsets_ = arena.template take<int32_t>(p_.batch * p_.kv_heads + 1);

    Rows x{p_.x, p_.type, H, nullptr};
    if (p_.norm_weight != nullptr) {
      add_rms_norm({p_.x, nullptr, p_.norm_weight, nullptr, p_.type, tokens_, H, p_.eps, normed,
                    nullptr, scores_},
                   par_);
      x.data = normed;
    }
    multiply({{p_.query, q_}, {p_.key, k}, {p_.value, v}}, x, tokens_, kAccumulate<T>, par_);
    norm(p_.query_norm, q_, p_.heads);
    norm(p_.key_norm, k, p_.kv_heads);
    rotate(q_, p_.heads);
    rotate(k, p_.kv_heads);
    const T scale = static_cast<T>(p_.scale);
    for (int64_t i = 0; i < tokens_ * q_width; ++i) q_[i] *= scale;
    keep(p_.keys, k);
    keep(p_.values, v);
    attend();
    multiply(p_.out, {mixed_, p_.type, q_width, nullptr}, tokens_, y, kAccumulate<T>, par_);
    const T factor = static_cast<T>(p_.residual_scale);
    for (int64_t t = 0; t < tokens_; ++t) {
      T* const row = y + t * H;
      if (factor != T(1)) {
        for (int64_t i = 0; i < H; ++i) row[i] *= factor;
      }
      rows_.axpy(p_.type, element(p_.x, p_.type, t * H), T(1), row, H);
      rows_.store_row(p_.type, row, static_cast<char*>(p_.y) + t * H * size, H);
    }
  }

 private:
  // Heads of all tokens over their root mean squares, in place.
  void norm(const void* weight, T* heads, int64_t num_heads) {
    if (weight == nullptr) return;
    const int64_t cols = p_.norms_heads ? p_.head_size : num_heads * p_.head_size;
    NormRows<T> r = {};
    r.type = kAccumulate<T>;
    r.rows = p_.norms_heads ? tokens_ * num_heads : tokens_;
    r.cols = cols;
    r.eps = static_cast<T>(p_.head_eps);
    rows_.load_row(p_.type, weight, buffer_, cols, T(1));
    r.weight = buffer_;
    r.wide = buffer_ + cols;
    r.x = r.y = heads;
    r.rstd = factors_;
    rows_.norm_rows(r);
  }

  void rotate(T* heads, int64_t num_heads) {
    const int64_t d = p_.head_size, half = p_.half;
    if (half == 0) return;
    const bool whole = 2 * half == d;
    T *const cos = buffer_, *const sin = buffer_ + half;
    for (int64_t t = 0; t < tokens_; ++t) {
      const int64_t angle =
          t / p_.num_tokens * p_.angle_stride_batch + t % p_.num_tokens * p_.angle_stride_token;
      rows_.load_row(p_.angle_type, element(p_.cos, p_.angle_type, angle), cos, half, T(1));
      rows_.load_row(p_.angle_type, element(p_.sin, p_.angle_type, angle), sin, half, T(1));
      T* const row = heads + t * num_heads * d;
      for (int64_t h = 0; h < (whole ? 1 : num_heads); ++h) {
        T* const first = row + h * d;
        rows_.rotate_rows({1, first, d, cos, sin, T(1), whole ? num_heads : 1, half, first, d});
      }
    }
  }

  void keep(const KeptHeads<void>& kept, const T* heads) {
    const int64_t d = p_.head_size;
    for (int64_t t = 0; t < tokens_; ++t) {
      const int64_t b = t / p_.num_tokens, s = p_.start + t % p_.num_tokens;
      for (int64_t h = 0; h < p_.kv_heads; ++h) {
        const int64_t to = b * kept.stride_batch + h * kept.stride_head + s * kept.stride_token;
        rows_.store_row(p_.type, heads + (t * p_.kv_heads + h) * d,
                        static_cast<char*>(kept.data) + to * dtype_size(p_.type), d);
      }
    }
  }

  // Queries of q_ over what is kept, to mixed_. Sequences go together where key heads of all of
  // them are one distance apart.
  void attend() {
    const auto even = [&](const KeptHeads<void>& kept) {
      return kept.stride_batch == p_.kv_heads * kept.stride_head;
    };
    const int64_t step = p_.batch == 1 || (even(p_.keys) && even(p_.values)) ? p_.batch : 1;
    for (int64_t b = 0; b < p_.batch; b += step) attend(b, step);
  }

  void attend(int64_t first, int64_t count) {
    const int64_t d = p_.head_size, S = p_.num_tokens, experts = count * p_.kv_heads;
    const int64_t rows = experts * S * group_;
    // Row (b, key head, token, query of the group).
    for (int64_t r = 0, e = 0; e < experts; ++e) {
      const int64_t b = e / p_.kv_heads, h = e % p_.kv_heads;
      offsets_[e] = static_cast<int32_t>(r);
      for (int64_t s = 0; s < S; ++s) {
        for (int64_t g = 0; g < group_; ++g) {
          index_[r++] = static_cast<int32_t>((b * S + s) * p_.heads + h * group_ + g);
        }
      }
    }
    offsets_[experts] = static_cast<int32_t>(rows);
    const int64_t from = first * S * p_.heads * d;
    GroupedGemmParams g;
    g.expert_offsets = offsets_;
    g.num_experts = experts;
    g.out_features = keys_;
    g.in_features = d;
    g.a = {q_ + from, kAccumulate<T>, d, index_};
    g.b = {element(p_.keys.data, p_.type, first * p_.keys.stride_batch), p_.type,
           p_.keys.stride_head, p_.keys.stride_token, 1};
    g.out = {scores_, kAccumulate<T>, ld_, nullptr};
    grouped_gemm(g, par_);
    const double cost = static_cast<double>(keys_) + 20;
    parallel_range(par_, rows, cost, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) softmax(r, first * S * p_.heads + index_[r]);
    });
    g.out_features = d;
    g.in_features = keys_;
    g.a = {scores_, kAccumulate<T>, ld_, nullptr};
    g.a_scale = factors_;
    g.b = {element(p_.values.data, p_.type, first * p_.values.stride_batch), p_.type,
           p_.values.stride_head, 1, p_.values.stride_token};
    g.out = {mixed_ + from * dtype_size(p_.type), p_.type, d, index_};
    grouped_gemm(g, par_);
  }

  // Row r of scores, of `query` = (b, token, head), becomes weights times an unknown that
  // factors_[r] takes away. A query that sees nothing has weights 0.
  void softmax(int64_t r, int64_t query) {
    constexpr T kHidden = -std::numeric_limits<T>::infinity();
    const int64_t S = p_.num_tokens, head = query % p_.heads;
    const int64_t s = query / p_.heads % S, b = query / p_.heads / S;
    T* const row = scores_ + r * ld_;
    int64_t last = keys_;
    if (p_.mask.data == nullptr) {
      last = p_.start + s + 1;
    } else {
      const int64_t from = b * p_.mask.stride_batch + s * p_.mask.stride_token;
      if (p_.mask.is_bool) {
        const auto* sees = static_cast<const uint8_t*>(p_.mask.data) + from;
        for (int64_t j = 0; j < keys_; ++j) row[j] = sees[j] != 0 ? row[j] : kHidden;
      } else {
        rows_.axpy(p_.mask.type, element(p_.mask.data, p_.mask.type, from), T(1), row, keys_);
      }
    }
    std::fill(row + last, row + ld_, kHidden);
    if (p_.sinks != nullptr) {
      rows_.load_row(p_.type, element(p_.sinks, p_.type, head), row + keys_, 1, T(1));
    }
    T sum;
    if (std::all_of(row, row + ld_, [](T x) { return x == kHidden; })) {
      std::fill(row, row + ld_, T(0));
      sum = T(1);
    } else {
      router_kernels<T>().exp_sum(row, row, 1, ld_, ld_, &sum);
    }
    factors_[r] = T(1) / sum;
  }

  const AttentionStepParams& p_;
  const Parallel& par_;
  const RowKernels<T>& rows_ = row_kernels<T>();
  const int64_t tokens_, group_, keys_, ld_;
  char* mixed_;  // [tokens, heads, d] of the type of x
  T *q_, *scores_, *factors_, *buffer_;
  int32_t *index_, *offsets_;
};

}  // namespace

void attention_step(const AttentionStepParams& p, const Parallel& par) {
  if (p.batch * p.num_tokens == 0) return;
  // Of the products alone, in the units of GemmProblem.
  const double heads = static_cast<double>(p.heads + p.kv_heads) * p.head_size;
  const double keys = static_cast<double>(p.heads) * p.head_size * (p.start + p.num_tokens);
  const double cost = p.batch * p.num_tokens * (heads * p.hidden_size + keys) / 8;
  Team::run(par, cost, [&](const Parallel& team) {
    p.type == DType::kFloat64 ? Step<double>(p, team).run() : Step<float>(p, team).run();
  });
}

}  // namespace moe_ops::cpu
