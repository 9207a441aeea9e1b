#include <cmath>
#include <vector>

#include "cpu/moa_attention/blocks.h"

namespace moe_ops::cpu {

namespace attention {
namespace {

// Sums of gradients of keys and values are split over at least this many items: by sizes alone, so
// that bits do not depend on threads.
constexpr int64_t kLeastItems = 16;

int64_t num_row_blocks(const MoaAttentionParams& p) {
  return ceil_div(p.num_tokens * p.num_slots, kRows);
}

int64_t num_chunks(const MoaAttentionParams& p) {
  const int64_t heads = std::max<int64_t>(1, p.batch * p.num_heads);
  return std::clamp<int64_t>(ceil_div(kLeastItems, heads), 1,
                             std::max<int64_t>(1, num_row_blocks(p)));
}

template <class T>
class Backward {
 public:
  Backward(const MoaAttentionBwdParams& q)
      : q_(q),
        p_(q.fwd),
        k_(kernels<T>()),
        tiles_{k_, p_.head_size},
        d_(p_.head_size),
        ld_(round_up<int64_t>(p_.head_size, k_.lanes)),
        chunks_(num_chunks(p_)) {
    // Chunks of row blocks with about the same number of keys.
    const int64_t blocks = num_row_blocks(p_), last = p_.num_tokens * p_.num_slots - 1;
    std::vector<int64_t> before = {0};
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t end = std::min(last, (i + 1) * kRows - 1);
      const int64_t n =
          keys_of(p_, end / p_.num_slots).last - keys_of(p_, i * kRows / p_.num_slots).first;
      before.push_back(before.back() + std::max<int64_t>(n, 1));
    }
    for (int64_t c = 0; c <= chunks_; ++c) {
      const auto at = std::lower_bound(before.begin(), before.end(), before.back() * c / chunks_);
      cuts_.push_back(at - before.begin());
    }
    cuts_.back() = blocks;
  }

  int64_t chunks() const { return chunks_; }

  void run(int64_t b, int64_t head, int64_t chunk) const {
    T* grad_k = partial(b, head, chunk, 0);
    T* grad_v = partial(b, head, chunk, 1);
    std::fill(grad_k, grad_k + p_.num_keys * ld_, T(0));
    std::fill(grad_v, grad_v + p_.num_keys * ld_, T(0));
    Buffers x(ld_, k_.lanes, ceil_div(p_.num_keys, kKeys));
    for (int64_t i = cuts_[chunk]; i < cuts_[chunk + 1]; ++i) {
      RowBlock<T> block(p_, k_.lanes, b, head, i * kRows);
      load_rows(k_, p_, p_.q, block, static_cast<T>(p_.scale), x.rows, ld_);
      both_forms(block, x.rows, x.q, x.q_columns);
      load_rows(k_, p_, q_.grad_out, block, T(1), x.rows, ld_);
      both_forms(block, x.rows, x.grad_out, x.grad_out_columns);
      std::fill(x.grad_q, x.grad_q + block.padded * ld_, T(0));
      p_.kind == AttentionKind::kSoftmax ? softmax(block, x, grad_k, grad_v)
                                         : stick(block, x, grad_k, grad_v);
      store_grad_q(block, x);
    }
  }

  // Gradients of keys and values j0 to j1: the sum over chunks.
  void reduce(int64_t b, int64_t head, int64_t j0, int64_t j1) const {
    for (int which = 0; which < 2; ++which) {
      char* to = static_cast<char*>(which == 0 ? q_.grad_k : q_.grad_v);
      T* sum = partial(b, head, 0, which) + j0 * ld_;
      for (int64_t c = 1; c < chunks_; ++c) {
        k_.axpy(kAccumulate<T>, partial(b, head, c, which) + j0 * ld_, T(1), sum, (j1 - j0) * ld_);
      }
      const int64_t row = (b * p_.num_keys + j0) * p_.num_heads + head;
      k_.store_rows(p_.type, sum, ld_, j1 - j0, d_, to + row * d_ * dtype_size(p_.type),
                    p_.num_heads * d_);
    }
  }

