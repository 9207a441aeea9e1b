#include <cmath>

#include "cpu/moa_attention/blocks.h"

namespace moe_ops::cpu {

namespace attention {
namespace {

template <class T>
class Forward {
 public:
  Forward(const MoaAttentionParams& p, const RowBlocks& blocks)
      : p_(p),
        blocks_(blocks),
        k_(gemm_kernels<T>()),
        tiles_{k_, p.head_size},
        narrow_(narrow_size<T>(p)),
        panel_rows_(narrow_ > 0 ? k_.lanes : 2 * k_.lanes),
        features_(narrow_ > 0 ? narrow_ : p.head_size),
        ld_(round_up<int64_t>(features_, k_.lanes)) {}

  // Computes row blocks begin to end of a head.
  void run(int64_t b, int64_t head, int64_t begin, int64_t end) const {
    const NoSubnormals guard;
    const int64_t d = p_.head_size;
    const KeyRange kept =
        kept_keys(p_, blocks_, begin, end, 2 * ld_ * static_cast<int64_t>(sizeof(T)));
    const KeyLayout key_layout = {kKc, narrow_ > 0 ? kNarrowSize : kLda, kept};
    const KeyLayout value_layout = {kLdm, narrow_ > 0 ? kNarrowSize : kLdm, kept};
    const int64_t keys = key_layout.size(d), values = value_layout.size(d);
    const int64_t size = 3 * kRows * ld_ + keys + values + kKeys * 2 * k_.lanes + 3 * kRows;
    ScratchScope scratch;
    Arena arena(scratch, Scratch::kTile, (size + 1024) * static_cast<int64_t>(sizeof(T)));
    Buffers buffers{
        arena.take<T>(kRows * ld_),
        arena.take<T>(kRows * ld_),
        arena.take<T>(kRows * ld_),
        arena.take<T>(kKeys * 2 * k_.lanes),
        arena.take<T>(kRows),
        arena.take<T>(kRows),
        arena.take<T>(kRows),
        {k_, p_, p_.k, b, head, key_layout, arena.take<T>(keys)},
        {k_, p_, p_.v, b, head, value_layout, arena.take<T>(values)},
    };
    const T scale = static_cast<T>(p_.scale) * (narrow_ > 0 ? attention_.power_scale : T(1));
    for (int64_t i = begin; i < end; ++i) {
      const RowBlock<T> block(p_, k_.lanes, panel_rows_, b, head, blocks_, i);
      load_rows(p_, p_.q, block, scale, buffers.rows, ld_);
      to_panels(k_, block, buffers.rows, ld_, features_, buffers.q);
      // Values that a row does not see get weights of zero, which what is not finite survives: then
      // sums are made again, of each row's own keys.
      for (const bool apart : {false, true}) {
        std::fill(buffers.out, buffers.out + block.padded * ld_, T(0));
        p_.kind == AttentionKind::kSoftmax ? softmax(block, buffers, apart)
                                           : stick(block, buffers, apart);
        if (attention_.all_finite(buffers.out, block.padded * ld_)) break;
      }
      p_.kind == AttentionKind::kSoftmax ? finish_softmax(block, buffers)
                                         : finish_stick(block, buffers);
    }
  }

 private:
  struct Buffers {
    T *rows, *q, *out, *s, *a, *b, *factor;
    KeyCopy<T> keys, values;
  };

  void scores(const AttentionBlock<T>& seen, int64_t panel, const T* keys, Buffers& buffers) const {
    tiles_.row_major(keys, buffers.keys.part_stride(),
                     buffers.q + panel * panel_rows_ * p_.head_size, seen.width, seen.keys,
                     buffers.s);
  }

  void add_values(const AttentionBlock<T>& seen, int64_t panel, const T* values, Buffers& buffers,
                  bool apart) const {
    tiles_.column_major(seen, values, buffers.values.part_stride(), buffers.s,
                        buffers.out + panel * panel_rows_ * ld_, apart);
  }

  void softmax(const RowBlock<T>& block, Buffers& buffers, bool apart) const {
    T *max = buffers.a, *sum = buffers.b;
    std::fill(max, max + block.padded, attention_.lowest);
    std::fill(sum, sum + block.padded, T(0));
    for (int64_t j0 = block.keys.first; j0 < block.keys.last; j0 += kKeys) {
      const int64_t n = std::min(kKeys, block.keys.last - j0);
      const T *keys = buffers.keys.get(j0, n), *values = buffers.values.get(j0, n);
      for (int64_t i = 0; i < block.panels(); ++i) {
        const int64_t r0 = i * panel_rows_;
        AttentionBlock<T> seen = block.sees(i, j0, n, p_.softcap);
        if (seen.keys == 0) continue;
        if (narrow_ > 0) {
          seen.apart = apart;
          attention_.narrow(seen, {narrow_, keys, values, buffers.q + r0 * features_,
                                   buffers.out + r0 * ld_, max + r0, sum + r0});
          continue;
        }
        scores(seen, i, keys, buffers);
        if (attention_.softmax(seen, buffers.s, max + r0, sum + r0, buffers.factor)) {
          attention_.multiply_columns(buffers.out + r0 * ld_, p_.head_size, seen.width,
                                      buffers.factor);
        }
        add_values(seen, i, values, buffers, apart);
      }
    }
  }

