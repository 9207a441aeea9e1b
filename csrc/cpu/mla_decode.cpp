// Attention in the space of the latents: a query is multiplied by what makes keys of its head, so
// that latents themselves are the keys and the values, of one head for all queries; what comes out
// is multiplied by what makes values. Keys and values of all heads are many times as large as
// latents, and for few queries it takes far more multiplications to make them.
#include "moe_ops/mla_decode.h"

#include <algorithm>

#include "cpu/attention_block.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/team.h"
#include "cpu/runtime/workspace.h"

namespace moe_ops::cpu {

namespace {

template <class T>
class Step : AttentionParts<T> {
  using Parts = AttentionParts<T>;
  using Parts::keys_;
  using Parts::ld_;
  using Parts::par_;
  using Parts::rows_;
  using Parts::tokens_;

 public:
  Step(const MlaDecodeParams& p, const Parallel& par) : Parts(p, par), p_(p) {}

  void run() {
    const int64_t H = p_.hidden_size, n = p_.heads, r = p_.rank, rope = 2 * p_.half;
    const int64_t q_size = p_.nope_size + rope, kv_width = r + rope;
    const int64_t rows = tokens_ * n, size = dtype_size(p_.type);
    const int64_t buffer = 2 * std::max({r, p_.query_rank, rope});
    ScratchScope scratch(ScratchScope::Keep::kUpTo256MiB);
    const int64_t wide = tokens_ * (p_.query_rank + kv_width + std::max(H, int64_t{1})) +
                         rows * (q_size + 2 * r + 2 * ld_ + 1) + buffer;
    Arena arena(scratch, Scratch::kHidden,
                (tokens_ * H + rows * p_.value_size) * size +
                    wide * static_cast<int64_t>(sizeof(T)) + (rows + n + p_.batch + 2) * 4 +
                    64 * 16);
    char* const normed = arena.template take<char>(tokens_ * H * size);
    mixed_ = arena.template take<char>(rows * p_.value_size * size);
    T* const down = arena.template take<T>(tokens_ * p_.query_rank);
    T* const kv = arena.template take<T>(tokens_ * kv_width);
    T* const y = arena.template take<T>(tokens_ * std::max(H, int64_t{1}));
    q_ = arena.template take<T>(rows * q_size);
    latent_q_ = arena.template take<T>(rows * r);
    latent_mixed_ = arena.template take<T>(rows * r);
    scores_ = arena.template take<T>(rows * ld_);
    rope_scores_ = arena.template take<T>(rows * ld_);
    factors_ = arena.template take<T>(rows);
    T* const space = arena.template take<T>(buffer);
    index_ = arena.template take<int32_t>(rows);
    offsets_ = arena.template take<int32_t>(n + p_.batch + 2);

    const Rows x = this->input(normed, scores_);
    const bool low_rank = p_.query_rank > 0;
    multiply({{low_rank ? p_.query_down : p_.query, low_rank ? down : q_}, {p_.latent, kv}}, x,
             tokens_, kAccumulate<T>, par_);
    if (low_rank) {
      if (p_.query_norm != nullptr) {
        this->norm(p_.query_norm, p_.latent_eps, down, tokens_, p_.query_rank, p_.query_rank, space,
                   factors_);
      }
      multiply(p_.query, {down, kAccumulate<T>, p_.query_rank, nullptr}, tokens_, q_,
               kAccumulate<T>, par_);
    }
    this->norm(p_.latent_norm, p_.latent_eps, kv, tokens_, r, kv_width, space, factors_);
    const typename Parts::Pairs pairs{p_.interleaved, p_.interleaved_keys};
    this->rotate(q_ + p_.nope_size, n, q_size, n * q_size, pairs, space);
    this->rotate(kv + r, 1, rope, kv_width, pairs, space);
    const T scale = static_cast<T>(p_.scale);
    for (int64_t i = 0; i < rows * q_size; ++i) q_[i] *= scale;
    this->keep(p_.latents, kv, 1, r, kv_width);
    this->keep(p_.rope_keys, kv + r, 1, rope, kv_width);
    attend(q_size);
    this->finish(mixed_, n * p_.value_size, y);
  }