 private:
  struct Buffers {
    Buffers(int64_t ld, int lanes, int64_t key_blocks)
        : carve(Scratch::kTile,
                (7 * kRows * ld + 3 * kDepthParts * kKeys * kLda + 2 * kKeys * kLda +
                 3 * kKeys * 2 * lanes + (key_blocks + 4) * kRows + 1024) *
                    static_cast<int64_t>(sizeof(T))) {
      for (T** part : {&rows, &q, &grad_out, &grad_q}) *part = carve.take<T>(kRows * ld);
      for (T** part : {&q_columns, &grad_out_columns}) *part = carve.take<T>(kRows * ld);
      for (T** part : {&keys, &values, &key_columns}) {
        *part = carve.take<T>(kDepthParts * kKeys * kLda);
      }
      for (T** part : {&p_rows, &ds_rows}) *part = carve.take<T>(kKeys * kLda);
      for (T** part : {&s, &dp, &slopes}) *part = carve.take<T>(kKeys * 2 * lanes);
      starts = carve.take<T>((key_blocks + 1) * kRows);
      for (T** part : {&a, &delta}) *part = carve.take<T>(kRows);
    }
    Carver carve;
    T *rows, *q, *grad_out, *grad_q, *q_columns, *grad_out_columns;
    T *keys, *values, *key_columns, *p_rows, *ds_rows, *s, *dp, *slopes, *starts, *a, *delta;
  };

  T* partial(int64_t b, int64_t head, int64_t chunk, int which) const {
    const int64_t item = ((b * p_.num_heads + head) * chunks_ + chunk) * 2 + which;
    return static_cast<T*>(q_.workspace) + item * p_.num_keys * ld_;
  }

  int64_t panel_width(int64_t c0) const { return std::min<int64_t>(2 * k_.lanes, ld_ - c0); }

  // [padded][ld] as panels of rows and as panels of columns [panel][padded][2 * lanes].
  void both_forms(const RowBlock<T>& block, const T* rows, T* panels, T* columns) const {
    to_panels(k_, block, rows, ld_, d_, panels);
    const void* pointers[kRows];
    for (int64_t r = 0; r < block.padded; ++r) pointers[r] = rows + r * ld_;
    k_.pack_panels(kAccumulate<T>, pointers, 0, block.padded, d_, nullptr, columns,
                   block.padded * 2 * k_.lanes);
  }

  void load(const RowBlock<T>& block, int64_t j0, int64_t n, Buffers& x) const {
    load_keys(k_, p_, p_.k, block.b, block.head, j0, n, kKc, kLda, x.keys);
    load_keys(k_, p_, p_.k, block.b, block.head, j0, n, kLdm, kLdm, x.key_columns);
    load_keys(k_, p_, p_.v, block.b, block.head, j0, n, kKc, kLda, x.values);
  }

  // Weights and gradients of scores in row form are zero from key `from` on.
  void clear(const RowBlock<T>& block, int64_t panel, int64_t from, int64_t n, Buffers& x) const {
    const int64_t r0 = panel * 2 * k_.lanes, width = block.width(panel);
    for (int64_t j = from; j < n; ++j) {
      std::fill(x.p_rows + j * kLda + r0, x.p_rows + j * kLda + r0 + width, T(0));
      std::fill(x.ds_rows + j * kLda + r0, x.ds_rows + j * kLda + r0 + width, T(0));
    }
  }

  void products(int64_t panel, const AttentionBlock<T>& seen, Buffers& x) const {
    const int64_t r0 = panel * 2 * k_.lanes;
    tiles_.by_rows(x.keys, kKeys * kLda, x.q + r0 * d_, seen.width, seen.keys, x.s);
    tiles_.by_rows(x.values, kKeys * kLda, x.grad_out + r0 * d_, seen.width, seen.keys, x.dp);
  }

  void add_grad_q(int64_t panel, const AttentionBlock<T>& seen, Buffers& x) const {
    tiles_.by_columns(seen.keys, x.key_columns, kKeys * kLdm, x.s, seen.width,
                      x.grad_q + panel * 2 * k_.lanes * ld_);
  }