  void finish_softmax(const RowBlock<T>& block, Buffers& buffers) const {
    T *max = buffers.a, *sum = buffers.b;
    if (narrow_ > 0) {
      for (int64_t r = 0; r < block.padded; ++r) max[r] /= attention_.power_scale;
    }
    attention_.softmax_end(block.padded, max, sum, max, buffers.factor);
    for (int64_t r = 0; r < block.count; ++r) state(block, r) = max[r];
    finish(block, buffers, buffers.factor);
  }

  void stick(const RowBlock<T>& block, Buffers& buffers, bool apart) const {
    T* log_rest = buffers.a;
    std::fill(log_rest, log_rest + block.count, T(0));
    std::fill(log_rest + block.count, log_rest + block.padded, attention_.lowest);
    bool broken[kRows] = {};
    int64_t left = block.panels();
    int64_t j0;
    for (int64_t end = block.keys.last; end > block.keys.first && left > 0; end = j0) {
      const int64_t over = block.anchored ? (end - block.keys.first - 1) % kKeys + 1 : kKeys;
      j0 = std::max(block.keys.first, end - over);
      const T *keys = buffers.keys.get(j0, end - j0), *values = buffers.values.get(j0, end - j0);
      for (int64_t i = 0; i < block.panels(); ++i) {
        if (broken[i]) continue;
        AttentionBlock<T> seen = block.sees(i, j0, end - j0, p_.softcap);
        if (seen.keys == 0) continue;
        T* rest = log_rest + i * panel_rows_;
        KeyIndex<T> last[kRows];
        leave_out_empty_sticks(block, i, rest, attention_.log_tiny, seen, last);
        scores(seen, i, keys, buffers);
        const T most = attention_.stick(seen, buffers.s, rest);
        add_values(seen, i, values, buffers, apart);
        broken[i] = most < attention_.log_tiny;
        left -= broken[i];
      }
    }
  }

  void finish_stick(const RowBlock<T>& block, Buffers& buffers) const {
    const T* log_rest = buffers.a;
    for (int64_t r = 0; r < block.count; ++r) {
      state(block, r) = log_rest[r] < attention_.log_tiny ? T(0) : std::exp(log_rest[r]);
    }
    finish(block, buffers, nullptr);
  }

  T& state(const RowBlock<T>& block, int64_t r) const {
    return static_cast<T*>(p_.state)[row_index(p_, block.b, block.head, block.begin + r)];
  }

  void finish(const RowBlock<T>& block, Buffers& buffers, const T* scale) const {
    for (int64_t i = 0; i < block.panels(); ++i) {
      const int64_t r0 = i * panel_rows_;
      T* out = buffers.out + r0 * ld_;
      if (scale != nullptr) {
        attention_.multiply_columns(out, p_.head_size, block.width(i), scale + r0);
      }
      k_.transpose(out, block.width(i), ld_, block.width(i), buffers.rows + r0 * ld_, ld_);
    }
    const int64_t to = row_index(p_, block.b, block.head, block.begin) * p_.head_size;
    rows_.store_rows(buffers.rows, ld_,
                     {p_.type, static_cast<char*>(p_.out) + to * dtype_size(p_.type),
                      p_.num_heads * p_.head_size, block.count, p_.head_size});
  }

  const MoaAttentionParams& p_;
  const RowBlocks& blocks_;
  const GemmKernels<T>& k_;
  const RowKernels<T>& rows_ = row_kernels<T>();
  const AttentionKernels<T>& attention_ = attention_kernels<T>();
  Products<T> tiles_;
  int narrow_;
  int64_t panel_rows_, features_, ld_;
};

template <class T>
void forward(const MoaAttentionParams& p, const Parallel& par) {
  const RowBlocks blocks(p, batch_invariant());
  const Forward<T> attention(p, blocks);
  const int64_t heads = p.batch * p.num_heads;
  // An item copies its keys and values once. Rows do not depend on each other, so items may be as
  // many as the threads want.
  const int64_t wanted = par.num_threads > 1 ? 8 * par.num_threads : 1;
  const int64_t chunks = std::clamp<int64_t>(ceil_div(wanted, heads), 1, blocks.count());
  const std::vector<int64_t> cuts = cut_row_blocks(p, blocks, chunks);
  const double cost = static_cast<double>(p.batch * p.num_heads * p.num_tokens) *
                      static_cast<double>(p.num_slots * p.num_keys * p.head_size) / 8;
  parallel_items(par, heads * chunks, cost, [&](int64_t item) {
    const int64_t head = item / chunks, chunk = item % chunks;
    if (cuts[chunk] == cuts[chunk + 1]) return;
    attention.run(head / p.num_heads, head % p.num_heads, cuts[chunk], cuts[chunk + 1]);
  });
}

}  // namespace
}  // namespace attention

void moa_attention(const MoaAttentionParams& p, const Parallel& par) {
  p.type == DType::kFloat64 ? attention::forward<double>(p, par)
                            : attention::forward<float>(p, par);
}

}  // namespace moe_ops::cpu
