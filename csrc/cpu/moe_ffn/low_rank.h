// Low-rank terms of an FFN block: products with factors, as tasks of its graph, their sum into the
// tiles of the products with weights, and the gradients of factors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/gemm/desc.h"
#include "cpu/kernels/low_rank.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/workspace.h"
#include "moe_ops/moe_ffn.h"

namespace moe_ops::cpu {

// A factor by rows of the rank: [G, r, n], or [1, r, n] for all rows.
template <class T>
struct Factor {
  const T* data = nullptr;
  int64_t rank = 0, length = 0;
  bool shared = false;
};

// Rows [N, r] that a product with a factor writes.
template <class T>
struct LowRows {
  T* data = nullptr;
  Latch left;  // items that are not done
};

// Gradient of a factor: the sum over a group's rows of scale * low^T rows, [G, r, n], or its
// transpose.
template <class T>
struct FactorGradient {
  const T* low;    // [N, r]
  int64_t rank;    // r
  Rows rows;       // [N, n]
  int64_t length;  // n
  const T* scale;  // [N] or nullptr: ones
  bool shared;     // one factor for all rows
  bool transpose;  // the result is [G, n, r]
  void* out;       // nullptr: not wanted
};

// The terms of one call, and the groups of its rows.
template <class T>
class LowRank {
 public:
  // params: nullptr if the call has no terms. outputs: features of w_gate_up and w_down.
  LowRank(const LowRankParams* params, const MoeFfnDesc& desc, bool backward, const Parallel& par,
          ScratchScope& scratch)
      : p_(params), num_experts_(desc.routing.num_experts), rows_(desc.routing.num_valid_rows()) {
    if (p_ == nullptr) return;
    const int64_t H = desc.hidden_size, I = desc.intermediate_size, width = desc.width();
    const auto size = [&](const LowRankFactors& f, int64_t outputs) {
      return f.rank * outputs * groups(f.b_shared);
    };
    const int64_t products = backward ? rows_ * (p_->gate_up.rank + p_->down.rank) : 0;
    const int64_t values = size(p_->gate_up, width) + size(p_->down, H) + products;
    Arena arena(scratch, Scratch::kLowRank,
                rows_ * 4 + values * static_cast<int64_t>(sizeof(T)) + 5 * 64);
    group_ = arena.take<int32_t>(rows_);
    for (int64_t g = 0; g < p_->num_groups; ++g) {
      std::fill(group_ + p_->group_offsets[g], group_ + p_->group_offsets[g + 1],
                static_cast<int32_t>(g));
    }
    all_rows_[1] = static_cast<int32_t>(rows_);
    a_up = {static_cast<const T*>(p_->gate_up.a), p_->gate_up.rank, H, p_->gate_up.a_shared};
    a_down = {static_cast<const T*>(p_->down.a), p_->down.rank, I, p_->down.a_shared};
    b_up = transposed(p_->gate_up, width, arena.take<T>(size(p_->gate_up, width)), par);
    b_down = transposed(p_->down, H, arena.take<T>(size(p_->down, H)), par);
    if (!backward) return;
    low_pre = arena.take<T>(rows_ * p_->gate_up.rank);
    low_out = arena.take<T>(rows_ * p_->down.rank);
  }

  // The factors, b transposed.
  Factor<T> a_up, b_up, a_down, b_down;
  // Backward: memory [N, r] for the products of the pre-activation's and the output's gradients.
  T *low_pre = nullptr, *low_out = nullptr;

  // Adds the tasks of out = scale * row_scale * (rows times a factor); they wait for ready(expert).
  // scale: [N] or nullptr: ones.
  template <class Ready>
  void add_product(TaskGraph& stages, const Rows& rows, const T* scale, const Factor<T>& factor,
                   LowRows<T>& out, const Ready& ready) const {
    std::vector<Item> items = items_of(factor.shared);
    const auto count = static_cast<int64_t>(items.size());
    out.left.add(count);
    const double cost =
        static_cast<double>(rows_ * factor.rank) * (static_cast<double>(factor.length) / 16.0 + 1);
    stages.add(count, cost, [=, this, &out, items = std::move(items)](int64_t i) {
      const Item& it = items[i];
      if (!wait(it.group, factor.shared, ready)) return;
      const void* pointers[kItemRows];
      for (int64_t r = it.begin; r < it.end; ++r) pointers[r - it.begin] = row_of(rows, r);
      T* to = out.data + it.begin * factor.rank;
      k_.product({rows.type, pointers, it.end - it.begin, factor.length},
                 factor.data + it.group * factor.rank * factor.length, factor.rank, to);
      for (int64_t r = it.begin; r < it.end; ++r, to += factor.rank) {
        T s = static_cast<const T*>(p_->row_scale)[r];
        if (scale != nullptr && s != T(0)) s *= scale[r];
        for (int64_t j = 0; j < factor.rank; ++j) to[j] = s == T(0) ? T(0) : s * to[j];
      }
      out.left.done();
    });
  }