  // grad [n][ld] += rows [n][kLda] of block.padded columns, times the columns of queries.
  void add_rows(const RowBlock<T>& block, const T* rows, const T* columns, int64_t n,
                T* grad) const {
    for (int64_t c0 = 0; c0 < ld_; c0 += 2 * k_.lanes) {
      const int nv = static_cast<int>(panel_width(c0)) / k_.lanes;
      multiply<T>(k_.row_a[nv - 1], tiles_.max_rows(nv), kLda, block.padded, rows,
                  columns + c0 * block.padded, n, grad + c0, ld_, true);
    }
  }

  void softmax(RowBlock<T>& block, Buffers& x, T* grad_k, T* grad_v) const {
    for (int64_t r = 0; r < block.padded; ++r) {
      x.a[r] = x.delta[r] = T(0);
      if (r >= block.count) continue;
      const int64_t i = block.begin + r, index = row_index(p_, block.b, block.head, i);
      const int64_t size = dtype_size(p_.type);
      x.a[r] = static_cast<const T*>(p_.state)[index];
      x.delta[r] =
          k_.dot_row(
              p_.type, static_cast<const char*>(p_.out) + index * d_ * size, p_.type,
              at(q_.grad_out, p_.type, block.b, i / p_.num_slots, i % p_.num_slots, block.head),
              d_) -
          static_cast<const T*>(q_.grad_state)[index];
    }
    for (int64_t j0 = block.keys.first; j0 < block.keys.last; j0 += kKeys) {
      const int64_t n = std::min(kKeys, block.keys.last - j0);
      load(block, j0, n, x);
      for (int64_t i = 0; i < block.panels(); ++i) {
        const AttentionBlock<T> seen = block.sees(i, j0, n, p_.softcap);
        const int64_t r0 = i * 2 * k_.lanes;
        clear(block, i, seen.keys, n, x);
        if (seen.keys == 0) continue;
        products(i, seen, x);
        k_.attention.softmax_bwd(seen, x.s, x.dp, x.a + r0, x.delta + r0, x.p_rows + r0,
                                 x.ds_rows + r0);
        add_grad_q(i, seen, x);
      }
      add_rows(block, x.ds_rows, x.q_columns, n, grad_k + j0 * ld_);
      add_rows(block, x.p_rows, x.grad_out_columns, n, grad_v + j0 * ld_);
    }
  }

  // First from the last keys on, for what is left of each row's stick where a block starts; then
  // back, from the first block that still gets some.
  void stick(RowBlock<T>& block, Buffers& x, T* grad_k, T* grad_v) const {
    const int64_t width = 2 * k_.lanes;
    T* log_rest = x.starts;  // [block of keys][kRows]
    std::fill(log_rest, log_rest + block.count, T(0));
    std::fill(log_rest + block.count, log_rest + block.padded, k_.attention.lowest);
    int64_t first = block.keys.last;
    bool left = true;
    for (; left && first > block.keys.first; log_rest += kRows) {
      const int64_t end = first, j0 = std::max(block.keys.first, end - kKeys);
      load_keys(k_, p_, p_.k, block.b, block.head, j0, end - j0, kKc, kLda, x.keys);
      std::copy(log_rest, log_rest + block.padded, log_rest + kRows);
      left = false;
      for (int64_t i = 0; i < block.panels(); ++i) {
        const AttentionBlock<T> seen = block.sees(i, j0, end - j0, p_.softcap);
        if (broken(block, i, log_rest)) continue;
        left = true;
        if (seen.keys == 0) continue;
        tiles_.by_rows(x.keys, kKeys * kLda, x.q + i * width * d_, seen.width, seen.keys, x.s);
        k_.attention.stick_rest(seen, x.s, log_rest + kRows + i * width);
      }
      first = j0;
    }
    for (int64_t r = 0; r < block.padded; ++r) {
      const int64_t index = row_index(p_, block.b, block.head, block.begin + r);
      x.a[r] = r < block.count ? static_cast<const T*>(p_.state)[index] *
                                     static_cast<const T*>(q_.grad_state)[index]
                               : T(0);
    }
    for (int64_t j0 = first; j0 < block.keys.last;) {
      log_rest -= kRows;
      // The blocks of the way out, whose first one is what is left over.
      const int64_t end = block.keys.last - (block.keys.last - j0 - 1) / kKeys * kKeys;
      const int64_t n = end - j0;
      load(block, j0, n, x);
      for (int64_t i = 0; i < block.panels(); ++i) {
        AttentionBlock<T> seen = block.sees(i, j0, n, p_.softcap);
        if (broken(block, i, log_rest)) seen.keys = 0;
        clear(block, i, seen.keys, n, x);
        if (seen.keys == 0) continue;
        const int64_t r0 = i * width;
        products(i, seen, x);
        k_.attention.stick_bwd(seen, x.s, x.dp, log_rest + r0, x.slopes, x.a + r0, x.p_rows + r0,
                               x.ds_rows + r0);
        add_grad_q(i, seen, x);
      }
      add_rows(block, x.ds_rows, x.q_columns, n, grad_k + j0 * ld_);
      add_rows(block, x.p_rows, x.grad_out_columns, n, grad_v + j0 * ld_);
      j0 = end;
    }
  }

