// Routed rows, for the ops that are composed of sort_by_expert, grouped_gemm and unpermute.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/runtime/workspace.h"
#include "moe_ops/grouped_gemm.h"
#include "moe_ops/routing.h"
#include "moe_ops/sort_by_expert.h"
#include "moe_ops/unpermute.h"

namespace moe_ops::cpu {

// Returns the routing with maps; if `given` has none, they are made in the caller's scratch memory.
inline Routing sorted(ScratchScope& scratch, const Routing& given) {
  if (given.sorted()) return given;
  const int64_t E = given.num_experts, N = given.num_slots();
  int32_t* offsets = scratch.take<int32_t>(Scratch::kRouting, E + 1 + 2 * N);
  int32_t *row_to_slot = offsets + E + 1, *slot_to_row = row_to_slot + N;
  sort_by_expert({given, offsets, row_to_slot, slot_to_row, nullptr});
  Routing r = given;
  r.expert_offsets = offsets;
  r.row_to_slot = row_to_slot;
  r.slot_to_row = slot_to_row;
  return r;
}

// Token index of each routed row, and its routing weight if weights were given.
template <class T>
struct RowMaps {
  int32_t* token;
  T* weight;
};

template <class T>
RowMaps<T> row_maps(ScratchScope& scratch, const Routing& r, const void* topk_weights) {
  const int64_t rows = r.num_valid_rows();
  Arena arena(scratch, Scratch::kIndex, rows * static_cast<int64_t>(4 + sizeof(T)) + 2 * 64);
  RowMaps<T> out = {arena.take<int32_t>(rows), nullptr};
  const auto top_k = static_cast<int32_t>(r.top_k);
  for (int64_t row = 0; row < rows; ++row) out.token[row] = r.row_to_slot[row] / top_k;
  if (topk_weights == nullptr) return out;
  out.weight = arena.take<T>(rows);
  const T* weights = static_cast<const T*>(topk_weights);
  for (int64_t row = 0; row < rows; ++row) out.weight[row] = weights[r.row_to_slot[row]];
  return out;
}

// Returns the parameters of out = b a (+ bias) for rows with an expert.
inline GroupedGemmParams routed_product(const Routing& r, const Rows& a, const ExpertMatrices& b,
                                        const ExpertVectors& bias, int64_t out_features,
                                        int64_t in_features, const moe_ops::MutableRows& out) {
  return {r.expert_offsets, r.num_experts, out_features, in_features, a, nullptr, b, bias, out};
}

inline GroupedWgradParams routed_wgrad(const Routing& r, const Rows& grad, int64_t out_features,
                                       const Rows& a, int64_t in_features, void* out,
                                       DType out_type) {
  return {r.expert_offsets, r.num_experts, out_features, in_features, grad, nullptr, a,
          nullptr,          out,           out_type};
}

inline GroupedSumParams routed_sum(const Routing& r, const Rows& rows, int64_t features,
                                   const void* scale, void* out, DType out_type) {
  return {r.expert_offsets, r.num_experts, features, rows, scale, out, out_type};
}

// Returns the parameters of y [T, features] = the sum of each token's rows, weighted by
// topk_weights unless nullptr; rows are contiguous.
inline UnpermuteParams combination(const Routing& r, const void* rows, DType type, int64_t features,
                                   const void* topk_weights, void* y, DType y_type) {
  return {rows,          type,    features,     features, r.num_tokens, r.top_k, r.num_valid_rows(),
          r.slot_to_row, nullptr, topk_weights, y,        y_type};
}

// Sets slots without an expert, `bytes` each, to zero, since no row writes them.
inline void zero_empty_slots(const Routing& r, void* slots, int64_t bytes) {
  if (bytes == 0) return;
  for (int64_t row = r.num_valid_rows(); row < r.num_slots(); ++row) {
    std::memset(static_cast<char*>(slots) + r.row_to_slot[row] * bytes, 0,
                static_cast<size_t>(bytes));
  }
}

}  // namespace moe_ops::cpu