 private:
  // Computes attention of the queries q_ over the caches, into mixed_.
  void attend(int64_t q_size) {
    const int64_t n = p_.heads, r = p_.rank, rows = tokens_ * n;
    GroupedGemmParams of_heads;  // Expert h has head h of every token.
    for (int64_t h = 0; h < n; ++h) {
      offsets_[h] = static_cast<int32_t>(h * tokens_);
      for (int64_t t = 0; t < tokens_; ++t) {
        index_[h * tokens_ + t] = static_cast<int32_t>(t * n + h);
      }
    }
    offsets_[n] = static_cast<int32_t>(rows);
    of_heads.expert_offsets = offsets_;
    of_heads.num_experts = n;
    ExpertMatrices to_keys = p_.heads_of_latent, to_values = to_keys;
    to_keys.stride_e = to_values.stride_e = (p_.nope_size + p_.value_size) * to_keys.stride_o;
    to_values.data = weights_at(to_keys, 0, p_.nope_size, 0);
    GroupedGemmParams g = of_heads;
    g.out_features = r;
    g.in_features = p_.nope_size;
    g.a = {q_, kAccumulate<T>, q_size, index_};
    g.b = transposed(to_keys);
    g.out = {latent_q_, kAccumulate<T>, r, index_};
    grouped_gemm(g, par_);

    int32_t* const sequences = offsets_ + n + 1;  // Expert b has the queries of sequence b.
    for (int64_t b = 0; b <= p_.batch; ++b) {
      sequences[b] = static_cast<int32_t>(b * p_.num_tokens * n);
    }
    g = {};
    g.expert_offsets = sequences;
    g.num_experts = p_.batch;
    g.out_features = keys_;
    g.in_features = r;
    g.a = {latent_q_, kAccumulate<T>, r, nullptr};
    g.b = matrices_of(p_.latents);
    g.out = {scores_, kAccumulate<T>, ld_, nullptr};
    GroupedGemmParams rope = g;
    rope.in_features = 2 * p_.half;
    rope.a = {q_ + p_.nope_size, kAccumulate<T>, q_size, nullptr};
    rope.b = matrices_of(p_.rope_keys);
    rope.out.data = rope_scores_;
    const double cost = static_cast<double>(keys_) + 20;
    const auto weigh = [&](bool hide) {
      grouped_gemm(g, par_);
      grouped_gemm(rope, par_);
      parallel_range(par_, rows, cost, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          T* const row = scores_ + i * ld_;
          rows_.axpy(kAccumulate<T>, rope_scores_ + i * ld_, T(1), row, keys_);
          factors_[i] = this->softmax(row, i, hide);
        }
      });
    };
    weigh(false);
    GroupedGemmParams mix = g;
    mix.out_features = r;
    mix.in_features = keys_;
    mix.a = {scores_, kAccumulate<T>, ld_, nullptr};
    mix.a_scale = factors_;
    mix.b = transposed(matrices_of(p_.latents));
    mix.out = {latent_mixed_, kAccumulate<T>, r, nullptr};
    mix.one_chain = true;
    grouped_gemm(mix, par_);
    if (!this->all_finite(kAccumulate<T>, latent_mixed_, rows * r)) {
      weigh(true);
      for (int64_t b = 0; b < p_.batch; ++b) this->multiply_apart(mix, b, b, n);
    }

    g = of_heads;
    g.out_features = p_.value_size;
    g.in_features = r;
    g.a = {latent_mixed_, kAccumulate<T>, r, index_};
    g.b = to_values;
    g.out = {mixed_, p_.type, p_.value_size, index_};
    grouped_gemm(g, par_);
  }

  // Returns the caches as one matrix per sequence, with a row for each token.
  ExpertMatrices matrices_of(const KeptHeads<void>& kept) const {
    return {kept.data, p_.type, kept.stride_batch, kept.stride_token, 1};
  }

  const MlaDecodeParams& p_;
  char* mixed_;  // [tokens, n, d_v] of the type of x
  // [tokens, n, ...] with d_n + 2 half, r, r, ld_, ld_ and no more
  T *q_, *latent_q_, *latent_mixed_, *scores_, *rope_scores_, *factors_;
  int32_t *index_, *offsets_;
};

}  // namespace

void mla_decode(const MlaDecodeParams& p, const Parallel& par) {
  if (p.batch * p.num_tokens == 0) return;
  // Cost of the GEMMs alone, in the units of GemmProblem.
  const double features = static_cast<double>(p.nope_size + p.value_size);
  const double made = features * p.rank + 2.0 * p.rank * (p.start + p.num_tokens);
  const double of_x = static_cast<double>(p.query_rank + p.rank + p.heads * p.value_size);
  const double cost = p.batch * p.num_tokens * (of_x * p.hidden_size + p.heads * made) / 16;
  Team::run(par, cost, [&](const Parallel& team) {
    p.type == DType::kFloat64 ? Step<double>(p, team).run() : Step<float>(p, team).run();
  });
}

}  // namespace moe_ops::cpu
