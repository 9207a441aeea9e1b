#include <cmath>
#include <limits>

#include "cpu/moa_attention/blocks.h"

namespace moe_ops::cpu {

namespace attention {
namespace {

template <class T>
class Forward {
 public:
  Forward(const MoaAttentionParams& p)
      : p_(p),
        k_(kernels<T>()),
        tiles_{k_, p.head_size},
        ld_(round_up<int64_t>(p.head_size, k_.lanes)) {}

  void run(int64_t b, int64_t head, int64_t begin) const {
    RowBlock<T> block(p_, k_.lanes, b, head, begin);
    constexpr int64_t kParts = kDepthParts;
    const int64_t size =
        3 * kRows * ld_ + kParts * kKeys * (kLda + kLdm) + kKeys * kRows + 4 * kRows;
    Carver carve(Scratch::kTile, (size + 1024) * static_cast<int64_t>(sizeof(T)));
    Buffers buffers;
    buffers.rows = carve.take<T>(kRows * ld_);
    buffers.q = carve.take<T>(kRows * ld_);
    buffers.out = carve.take<T>(kRows * ld_);
    buffers.keys = carve.take<T>(kParts * kKeys * kLda);
    buffers.values = carve.take<T>(kParts * kKeys * kLdm);
    buffers.s = carve.take<T>(kKeys * 2 * k_.lanes);
    buffers.a = carve.take<T>(kRows);
    buffers.b = carve.take<T>(kRows);
    buffers.factor = carve.take<T>(kRows);

    load_rows(k_, p_, p_.q, block, static_cast<T>(p_.scale), buffers.rows, ld_);
    to_panels(k_, block, buffers.rows, ld_, p_.head_size, buffers.q);
    std::fill(buffers.out, buffers.out + block.padded * ld_, T(0));
    p_.kind == AttentionKind::kSoftmax ? softmax(block, buffers) : stick(block, buffers);
  }

 private:
  struct Buffers {
    T *rows, *q, *out, *keys, *values, *s, *a, *b, *factor;
  };

  void load(const RowBlock<T>& block, int64_t j0, int64_t n, Buffers& buffers) const {
    load_keys(k_, p_, p_.k, block.b, block.head, j0, n, kKc, kLda, buffers.keys);
    load_keys(k_, p_, p_.v, block.b, block.head, j0, n, kLdm, kLdm, buffers.values);
  }

  void scores(const AttentionBlock<T>& seen, int64_t panel, Buffers& buffers) const {
    tiles_.by_rows(buffers.keys, kKeys * kLda, buffers.q + panel * 2 * k_.lanes * p_.head_size,
                   seen.width, seen.keys, buffers.s);
  }

  void add_values(const AttentionBlock<T>& seen, int64_t panel, Buffers& buffers) const {
    tiles_.by_columns(seen.keys, buffers.values, kKeys * kLdm, buffers.s, seen.width,
                      buffers.out + panel * 2 * k_.lanes * ld_);
  }

  void softmax(RowBlock<T>& block, Buffers& buffers) const {
    T *max = buffers.a, *sum = buffers.b;
    std::fill(max, max + block.padded, k_.attention.lowest);
    std::fill(sum, sum + block.padded, T(0));
    for (int64_t j0 = block.keys.first; j0 < block.keys.last; j0 += kKeys) {
      const int64_t n = std::min(kKeys, block.keys.last - j0);
      load(block, j0, n, buffers);
      for (int64_t i = 0; i < block.panels(); ++i) {
        const int64_t r0 = i * 2 * k_.lanes;
        const AttentionBlock<T> seen = block.sees(i, j0, n, p_.softcap);
        if (seen.keys == 0) continue;
        scores(seen, i, buffers);
        if (k_.attention.softmax(seen, buffers.s, max + r0, sum + r0, buffers.factor)) {
          k_.attention.multiply_lanes(buffers.out + r0 * ld_, p_.head_size, seen.width,
                                      buffers.factor);
        }
        add_values(seen, i, buffers);
      }
    }
    std::fill(buffers.factor + block.count, buffers.factor + block.padded, T(0));
    for (int64_t r = 0; r < block.count; ++r) {
      const bool none = sum[r] == T(0);
      buffers.factor[r] = none ? T(0) : T(1) / sum[r];
      state(block, r) = none ? -std::numeric_limits<T>::infinity() : max[r] + std::log(sum[r]);
    }
    finish(block, buffers, buffers.factor);
  }

