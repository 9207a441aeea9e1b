// A product cut into work items: rows of one expert times a range of features.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/gemm/desc.h"
#include "cpu/gemm/heuristics.h"
#include "cpu/runtime/parallel.h"

namespace moe_ops::cpu {

struct GemmItem {
  GemmConfig config;
  int64_t expert, row_begin, row_end, feature_begin, feature_end;
};

// Items of features [first, last) of each segment; choose(rows) is the configuration of an expert
// with so many.
template <class Choose>
std::vector<GemmItem> gemm_items(const GemmProblem& d, int num_threads, int64_t first, int64_t last,
                                 const Choose& choose) {
  const int64_t E = d.num_experts, wide = last - first, total = wide * d.segments;
  int64_t active = 0;
  for (int64_t e = 0; e < E; ++e) active += d.expert_offsets[e + 1] > d.expert_offsets[e];
  std::vector<GemmItem> items;
  if (wide == 0) return items;
  for (int64_t e = 0; e < E; ++e) {
    const int64_t begin = d.expert_offsets[e], end = d.expert_offsets[e + 1];
    if (begin == end) continue;
    const GemmConfig c = choose(end - begin);
    const int64_t row_blocks = ceil_div(end - begin, c.rows);
    const int64_t rows = balanced(end - begin, c.rows, c.row_unit);
    // Enough items that the last ones to finish do not leave the other threads idle for long.
    int64_t feature_blocks = ceil_div(total, c.features);
    if (num_threads > 1) {
      const int64_t wanted = ceil_div<int64_t>(8 * num_threads, active * row_blocks);
      feature_blocks = std::max(feature_blocks, std::min(wanted, std::max<int64_t>(1, total / 64)));
    }
    const int64_t features = balanced(wide, std::max<int64_t>(1, ceil_div(wide, feature_blocks)),
                                      std::max(d.feature_unit, c.feature_unit));
    for (int64_t f = first; f < last; f += features) {
      for (int64_t r = begin; r < end; r += rows) {
        items.push_back({c, e, r, std::min(end, r + rows), f, std::min(last, f + features)});
      }
    }
  }
  return items;
}

// The item that a thread is likely to take after item i: threads claim them in turns.
inline const GemmItem* next_item(const std::vector<GemmItem>& items, int64_t i,
                                 const Parallel& par) {
  const size_t next = static_cast<size_t>(i) + static_cast<size_t>(std::max(1, par.num_threads));
  return next < items.size() ? &items[next] : nullptr;
}

// Hands the epilogue zeros, where nothing is summed over. Every algorithm calls its epilogue as
// fn(expert, row, feature_begin, n, T* values0, T* values1), where values1 is the second segment;
// it may overwrite the values.
template <class T, class Epilogue>
void zero_item(const GemmItem& it, const Epilogue& fn) {
  const int64_t n = it.feature_end - it.feature_begin;
  ScratchScope scratch;
  T* zeros = scratch.take<T>(Scratch::kTile, 2 * n);
  for (int64_t r = it.row_begin; r < it.row_end; ++r) {
    std::fill(zeros, zeros + 2 * n, T(0));
    fn(it.expert, r, it.feature_begin, n, zeros, zeros + n);
  }
}

}  // namespace moe_ops::cpu
