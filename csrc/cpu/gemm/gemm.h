// The grouped product: the items of plan.h, each on its way through the kernels.
#pragma once

#include "cpu/gemm/amx.h"
#include "cpu/gemm/plan.h"
#include "cpu/gemm/quant.h"
#include "cpu/gemm/stream.h"
#include "cpu/gemm/tiles.h"

namespace moe_ops::cpu {

// next: the item that this thread is likely to take after this one, or nullptr.
template <class T, class Epilogue>
void run_item(const GemmDesc<T>& d, const GemmKernels<T>& k, const GemmItem& it,
              const GemmItem* next, const Epilogue& fn) {
  switch (it.path) {
    case Path::kZero: {
      const int64_t n = it.feature_end - it.feature_begin;
      ScratchScope scratch;
      T* zeros = scratch.take<T>(Scratch::kTile, 2 * n);
      for (int64_t r = it.row_begin; r < it.row_end; ++r) {
        std::fill(zeros, zeros + 2 * n, T(0));
        fn(it.expert, r, it.feature_begin, n, zeros, zeros + n);
      }
      return;
    }
    case Path::kDot:
      return dot_item<false>(d, k, it, fn);
    case Path::kRank:
      return rank_item<false>(d, k, it, fn);
    case Path::kPairDot:
      if constexpr (sizeof(T) == 4) dot_item<true>(d, k, it, fn);
      return;
    case Path::kPairRank:
      if constexpr (sizeof(T) == 4) rank_item<true>(d, k, it, fn);
      return;
    case Path::kPack:
      return pack_item<false>(d, k, it, fn);
    case Path::kNn:
      return nn_item<false>(d, k, it, next, fn);
    case Path::kPanels:
      return panel_item<false>(d, k, it, fn);
    case Path::kStrip:
      return strip_item<false>(d, k, it, fn);
    case Path::kPairStrip:
      if constexpr (sizeof(T) == 4) strip_item<true>(d, k, it, fn);
      return;
    case Path::kPairPack:
      if constexpr (sizeof(T) == 4) pack_item<true>(d, k, it, fn);
      return;
    case Path::kPairNn:
      if constexpr (sizeof(T) == 4) nn_item<true>(d, k, it, next, fn);
      return;
    case Path::kPairPanels:
      if constexpr (sizeof(T) == 4) panel_item<true>(d, k, it, fn);
      return;
    case Path::kAmxPanels:
      if constexpr (sizeof(T) == 4) amx_panel_item(d, k, it, fn);
      return;
    case Path::kAmxRows:
      if constexpr (sizeof(T) == 4) amx_rows_item(d, k, it, fn);
      return;
    case Path::kAmxNn:
      if constexpr (sizeof(T) == 4) amx_nn_item(d, k, it, fn);
      return;
    case Path::kQuant8:
      if constexpr (sizeof(T) == 4) quant8_item(d, k, it, fn);
      return;
    case Path::kQuant4:
      if constexpr (sizeof(T) == 4) quant4_item(d, k, it, fn);
      return;
    case Path::kQuantPanels:
      if constexpr (sizeof(T) == 4) quant_panel_item<Activations::kFloat>(d, k, it, fn);
      return;
    case Path::kCodePanels:
      if constexpr (sizeof(T) == 4) quant_panel_item<Activations::kInt16>(d, k, it, fn);
      return;
    case Path::kBytePanels:
      if constexpr (sizeof(T) == 4) quant_panel_item<Activations::kInt8>(d, k, it, fn);
      return;
  }
}

// The item that a thread is likely to take after item i: threads claim them in turns.
inline const GemmItem* next_item(const std::vector<GemmItem>& items, int64_t i,
                                 const Parallel& par) {
  const size_t next = static_cast<size_t>(i) + static_cast<size_t>(std::max(1, par.num_threads));
  return next < items.size() ? &items[next] : nullptr;
}

// Elementary operations, in units of about a nanosecond.
template <class T>
double gemm_cost(const GemmDesc<T>& d) {
  return static_cast<double>(d.expert_offsets[d.num_experts]) *
         static_cast<double>(d.features * d.segments) *
         (static_cast<double>(d.in_features) / 16 + 1);
}

template <class T, class Epilogue>
void gemm(const GemmDesc<T>& d, const Parallel& par, const Epilogue& fn) {
  const GemmKernels<T>& k = gemm_kernels<T>();
  const std::vector<GemmItem> items = gemm_items(d, k, par.num_threads);
  parallel_items(par, static_cast<int64_t>(items.size()), gemm_cost(d),
                 [&](int64_t i) { run_item(d, k, items[i], next_item(items, i, par), fn); });
}

}  // namespace moe_ops::cpu
