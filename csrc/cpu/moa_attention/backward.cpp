#include <cmath>
#include <vector>

#include "cpu/gemm/blocking.h"
#include "cpu/moa_attention/blocks.h"

namespace moe_ops::cpu {

namespace attention {
namespace {

int64_t num_chunks(const MoaAttentionParams& p) {
  const int64_t heads = std::max<int64_t>(1, p.batch * p.num_heads);
  const int64_t row_blocks = ceil_div(p.num_tokens * p.num_slots, kRows);
  return std::clamp<int64_t>(ceil_div(kAttentionLeastItems, heads), 1,
                             std::max<int64_t>(1, row_blocks));
}

template <class T>
class Backward {
 public:
  Backward(const MoaAttentionBwdParams& q)
      : q_(q),
        p_(q.fwd),
        k_(gemm_kernels<T>()),
        tiles_{k_, p_.head_size},
        narrow_(narrow_size<T>(p_)),
        panel_rows_(narrow_ > 0 ? k_.lanes : 2 * k_.lanes),
        d_(p_.head_size),
        features_(narrow_ > 0 ? narrow_ : d_),
        ld_(round_up<int64_t>(features_, k_.lanes)),
        chunks_(num_chunks(p_)),
        blocks_(p_, false),
        cuts_(cut_row_blocks(p_, blocks_, chunks_)) {}

  int64_t chunks() const { return chunks_; }

  void run(int64_t b, int64_t head, int64_t chunk) const {
    T* grad_k = partial(b, head, chunk, 0);
    T* grad_v = partial(b, head, chunk, 1);
    std::fill(grad_k, grad_k + p_.num_keys * ld_, T(0));
    std::fill(grad_v, grad_v + p_.num_keys * ld_, T(0));
    const int64_t begin = cuts_[chunk], end = cuts_[chunk + 1];
    if (begin == end) return;
    const NoSubnormals guard;
    ScratchScope scratch;
    Buffers x(scratch, *this, b, head,
              kept_keys(p_, blocks_, begin, end, 3 * ld_ * static_cast<int64_t>(sizeof(T))));
    for (int64_t i = begin; i < end; ++i) {
      const RowBlock<T> block(p_, k_.lanes, panel_rows_, b, head, blocks_, i);
      both_forms(block, p_.q, static_cast<T>(p_.scale), x.q, x.q_columns);
      both_forms(block, q_.grad_out, T(1), x.grad_out, x.grad_out_columns);
      if (narrow_ > 0) {
        rows_.load_rows({kAccumulate<T>, x.q, 0, 1, block.padded * features_}, x.q, 0,
                        attention_.power_scale);
      }
      // Pairs of a row and a key that it does not see count with zeros, which what is not finite
      // survives: where there is such a number, sums are made of the pairs that see each other.
      const int64_t numbers = block.padded * ld_;
      x.rows_apart = !attention_.all_finite(x.q_columns, numbers) ||
                     !attention_.all_finite(x.grad_out_columns, numbers);
      for (const bool again : {false, true}) {
        x.grad_q_again = again;
        std::fill(x.grad_q, x.grad_q + numbers, T(0));
        p_.kind == AttentionKind::kSoftmax ? softmax(block, x, grad_k, grad_v)
                                           : stick(block, x, grad_k, grad_v);
        if (attention_.all_finite(x.grad_q, numbers)) break;
      }
      store_grad_q(block, x);
    }
  }

  // Sums the gradients of keys and values j0 to j1 over the chunks.
  void reduce(int64_t b, int64_t head, int64_t j0, int64_t j1) const {
    for (int which = 0; which < 2; ++which) {
      char* to = static_cast<char*>(which == 0 ? q_.grad_k : q_.grad_v);
      T* sum = partial(b, head, 0, which) + j0 * ld_;
      for (int64_t c = 1; c < chunks_; ++c) {
        rows_.axpy(kAccumulate<T>, partial(b, head, c, which) + j0 * ld_, T(1), sum,
                   (j1 - j0) * ld_);
      }
      const int64_t row = (b * p_.num_keys + j0) * p_.num_heads + head;
      rows_.store_rows(
          sum, ld_, {p_.type, to + row * d_ * dtype_size(p_.type), p_.num_heads * d_, j1 - j0, d_});
    }
  }

 private:
  // Elements of scores in row form; the narrow kernels write whole steps.
  static constexpr int64_t kRowForm = (kKeys + kNarrowKeys) * kLda;

