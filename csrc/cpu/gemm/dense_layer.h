// The products of dense layers, and how a block that ends with one adds it to the stream.
#pragma once

#include <array>
#include <span>

#include "cpu/kernels/rows.h"
#include "moe_ops/dense_layer.h"

namespace moe_ops::cpu {

// Runs independent grouped GEMMs of one accumulate type in one loop.
void grouped_gemms(std::span<const GroupedGemmParams> all, const Parallel& par);

// A layer and where its product goes: [rows, O], contiguous.
struct DenseProduct {
  const DenseLayer& layer;
  void* out;
};

// Computes out = layer(a) of type `type` for all products in one loop.
template <size_t N>
void multiply(const DenseProduct (&products)[N], const Rows& a, int64_t rows, DType type,
              const Parallel& par) {
  const int32_t offsets[] = {0, static_cast<int32_t>(rows)};
  std::array<GroupedGemmParams, N> all;
  for (size_t i = 0; i < N; ++i) {
    const DenseLayer& layer = products[i].layer;
    GroupedGemmParams& g = all[i];
    g.expert_offsets = offsets;
    g.num_experts = 1;
    g.out_features = layer.out_features;
    g.in_features = layer.in_features;
    g.a = a;
    g.b = layer.weight;
    g.bias = layer.bias;
    g.out = {products[i].out, type, layer.out_features, nullptr};
  }
  grouped_gemms(all, par);
}

inline void multiply(const DenseLayer& layer, const Rows& a, int64_t rows, void* out, DType type,
                     const Parallel& par) {
  multiply({{layer, out}}, a, rows, type, par);
}

// Computes y = residual + factor * row for n elements of `type`, or factor * row if residual is
// nullptr; the row is overwritten.
template <class T>
void add_to_residual(T* row, T factor, const void* residual, DType type, void* y, int64_t n) {
  const RowKernels<T>& k = row_kernels<T>();
  if (factor != T(1)) {
    for (int64_t i = 0; i < n; ++i) row[i] *= factor;
  }
  if (residual != nullptr) k.axpy(type, residual, T(1), row, n);
  k.store_row(type, row, y, n);
}

}  // namespace moe_ops::cpu
