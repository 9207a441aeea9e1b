// Description of a grouped GEMM: its operands and their layouts. heuristics.h chooses how it runs.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/kernels/gemm.h"
#include "cpu/kernels/rows.h"
#include "cpu/runtime/workspace.h"
#include "moe_ops/batch_invariant.h"
#include "moe_ops/grouped_gemm.h"

namespace moe_ops::cpu {

inline const void* row_of(const Rows& rows, int64_t r) {
  const int64_t i = rows.index != nullptr ? rows.index[r] : r;
  return static_cast<const char*>(rows.data) + i * rows.stride * dtype_size(rows.type);
}

inline const char* element(const void* base, DType type, int64_t offset) {
  return static_cast<const char*>(base) + offset * dtype_size(type);
}

inline int64_t bits_of(const ExpertMatrices& m) {
  return m.quant.bits != 0 ? m.quant.bits : 8 * dtype_size(m.type);
}

// Returns the address of expert e's weight at row o and step k; strides are in elements, and 4-bit
// elements share bytes.
inline const char* weights_at(const ExpertMatrices& m, int64_t e, int64_t o, int64_t k) {
  const int64_t offset = e * m.stride_e + o * m.stride_o + k * m.stride_k;
  return static_cast<const char*>(m.data) + offset * bits_of(m) / 8;
}

// Returns the bias of expert e, or nullptr.
inline const void* vector_of(const ExpertVectors& v, int64_t e) {
  return v.data == nullptr ? nullptr : element(v.data, v.type, e * v.stride_e);
}

inline const float* scales_at(const ExpertMatrices& m, int64_t e, int64_t o) {
  return m.quant.scale + e * m.quant.scale_stride_e + o * m.quant.scale_stride_o;
}

// Returns the length of equal parts of n, at most `most` and a multiple of `unit`.
inline int64_t balanced(int64_t n, int64_t most, int64_t unit) {
  const int64_t parts = ceil_div(n, most);
  return std::min(n, round_up(ceil_div(n, parts), unit));
}

// Sizes of a product, whatever its operands. Features come in one or two segments of `features`
// each: two when the gate and up halves of a fused projection are wanted side by side.
struct GemmProblem {
  const int32_t* expert_offsets;
  int64_t num_experts;
  int64_t features;          // per segment
  int segments = 1;          // segment s starts at row s * features of b
  int64_t feature_unit = 1;  // cuts between items fall on multiples of this
  int64_t in_features;
  // If true, a row's result must not depend bitwise on its expert's row count.
  bool invariant = batch_invariant();
  bool one_chain = false;  // GroupedGemmParams::one_chain

  // Returns the number of elementary operations, in units of about a nanosecond.
  double cost() const {
    return static_cast<double>(expert_offsets[num_experts]) *
           static_cast<double>(features * segments) * (static_cast<double>(in_features) / 16 + 1);
  }
};

template <class T>
struct GemmDesc : GemmProblem {
  Rows a;
  const T* a_scale = nullptr;      // [rows] or nullptr
  const float* k_scale = nullptr;  // [in_features] or nullptr; where b.quant has bits
  ExpertMatrices b;
};

// Converts src * scale to bfloat16; `buffer` has room for n floats.
inline void load_bf16_row(DType type, const void* src, int64_t n, float scale, float* buffer,
                          uint16_t* dst) {
  if (type == DType::kBFloat16 && scale == 1.0f) {
    std::memcpy(dst, src, static_cast<size_t>(n) * 2);
  } else if (type == DType::kFloat32 && scale == 1.0f) {
    row_kernels<float>().store_row(DType::kBFloat16, static_cast<const float*>(src), dst, n);
  } else {
    row_kernels<float>().load_row(type, src, buffer, n, scale);
    row_kernels<float>().store_row(DType::kBFloat16, buffer, dst, n);
  }
}

// Operands of the microkernels: elements of T, to which half types are widened, or pairs of
// bfloat16 of adjacent k, each pair in one element. K counts elements. load() copies row r of the
// tokens, kc elements from k0 on.
struct Wide {
  static constexpr bool kBf16 = false;
  static constexpr int64_t kSteps = 1;  // of k in an element
  template <class T>
  static const auto& row_a(const GemmKernels<T>& k) {
    return k.row_a;
  }
  template <class T>
  static const auto& col_a(const GemmKernels<T>& k) {
    return k.col_a;
  }
  template <class T>
  static void load(const GemmDesc<T>& d, int64_t r, int64_t k0, int64_t kc, T* dst) {
    row_kernels<T>().load_row(d.a.type, element(row_of(d.a, r), d.a.type, k0), dst, kc,
                              d.a_scale ? d.a_scale[r] : T(1));
    if constexpr (sizeof(T) == 4) {
      if (d.k_scale != nullptr) row_kernels<float>().multiply_row(d.k_scale + k0, dst, kc);
    }
  }
};

struct Bf16 {
  static constexpr bool kBf16 = true;
  static constexpr int64_t kSteps = 2;
  static const auto& row_a(const GemmKernels<float>& k) { return k.bf16_row_a; }
  static const auto& col_a(const GemmKernels<float>& k) { return k.bf16_col_a; }
  // Loads a row; the missing half of the last pair is zero.
  static void load(const GemmDesc<float>& d, int64_t r, int64_t k0, int64_t kc, float* dst) {
    auto* halves = reinterpret_cast<uint16_t*>(dst);
    const int64_t n = std::min(2 * kc, d.in_features - 2 * k0);
    const char* src = element(row_of(d.a, r), d.a.type, 2 * k0);
    load_bf16_row(d.a.type, src, n, 1.0f, nullptr, halves);
    if (n < 2 * kc) halves[n] = 0;
  }
};

// Return the bytes of an element of weights, and whether weights have to be widened to T.
template <class Op, class T>
int64_t element_bytes(const GemmDesc<T>& d) {
  return Op::kBf16 ? static_cast<int64_t>(sizeof(T)) : dtype_size(d.b.type);
}
template <class Op, class T>
bool widens(const GemmDesc<T>& d) {
  return !Op::kBf16 && d.b.type != kAccumulate<T>;
}

}  // namespace moe_ops::cpu