  struct Buffers {
    Buffers(ScratchScope& scratch, const Backward& of, int64_t b, int64_t head,
            const KeyRange& kept)
        : key_blocks(ceil_div(of.p_.num_keys, kKeys)),
          row_layout{kKc, of.narrow_ > 0 ? kNarrowSize : kLda, kept},
          column_layout{kLdm, kLdm, kept},
          by_rows(row_layout.size(of.d_)),
          by_columns(of.narrow_ > 0 ? 0 : column_layout.size(of.d_)),
          arena(scratch, Scratch::kTile,
                (6 * kRows * of.ld_ + 2 * by_rows + by_columns + 2 * kRowForm +
                 3 * kKeys * 2 * of.k_.lanes + (key_blocks + 4) * kRows + 1024) *
                    static_cast<int64_t>(sizeof(T))),
          keys(of.k_, of.p_, of.p_.k, b, head, row_layout, arena.take<T>(by_rows)),
          values(of.k_, of.p_, of.p_.v, b, head, row_layout, arena.take<T>(by_rows)),
          key_columns(of.k_, of.p_, of.p_.k, b, head, column_layout, arena.take<T>(by_columns)) {
      for (T** part : {&q, &grad_out, &grad_q, &q_columns, &grad_out_columns, &rows}) {
        *part = arena.take<T>(kRows * of.ld_);
      }
      for (T** part : {&p_rows, &ds_rows}) *part = arena.take<T>(kRowForm);
      for (T** part : {&s, &dp, &slopes}) *part = arena.take<T>(kKeys * 2 * of.k_.lanes);
      starts = arena.take<T>((key_blocks + 1) * kRows);
      for (T** part : {&a, &delta}) *part = arena.take<T>(kRows);
    }
    int64_t key_blocks;
    KeyLayout row_layout, column_layout;
    int64_t by_rows, by_columns;
    Arena arena;
    KeyCopy<T> keys, values, key_columns;
    T *q, *grad_out, *grad_q, *q_columns, *grad_out_columns, *rows;
    T *p_rows, *ds_rows, *s, *dp, *slopes, *starts, *a, *delta;
    bool rows_apart;    // gradients of keys and values leave out the rows that do not see them
    bool grad_q_again;  // that of queries alone, without the keys that they do not see
  };

  T* partial(int64_t b, int64_t head, int64_t chunk, int which) const {
    const int64_t item = ((b * p_.num_heads + head) * chunks_ + chunk) * 2 + which;
    return static_cast<T*>(q_.workspace) + item * p_.num_keys * ld_;
  }

  int64_t panel_width(int64_t c0) const { return std::min<int64_t>(2 * k_.lanes, ld_ - c0); }

  // Packs rows of x as panels of columns [panel][padded][2 * lanes], and as panels of rows.
  void both_forms(const RowBlock<T>& block, const AttentionOperand& x, T scale, T* panels,
                  T* columns) const {
    const void* rows[kRows];
    for_runs(p_, x, block, [&](const char* first, int64_t stride, int64_t r, int64_t n) {
      for (int64_t i = 0; i < n; ++i) rows[r + i] = first + i * stride * dtype_size(p_.type);
    });
    T scales[kRows];
    std::fill(scales, scales + block.count, scale);
    const int64_t step = block.padded * 2 * k_.lanes;
    k_.pack_b({p_.type, rows, block.count, d_}, 0, scales, columns, step);
    for (int64_t c0 = 0; c0 < d_; c0 += 2 * k_.lanes) {
      const int64_t width = panel_width(c0), cols = std::min(width, features_ - c0);
      T* from = columns + c0 * block.padded;
      std::fill(from + block.count * width, from + block.padded * width, T(0));
      for (int64_t i = 0; i < block.panels(); ++i) {
        const int64_t r0 = i * panel_rows_;
        k_.transpose(from + r0 * width, width, block.width(i), cols,
                     panels + r0 * features_ + c0 * block.width(i), block.width(i));
      }
    }
  }

