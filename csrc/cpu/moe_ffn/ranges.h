// Ranges of features of an FFN block's last product, and the tasks that compute and sum one range
// after the other; forward and backward share them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/gemm/blocking.h"
#include "cpu/gemm/gemm.h"
#include "cpu/gemm/routed_rows.h"
#include "moe_ops/moe_ffn.h"

namespace moe_ops::cpu {

// Features [begin, end) that are computed and summed by token together (kRangeBytes).
struct Range {
  int64_t begin, end;
  int64_t width() const { return end - begin; }
};

// Cuts the H features of `rows` rows into ranges that are multiples of `narrowest` wide.
template <class T>
std::vector<Range> feature_ranges(const MoeFfnDesc& s, int64_t rows, int64_t narrowest) {
  const int64_t row_bytes = std::max<int64_t>(1, rows) * static_cast<int64_t>(sizeof(T));
  const int64_t width = std::max(narrowest, kRangeBytes / row_bytes / narrowest * narrowest);
  std::vector<Range> ranges;
  for (int64_t f = 0; f < s.hidden_size; f += width) {
    ranges.push_back({f, std::min(f + width, s.hidden_size)});
  }
  return ranges;
}

// Returns the parameters that sum the rows of a range, [rows, width], by token.
template <class T>
UnpermuteParams combine_params(const MoeFfnDesc& s, const Range& range, const T* rows,
                               bool weighted, void* y, DType y_type) {
  UnpermuteParams u = combination(s.routing, rows, kAccumulate<T>, range.width(),
                                  weighted ? s.topk_weights : nullptr,
                                  static_cast<char*>(y) + range.begin * dtype_size(y_type), y_type);
  u.y_stride = s.hidden_size;
  return u;
}

// Adds the tasks that compute each range, and those that read its rows, to a task graph.
class RangeTasks {
 public:
  RangeTasks(TaskGraph& stages, size_t ranges)
      : stages_(stages), computed_(ranges), read_(ranges) {}

  // Adds the product `d` of range i. ready(expert) waits for the operands of an expert's items, and
  // returns false if another item failed; keep(range, expert, row, feature, n, values) stores
  // values.
  template <class T, class Ready, class Keep>
  void product(size_t i, const Range& range, const GemmDesc<T>& d, const GemmKernels<T>& k,
               const Parallel& par, const Ready& ready, const Keep& keep) {
    std::vector<GemmItem> items = gemm_items(d, par.num_threads, range.begin, range.end);
    const auto n = static_cast<int64_t>(items.size());
    const double share = static_cast<double>(range.width()) / static_cast<double>(d.features);
    computed_[i].add(n);
    stages_.add(n, d.cost() * share, [=, this, &d, &k, &par, items = std::move(items)](int64_t j) {
      if (i > 0 && !stages_.wait(read_[i - 1])) return;
      if (!ready(items[j].expert)) return;
      run_item(d, k, items[j], next_item(items, j, par),
               [&](int64_t e, int64_t r, int64_t f, int64_t count, T* v, T*) {
                 keep(range, e, r, f, count, v);
               });
      computed_[i].done();
    });
  }

  // Adds n tasks fn(j), of `cost` in all, that read the rows of range i.
  template <class Fn>
  void reader(size_t i, int64_t n, double cost, const Fn& fn) {
    read_[i].add(n);
    stages_.add(n, cost, [=, this](int64_t j) {
      if (!stages_.wait(computed_[i])) return;
      fn(j);
      read_[i].done();
    });
  }

  // Adds the tasks that sum the rows of range i by token.
  void combine(size_t i, const UnpermuteParams& u) {
    const double cost = unpermute_cost(u);
    const int64_t chunk = std::max<int64_t>(1, chunk_length(u.num_tokens, cost));
    reader(i, ceil_div(u.num_tokens, chunk), cost * static_cast<double>(u.num_tokens),
           [u, chunk](int64_t j) {
             unpermute_tokens(u, j * chunk, std::min(u.num_tokens, (j + 1) * chunk));
           });
  }

 private:
  TaskGraph& stages_;
  std::vector<Latch> computed_, read_;  // items that are not done, by range
};

// Returns a product of all experts' rows `a` with their matrices `b`.
template <class T>
GemmDesc<T> gemm_desc(const MoeFfnDesc& s, int64_t features, int64_t in_features, const Rows& a,
                      const ExpertMatrices& b) {
  GemmDesc<T> d;
  d.expert_offsets = s.routing.expert_offsets;
  d.num_experts = s.routing.num_experts;
  d.features = features;
  d.in_features = in_features;
  d.a = a;
  d.b = b;
  return d;
}

}  // namespace moe_ops::cpu