  bool broken(const RowBlock<T>& block, int64_t panel, const T* log_rest) const {
    const int64_t r0 = panel * 2 * k_.lanes;
    return std::all_of(log_rest + r0, log_rest + r0 + block.width(panel),
                       [&](T x) { return x < k_.attention.log_tiny; });
  }

  void store_grad_q(const RowBlock<T>& block, Buffers& x) const {
    for (int64_t i = 0; i < block.panels(); ++i) {
      const int64_t r0 = i * 2 * k_.lanes;
      k_.transpose(x.grad_q + r0 * ld_, block.width(i), ld_, block.width(i), x.rows + r0 * ld_,
                   ld_);
    }
    k_.load_rows(kAccumulate<T>, x.rows, ld_, block.count, d_, x.rows, ld_,
                 static_cast<T>(p_.scale));
    const int64_t to = row_index(p_, block.b, block.head, block.begin) * d_;
    k_.store_rows(p_.type, x.rows, ld_, block.count, d_,
                  static_cast<char*>(q_.grad_q) + to * dtype_size(p_.type), p_.num_heads * d_);
  }

  const MoaAttentionBwdParams& q_;
  const MoaAttentionParams& p_;
  const Kernels<T>& k_;
  Products<T> tiles_;
  int64_t d_, ld_, chunks_;
  std::vector<int64_t> cuts_;  // row blocks where chunks start
};

template <class T>
void backward(const MoaAttentionBwdParams& q, const Parallel& par) {
  const MoaAttentionParams& p = q.fwd;
  const Backward<T> attention(q);
  const int64_t chunks = attention.chunks(), heads = p.batch * p.num_heads;
  const double cost = static_cast<double>(heads * p.num_tokens) *
                      static_cast<double>(p.num_slots * p.num_keys * p.head_size) / 3;
  parallel_items(par, heads * chunks, cost, [&](int64_t item) {
    const int64_t head = item / chunks;
    attention.run(head / p.num_heads, head % p.num_heads, item % chunks);
  });
  constexpr int64_t kReduce = 256;
  const int64_t parts = ceil_div(p.num_keys, kReduce);
  parallel_items(par, heads * parts, static_cast<double>(heads * p.num_keys * p.head_size) / 4,
                 [&](int64_t item) {
                   const int64_t head = item / parts, j0 = item % parts * kReduce;
                   attention.reduce(head / p.num_heads, head % p.num_heads, j0,
                                    std::min(p.num_keys, j0 + kReduce));
                 });
}

}  // namespace
}  // namespace attention

int64_t moa_attention_workspace(const MoaAttentionParams& p) {
  const bool wide = p.type == DType::kFloat64;
  const int64_t lanes = wide ? kernels<double>().lanes : kernels<float>().lanes;
  return p.batch * p.num_heads * attention::num_chunks(p) * 2 * p.num_keys *
         round_up(p.head_size, lanes) * (wide ? 8 : 4);
}

void moa_attention_bwd(const MoaAttentionBwdParams& q, const Parallel& par) {
  q.fwd.type == DType::kFloat64 ? attention::backward<double>(q, par)
                                : attention::backward<float>(q, par);
}

}  // namespace moe_ops::cpu