  // Sets weights and gradients of scores in row form to zero from key `from` on, as far as add_rows
  // reads them: to the end of the tile that `seen_keys` ends in, or of the block for a panel that
  // sees none after panels that see some. Tiles start with a panel's keys, so this may be too many.
  void clear(const RowBlock<T>& block, int64_t panel, const int64_t* seen_keys, int64_t from,
             int64_t n, Buffers& x) const {
    const int64_t r0 = panel * panel_rows_, width = block.width(panel);
    int64_t to = n;
    if (std::none_of(seen_keys, seen_keys + panel + 1, [](int64_t keys) { return keys > 0; })) {
      return;
    }
    if (from == seen_keys[panel] && from > 0) {
      to = std::min<int64_t>(n, from + std::max(k_.mr1, k_.mr2));
    }
    for (int64_t j = from; j < to; ++j) {
      std::fill(x.p_rows + j * kLda + r0, x.p_rows + j * kLda + r0 + width, T(0));
      std::fill(x.ds_rows + j * kLda + r0, x.ds_rows + j * kLda + r0 + width, T(0));
    }
  }

  // Sets keys before the first that a row sees to zero, because the narrow kernels skip them.
  void clear_before(const AttentionBlock<T>& seen, int64_t r0, Buffers& x) const {
    for (int64_t j = 0; j < seen.start; ++j) {
      std::fill(x.p_rows + j * kLda + r0, x.p_rows + j * kLda + r0 + seen.width, T(0));
      std::fill(x.ds_rows + j * kLda + r0, x.ds_rows + j * kLda + r0 + seen.width, T(0));
    }
  }

  // A block of keys: rows of keys and values, and keys once more for the gradient of queries, which
  // the narrow kernels take from the rows.
  struct KeyBlock {
    const T *keys, *values, *key_columns;
    KeyBlock(Buffers& x, int64_t j0, int64_t n)
        : keys(x.keys.get(j0, n)),
          values(x.values.get(j0, n)),
          key_columns(x.by_columns > 0 ? x.key_columns.get(j0, n) : nullptr) {}
  };

  void scores(int64_t panel, const AttentionBlock<T>& seen, const T* keys, Buffers& x) const {
    tiles_.row_major(keys, x.keys.part_stride(), x.q + panel * panel_rows_ * d_, seen.width,
                     seen.keys, x.s);
  }

  void products(int64_t panel, const AttentionBlock<T>& seen, const KeyBlock& from,
                Buffers& x) const {
    scores(panel, seen, from.keys, x);
    tiles_.row_major(from.values, x.values.part_stride(), x.grad_out + panel * panel_rows_ * d_,
                     seen.width, seen.keys, x.dp);
  }

  void add_grad_q(int64_t panel, const AttentionBlock<T>& seen, const KeyBlock& from,
                  Buffers& x) const {
    tiles_.column_major(seen, from.key_columns, x.key_columns.part_stride(), x.s,
                        x.grad_q + panel * panel_rows_ * ld_, x.grad_q_again);
  }

  // Computes grad [n][ld] += rows [n][kLda] of block.count columns times the columns of queries. A
  // later panel sees at least as many keys as one before it: a tile of keys starts with the first
  // panel that sees one of them.
  void add_rows(const RowBlock<T>& block, const int64_t* seen_keys, const T* rows, const T* columns,
                int64_t n, T* grad) const {
    TileOptions hints;
    for (int64_t c0 = 0; c0 < ld_; c0 += 2 * k_.lanes) {
      const int64_t width = panel_width(c0), nv = width / k_.lanes;
      int64_t panel = 0;
      for (RowTiles t(n, tiles_.max_rows(static_cast<int>(nv))); t.next();) {
        const int64_t i0 = t.begin;
        while (panel < block.panels() && seen_keys[panel] <= i0) ++panel;
        const int64_t r0 = panel * panel_rows_;
        if (r0 >= block.padded) break;
        k_.row_a[nv - 1][t.height - 1](block.count - r0, rows + i0 * kLda + r0,
                                       columns + c0 * block.padded + r0 * width,
                                       {grad + i0 * ld_ + c0, ld_, true}, hints);
      }
    }
  }

  // Like add_rows, but sums only the rows that see a key, key by key.
  void add_rows_apart(const RowBlock<T>& block, int64_t j0, const T* rows, const T* columns,
                      int64_t n, T* grad) const {
    TileOptions hints;
    int64_t begin = 0, end = 0;  // both ends of a row's keys grow with the row
    for (int64_t i = 0; i < n; ++i) {
      const int64_t key = j0 + i - block.keys.first;
      while (begin < block.count && block.last[begin] <= key) ++begin;
      while (end < block.count && block.first[end] <= key) ++end;
      if (begin >= end) continue;
      for (int64_t c0 = 0; c0 < ld_; c0 += 2 * k_.lanes) {
        const int64_t width = panel_width(c0), nv = width / k_.lanes;
        k_.row_a[nv - 1][0](end - begin, rows + i * kLda + begin,
                            columns + c0 * block.padded + begin * width,
                            {grad + i * ld_ + c0, ld_, true}, hints);
      }
    }
  }