  void stick(RowBlock<T>& block, Buffers& buffers) const {
    T* log_rest = buffers.a;
    std::fill(log_rest, log_rest + block.count, T(0));
    std::fill(log_rest + block.count, log_rest + block.padded, k_.attention.lowest);
    bool broken[kRows] = {};
    int64_t left = block.panels();
    for (int64_t end = block.keys.last; end > block.keys.first && left > 0; end -= kKeys) {
      const int64_t j0 = std::max(block.keys.first, end - kKeys);
      load(block, j0, end - j0, buffers);
      for (int64_t i = 0; i < block.panels(); ++i) {
        if (broken[i]) continue;
        const AttentionBlock<T> seen = block.sees(i, j0, end - j0, p_.softcap);
        if (seen.keys == 0) continue;
        scores(seen, i, buffers);
        const T most = k_.attention.stick(seen, buffers.s, log_rest + i * 2 * k_.lanes);
        add_values(seen, i, buffers);
        broken[i] = most < k_.attention.log_tiny;
        left -= broken[i];
      }
    }
    for (int64_t r = 0; r < block.count; ++r) {
      state(block, r) = log_rest[r] < k_.attention.log_tiny ? T(0) : std::exp(log_rest[r]);
    }
    finish(block, buffers, nullptr);
  }

  T& state(const RowBlock<T>& block, int64_t r) const {
    return static_cast<T*>(p_.state)[row_index(p_, block.b, block.head, block.begin + r)];
  }

  void finish(const RowBlock<T>& block, Buffers& buffers, const T* scale) const {
    for (int64_t i = 0; i < block.panels(); ++i) {
      const int64_t r0 = i * 2 * k_.lanes;
      T* out = buffers.out + r0 * ld_;
      if (scale != nullptr) {
        k_.attention.multiply_lanes(out, p_.head_size, block.width(i), scale + r0);
      }
      k_.transpose(out, block.width(i), ld_, block.width(i), buffers.rows + r0 * ld_, ld_);
    }
    const int64_t to = row_index(p_, block.b, block.head, block.begin) * p_.head_size;
    k_.store_rows(p_.type, buffers.rows, ld_, block.count, p_.head_size,
                  static_cast<char*>(p_.out) + to * dtype_size(p_.type),
                  p_.num_heads * p_.head_size);
  }

  const MoaAttentionParams& p_;
  const Kernels<T>& k_;
  Products<T> tiles_;
  int64_t ld_;
};

template <class T>
void forward(const MoaAttentionParams& p, const Parallel& par) {
  const Forward<T> attention(p);
  const int64_t blocks = ceil_div(p.num_tokens * p.num_slots, kRows), heads = p.batch * p.num_heads;
  const double cost = static_cast<double>(p.batch * p.num_heads * p.num_tokens) *
                      static_cast<double>(p.num_slots * p.num_keys * p.head_size) / 8;
  parallel_items(par, blocks * heads, cost, [&](int64_t item) {
    // The last rows, which see the most keys, first.
    const int64_t block = blocks - 1 - item / heads, head = item % heads;
    attention.run(head / p.num_heads, head % p.num_heads, block * kRows);
  });
}

}  // namespace
}  // namespace attention

void moa_attention(const MoaAttentionParams& p, const Parallel& par) {
  p.type == DType::kFloat64 ? attention::forward<double>(p, par)
                            : attention::forward<float>(p, par);
}

}  // namespace moe_ops::cpu
