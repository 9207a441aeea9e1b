// The grouped product: its work items, each through its algorithm.
#pragma once

#include "cpu/gemm/amx.h"
#include "cpu/gemm/dequant.h"
#include "cpu/gemm/gemv.h"
#include "cpu/gemm/heuristics.h"
#include "cpu/gemm/outer.h"
#include "cpu/gemm/pack_b.h"
#include "cpu/gemm/packed_b.h"
#include "cpu/gemm/quant.h"

namespace moe_ops::cpu {

template <class T>
std::vector<GemmItem> gemm_items(const GemmDesc<T>& d, int num_threads, int64_t first,
                                 int64_t last) {
  GemmShape s = shape_of(d);
  s.range = last - first;
  return gemm_items(
      static_cast<const GemmProblem&>(d), num_threads, first, last,
      [&](int64_t rows) { return choose_config<T>(s, gemm_kernels<T>(), quant_kernels(), rows); });
}

template <class T>
std::vector<GemmItem> gemm_items(const GemmDesc<T>& d, int num_threads) {
  return gemm_items(d, num_threads, 0, d.features);
}

// Algorithms whose operands are those of the microkernels.
template <class Op, class T, class Epilogue>
void run_dense_item(const GemmDesc<T>& d, const GemmKernels<T>& k, const GemmItem& it,
                    const GemmItem* next, const Epilogue& fn) {
  switch (it.config.algorithm) {
    case Algorithm::kGemv:
      return gemv_item<Op>(d, k, it, fn);
    case Algorithm::kGemvBlocked:
      return gemv_blocked_item<Op>(d, k, it, fn);
    case Algorithm::kOuter:
      return outer_item<Op>(d, k, it, fn);
    case Algorithm::kPackBt:
      return pack_bt_item<Op>(d, k, it, fn);
    case Algorithm::kRowMajorB:
      return row_major_item<Op>(d, k, it, next, fn);
    case Algorithm::kPackedB:
      return packed_b_item<Op>(d, k, it, fn);
    default:
      return zero_item<T>(it, fn);
  }
}

template <class Epilogue>
void run_amx_item(const GemmDesc<float>& d, const GemmKernels<float>& k, const GemmItem& it,
                  const Epilogue& fn) {
  switch (it.config.algorithm) {
    case Algorithm::kPackedB:
      return amx_packed_b_item(d, k, it, fn);
    case Algorithm::kRowMajorB:
      return amx_row_major_item(d, k, it, fn);
    default:
      return amx_pack_tokens_item(d, k, it, fn);
  }
}

// Runs an item. next: the item that this thread is likely to take after this one, or nullptr.
template <class T, class Epilogue>
void run_item(const GemmDesc<T>& d, const GemmKernels<T>& k, const GemmItem& it,
              const GemmItem* next, const Epilogue& fn) {
  if constexpr (sizeof(T) == 4) {
    if (it.config.algorithm == Algorithm::kDequant) return dequant_item(d, k, it, std::cref(fn));
    const bool gemv = it.config.algorithm == Algorithm::kGemv;
    switch (it.config.operand) {
      case Operand::kBf16:
        return run_dense_item<Bf16>(d, k, it, next, fn);
      case Operand::kAmx:
        return run_amx_item(d, k, it, fn);
      case Operand::kInt16:
        if (gemv && d.b.quant.has_kernels) return w8_gemv_item(d, k, it, fn);
        return gemv ? grouped_gemv_item(d, k, it, fn)
                    : repack_b_item<Activations::kInt16>(d, k, it, fn);
      case Operand::kInt8:
      case Operand::kTwoInt8:
        return gemv ? grouped_gemv_item(d, k, it, fn)
                    : repack_b_item<Activations::kInt8>(d, k, it, fn);
      case Operand::kDecoded:
      case Operand::kFp8Bf16:
        return decoded_gemv_item(d, k, it, std::cref(fn));
      default:
        break;
    }
    if (it.config.algorithm == Algorithm::kRepackB) {
      return repack_b_item<Activations::kFloat>(d, k, it, fn);
    }
  }
  run_dense_item<Wide>(d, k, it, next, fn);
}

template <class T, class Epilogue>
void gemm(const GemmDesc<T>& d, const Parallel& par, const Epilogue& fn) {
  const GemmKernels<T>& k = gemm_kernels<T>();
  const std::vector<GemmItem> items = gemm_items(d, par.num_threads);
  parallel_items(par, static_cast<int64_t>(items.size()), d.cost(),
                 [&](int64_t i) { run_item(d, k, items[i], next_item(items, i, par), fn); });
}

}  // namespace moe_ops::cpu