  void add_grad_kv(const RowBlock<T>& block, const int64_t* seen_keys, int64_t j0, int64_t n,
                   const Buffers& x, T* grad_k, T* grad_v) const {
    if (x.grad_q_again) return;
    if (x.rows_apart) {
      add_rows_apart(block, j0, x.ds_rows, x.q_columns, n, grad_k + j0 * ld_);
      add_rows_apart(block, j0, x.p_rows, x.grad_out_columns, n, grad_v + j0 * ld_);
      return;
    }
    add_rows(block, seen_keys, x.ds_rows, x.q_columns, n, grad_k + j0 * ld_);
    add_rows(block, seen_keys, x.p_rows, x.grad_out_columns, n, grad_v + j0 * ld_);
  }

  // Computes each row's log of its sum, and <out, grad_out> minus the gradient of that log.
  void row_numbers(const RowBlock<T>& block, Buffers& x) const {
    const int64_t first = row_index(p_, block.b, block.head, block.begin);
    const int64_t step = p_.num_heads * d_, size = dtype_size(p_.type);
    for_runs(p_, q_.grad_out, block, [&](const char* rows, int64_t stride, int64_t r, int64_t n) {
      attention_.row_dots({p_.type,
                           static_cast<const char*>(p_.out) + (first * d_ + r * step) * size, step,
                           rows, stride, n, d_, x.delta + r});
    });
    const T* state = static_cast<const T*>(p_.state) + first;
    const T* grad_state = static_cast<const T*>(q_.grad_state) + first;
    for (int64_t r = 0; r < block.count; ++r) {
      x.a[r] = state[r * p_.num_heads];
      x.delta[r] -= grad_state[r * p_.num_heads];
    }
    std::fill(x.a + block.count, x.a + block.padded, T(0));
    std::fill(x.delta + block.count, x.delta + block.padded, T(0));
  }

  void softmax(const RowBlock<T>& block, Buffers& x, T* grad_k, T* grad_v) const {
    row_numbers(block, x);
    for (int64_t j0 = block.keys.first; j0 < block.keys.last; j0 += kKeys) {
      const int64_t n = std::min(kKeys, block.keys.last - j0);
      const KeyBlock from(x, j0, n);
      int64_t seen_keys[kRows];
      for (int64_t i = 0; i < block.panels(); ++i) {
        AttentionBlock<T> seen = block.sees(i, j0, n, p_.softcap);
        seen.apart = x.grad_q_again;
        const int64_t r0 = i * panel_rows_;
        seen_keys[i] = seen.keys;
        clear(block, i, seen_keys, seen.keys, n, x);
        if (seen.keys == 0) continue;
        if (narrow_ > 0) {
          clear_before(seen, r0, x);
          attention_.narrow_bwd(seen, {narrow_, from.keys, from.values, x.q + r0 * features_,
                                       x.grad_out + r0 * features_, x.a + r0, x.delta + r0,
                                       x.grad_q + r0 * ld_, x.p_rows + r0, x.ds_rows + r0});
          continue;
        }
        products(i, seen, from, x);
        attention_.softmax_bwd(seen,
                               {x.s, x.dp, x.a + r0, x.delta + r0, x.p_rows + r0, x.ds_rows + r0});
        add_grad_q(i, seen, from, x);
      }
      add_grad_kv(block, seen_keys, j0, n, x, grad_k, grad_v);
    }
  }