  // Adds the features [f, f + n) of a row's term, low times a factor, to `values`.
  void add_term(const LowRows<T>& low, const Factor<T>& factor, int64_t r, int64_t f, int64_t n,
                T* values) const {
    const int64_t group = factor.shared ? 0 : group_[r];
    const T* from = factor.data + group * factor.rank * factor.length + f;
    const T* weights = low.data + r * factor.rank;
    for (int64_t j = 0; j < factor.rank; j += kTermRows) {
      const int64_t count = std::min(kTermRows, factor.rank - j);
      const void* rows[kTermRows + 1] = {values};
      T scales[kTermRows + 1] = {T(1)};
      for (int64_t i = 0; i < count; ++i) {
        rows[i + 1] = from + (j + i) * factor.length;
        scales[i + 1] = weights[j + i];
      }
      row_k_.weighted_sum({kAccumulate<T>, rows, count + 1, n}, scales, values);
    }
  }

  // Adds the tasks of a factor's gradient. They wait for ready(expert), and `readers` counts those
  // that are not done.
  template <class Ready>
  void add_gradient(TaskGraph& stages, const FactorGradient<T>& g, Latch& readers,
                    const Ready& ready) const {
    if (g.out == nullptr) return;
    const int64_t blocks = ceil_div(g.length, kBlock), count = groups(g.shared) * blocks;
    const double cost = static_cast<double>(g.rank * g.length) *
                        (static_cast<double>(rows_) / 16.0 + static_cast<double>(count / blocks));
    readers.add(count);
    stages.add(count, cost, [=, this, &readers](int64_t i) {
      if (!wait(i / blocks, g.shared, ready)) return;
      run_gradient(g, i / blocks, i % blocks * kBlock);
      readers.done();
    });
  }

 private:
  // Rows [begin, end) of a group.
  struct Item {
    int64_t group, begin, end;
  };
  static constexpr int64_t kItemRows = 64;  // at most, of a product
  static constexpr int64_t kTermRows = 16;  // rows of a factor that are summed in one pass
  static constexpr int64_t kBlock = 512;    // features of an item of a gradient

  const int32_t* offsets(bool shared) const { return shared ? all_rows_ : p_->group_offsets; }
  int64_t groups(bool shared) const { return shared ? 1 : p_->num_groups; }

  // Returns factor b by rows of the rank, for groups with rows.
  Factor<T> transposed(const LowRankFactors& f, int64_t outputs, T* to, const Parallel& par) const {
    const int64_t size = f.rank * outputs;
    const T* from = static_cast<const T*>(f.b);
    parallel_items(par, size == 0 ? 0 : groups(f.b_shared), static_cast<double>(size),
                   [&](int64_t g) {
                     if (offsets(f.b_shared)[g] == offsets(f.b_shared)[g + 1]) return;
                     k_.transpose(from + g * size, f.rank, outputs, f.rank, to + g * size, outputs);
                   });
    return {to, f.rank, outputs, f.b_shared};
  }

  std::vector<Item> items_of(bool shared) const {
    std::vector<Item> items;
    for (int64_t g = 0; g < groups(shared); ++g) {
      const int64_t end = offsets(shared)[g + 1];
      for (int64_t r = offsets(shared)[g]; r < end; r += kItemRows) {
        items.push_back({g, r, std::min(r + kItemRows, end)});
      }
    }
    return items;
  }

  // Computes features [f, f + kBlock) of the gradient of a group's factor.
  void run_gradient(const FactorGradient<T>& g, int64_t group, int64_t f) const {
    const int64_t begin = offsets(g.shared)[group], count = offsets(g.shared)[group + 1] - begin;
    const int64_t n = std::min(kBlock, g.length - f);
    ScratchScope scratch;
    Arena arena(scratch, Scratch::kTile,
                count * (8 + g.rank * static_cast<int64_t>(sizeof(T))) +
                    g.rank * kBlock * static_cast<int64_t>(sizeof(T)) + 3 * 64);
    const void** rows = arena.take<const void*>(count);
    T* scaled = arena.take<T>(count * g.rank);
    T* sums = arena.take<T>(g.rank * kBlock);
    for (int64_t r = 0; r < count; ++r) {
      rows[r] = element(row_of(g.rows, begin + r), g.rows.type, f);
      const T scale = g.scale == nullptr ? T(1) : g.scale[begin + r];
      const T* low = g.low + (begin + r) * g.rank;
      for (int64_t j = 0; j < g.rank; ++j) scaled[r * g.rank + j] = low[j] * scale;
    }
    k_.gradient({g.rows.type, rows, count, n}, scaled, g.rank, sums);
    T* out = static_cast<T*>(g.out) + group * g.rank * g.length;
    if (g.transpose) {
      k_.transpose(sums, n, g.rank, n, out + f * g.rank, g.rank);
    } else {
      for (int64_t j = 0; j < g.rank; ++j) {
        std::copy(sums + j * n, sums + (j + 1) * n, out + j * g.length + f);
      }
    }
  }

  // Waits for the experts of a group. Returns false if another task failed.
  template <class Ready>
  bool wait(int64_t group, bool shared, const Ready& ready) const {
    if (!shared) return ready(group / (p_->num_groups / num_experts_));
    for (int64_t e = 0; e < num_experts_; ++e) {
      if (!ready(e)) return false;
    }
    return true;
  }

  const LowRankParams* p_;
  const LowRankKernels<T>& k_ = low_rank_kernels<T>();
  const RowKernels<T>& row_k_ = row_kernels<T>();
  int64_t num_experts_, rows_;
  int32_t* group_ = nullptr;  // [N]
  int32_t all_rows_[2] = {0, 0};
};

}  // namespace moe_ops::cpu
