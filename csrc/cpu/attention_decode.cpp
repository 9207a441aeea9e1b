// The block is made of the products, norms and rotations of other ops. Scores of a key head are the
// product of its queries with its keys, and what comes out of softmax multiplies its values: two
// grouped products in which a key head of a sequence is an expert.
#include "moe_ops/attention_decode.h"

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
  using Parts::sink_;
  using Parts::tokens_;

 public:
  Step(const AttentionDecodeParams& p, const Parallel& par)
      : Parts(p, par), p_(p), group_(p.heads / p.kv_heads) {}

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

    const Rows x = this->input(normed, scores_);
    multiply({{p_.query, q_}, {p_.key, k}, {p_.value, v}}, x, tokens_, kAccumulate<T>, par_);
    norm_heads(p_.query_norm, q_, p_.heads);
    norm_heads(p_.key_norm, k, p_.kv_heads);
    this->rotate(q_, p_.heads, d, q_width, {}, buffer_);
    this->rotate(k, p_.kv_heads, d, kv_width, {}, buffer_);
    const T scale = static_cast<T>(p_.scale);
    for (int64_t i = 0; i < tokens_ * q_width; ++i) q_[i] *= scale;
    this->keep(p_.keys, k, p_.kv_heads, d, kv_width);
    this->keep(p_.values, v, p_.kv_heads, d, kv_width);
    attend();
    this->finish(mixed_, q_width, y);
  }

 private:
  void norm_heads(const void* weight, T* heads, int64_t num_heads) {
    if (weight == nullptr) return;
    const int64_t cols = p_.norms_heads ? p_.head_size : num_heads * p_.head_size;
    const int64_t count = p_.norms_heads ? tokens_ * num_heads : tokens_;
    this->norm(weight, p_.head_eps, heads, count, cols, cols, buffer_, factors_);
  }

  // Computes attention of the queries q_ over the caches, into mixed_. Sequences are processed
  // together if the key heads of all of them are evenly spaced.
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
    T* const keys = scores_ + sink_;  // the scores of the first key
    GroupedGemmParams g;
    g.expert_offsets = offsets_;
    g.num_experts = experts;
    g.out_features = keys_;
    g.in_features = d;
    g.a = {q_ + from, kAccumulate<T>, d, index_};
    g.b = {element(p_.keys.data, p_.type, first * p_.keys.stride_batch), p_.type,
           p_.keys.stride_head, p_.keys.stride_token, 1};
    g.out = {keys, kAccumulate<T>, ld_, nullptr};
    const double cost = static_cast<double>(keys_) + 20;
    const auto weigh = [&](bool hide) {
      grouped_gemm(g, par_);
      parallel_range(par_, rows, cost, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          factors_[r] = this->softmax(keys + r * ld_, first * S * p_.heads + index_[r], hide);
        }
      });
    };
    weigh(false);
    GroupedGemmParams mix;
    mix.expert_offsets = offsets_;
    mix.num_experts = experts;
    mix.out_features = d;
    mix.in_features = keys_;
    mix.a = {keys, kAccumulate<T>, ld_, nullptr};
    mix.a_scale = factors_;
    mix.b = {element(p_.values.data, p_.type, first * p_.values.stride_batch), p_.type,
             p_.values.stride_head, 1, p_.values.stride_token};
    mix.out = {mixed_ + from * dtype_size(p_.type), p_.type, d, index_};
    mix.one_chain = true;
    grouped_gemm(mix, par_);
    if (this->all_finite(p_.type, mix.out.data, rows * d)) return;
    weigh(true);
    for (int64_t e = 0; e < experts; ++e) {
      this->multiply_apart(mix, e, first + e / p_.kv_heads, group_);
    }
  }

  const AttentionDecodeParams& p_;
  const int64_t group_;
  char* mixed_;  // [tokens, heads, d] of the type of x
  T *q_, *scores_, *factors_, *buffer_;
  int32_t *index_, *offsets_;
};

}  // namespace

void attention_decode(const AttentionDecodeParams& p, const Parallel& par) {
  if (p.batch * p.num_tokens == 0) return;
  // Cost of the GEMMs alone, in the units of GemmProblem.
  const double heads = static_cast<double>(p.heads + p.kv_heads) * p.head_size;
  const double keys = static_cast<double>(p.heads) * p.head_size * (p.start + p.num_tokens);
  const double cost = p.batch * p.num_tokens * (heads * p.hidden_size + keys) / 8;
  Team::run(par, cost, [&](const Parallel& team) {
    p.type == DType::kFloat64 ? Step<double>(p, team).run() : Step<float>(p, team).run();
  });
}

}  // namespace moe_ops::cpu