  // Runs over the blocks from the last keys on, to find the remainder of each row's stick at the
  // start of each block, then forward from the first block with a remainder.
  void stick(const RowBlock<T>& block, Buffers& x, T* grad_k, T* grad_v) const {
    const int64_t width = 2 * k_.lanes;
    T* log_rest = x.starts;  // [block of keys][kRows]
    std::fill(log_rest, log_rest + block.count, T(0));
    std::fill(log_rest + block.count, log_rest + block.padded, attention_.lowest);
    int64_t first = block.keys.last;
    bool left = true;
    for (; left && first > block.keys.first; log_rest += kRows) {
      const int64_t end = first, j0 = std::max(block.keys.first, end - kKeys);
      const T* keys = x.keys.get(j0, end - j0);
      std::copy(log_rest, log_rest + block.padded, log_rest + kRows);
      left = false;
      for (int64_t i = 0; i < block.panels(); ++i) {
        AttentionBlock<T> seen = block.sees(i, j0, end - j0, p_.softcap);
        if (broken(block, i, log_rest)) continue;
        left = true;
        if (seen.keys == 0) continue;
        KeyIndex<T> living[kRows];
        leave_out_empty_sticks(block, i, log_rest + i * width, attention_.log_tiny, seen, living);
        scores(i, seen, keys, x);
        attention_.stick_rest(seen, x.s, log_rest + kRows + i * width);
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
      const KeyBlock from(x, j0, n);
      int64_t seen_keys[kRows];
      for (int64_t i = 0; i < block.panels(); ++i) {
        AttentionBlock<T> seen = block.sees(i, j0, n, p_.softcap);
        // Panels without keys may lie between others: these tiles multiply by zeros.
        seen_keys[i] = seen.keys;
        if (broken(block, i, log_rest)) seen.keys = 0;
        clear(block, i, seen_keys, seen.keys, n, x);
        if (seen.keys == 0) continue;
        const int64_t r0 = i * width;
        KeyIndex<T> living[kRows];
        leave_out_empty_sticks(block, i, log_rest + r0, attention_.log_tiny, seen, living);
        products(i, seen, from, x);
        attention_.stick_bwd(
            seen, {x.s, x.dp, log_rest + r0, x.slopes, x.a + r0, x.p_rows + r0, x.ds_rows + r0});
        add_grad_q(i, seen, from, x);
      }
      add_grad_kv(block, seen_keys, j0, n, x, grad_k, grad_v);
      j0 = end;
    }
  }

  bool broken(const RowBlock<T>& block, int64_t panel, const T* log_rest) const {
    const int64_t r0 = panel * 2 * k_.lanes;
    return std::all_of(log_rest + r0, log_rest + r0 + block.width(panel),
                       [&](T x) { return x < attention_.log_tiny; });
  }

  void store_grad_q(const RowBlock<T>& block, Buffers& x) const {
    for (int64_t i = 0; i < block.panels(); ++i) {
      const int64_t r0 = i * panel_rows_;
      k_.transpose(x.grad_q + r0 * ld_, block.width(i), ld_, block.width(i), x.rows + r0 * ld_,
                   ld_);
    }
    rows_.load_rows({kAccumulate<T>, x.rows, ld_, block.count, d_}, x.rows, ld_,
                    static_cast<T>(p_.scale));
    const int64_t to = row_index(p_, block.b, block.head, block.begin) * d_;
    rows_.store_rows(x.rows, ld_,
                     {p_.type, static_cast<char*>(q_.grad_q) + to * dtype_size(p_.type),
                      p_.num_heads * d_, block.count, d_});
  }

  const MoaAttentionBwdParams& q_;
  const MoaAttentionParams& p_;
  const GemmKernels<T>& k_;
  const RowKernels<T>& rows_ = row_kernels<T>();
  const AttentionKernels<T>& attention_ = attention_kernels<T>();
  Products<T> tiles_;
  int narrow_;
  int64_t panel_rows_, d_, features_, ld_, chunks_;
  RowBlocks blocks_;
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
  const int64_t parts = ceil_div(p.num_keys, kAttentionReduceKeys);
  parallel_items(par, heads * parts, static_cast<double>(heads * p.num_keys * p.head_size) / 4,
                 [&](int64_t item) {
                   const int64_t head = item / parts, j0 = item % parts * kAttentionReduceKeys;
                   attention.reduce(head / p.num_heads, head % p.num_heads, j0,
                                    std::min(p.num_keys, j0 + kAttentionReduceKeys));
                 });
}

}  // namespace
}  // namespace attention

int64_t moa_attention_workspace(const MoaAttentionParams& p) {
  const bool wide = p.type == DType::kFloat64;
  const int64_t lanes = wide ? gemm_kernels<double>().lanes : gemm_kernels<float>().lanes;
  return p.batch * p.num_heads * attention::num_chunks(p) * 2 * p.num_keys *
         round_up(p.head_size, lanes) * (wide ? 8 : 4);
}

void moa_attention_bwd(const MoaAttentionBwdParams& q, const Parallel& par) {
  q.fwd.type == DType::kFloat64 ? attention::backward<double>(q, par)
                                : attention::backward<float>(q, par);
}

}  // namespace moe_ops::cpu
