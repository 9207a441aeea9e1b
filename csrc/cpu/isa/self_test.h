// Declarations that the two halves of the self-test share (isa/self_test.cpp describes it).
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/isa/isa.h"
#include "cpu/isa/tuning.h"
#include "cpu/kernels/kernels.h"

namespace moe_ops::cpu {

inline const Tables& portable_tables() {
  static const Tables t = tables_for(Isa::kPortable, tuning());
  return t;
}

// Returns multiples of 1/64 below 1, which every type represents exactly.
inline float number(int64_t i) { return static_cast<float>((i * 37 + i / 11 * 5) % 128 - 64) / 64; }

// Returns a matrix [rows][cols] of a type whose element (r, c) is at(r, c).
template <class At>
std::vector<char> matrix(DType type, int64_t rows, int64_t cols, const At& at) {
  std::vector<float> wide(rows * cols);
  for (int64_t i = 0; i < rows * cols; ++i) wide[i] = at(i / cols, i % cols);
  std::vector<char> out(rows * cols * dtype_size(type) + 64);
  auto* doubles = reinterpret_cast<double*>(out.data());
  if (type == DType::kFloat64) std::copy(wide.begin(), wide.end(), doubles);
  if (type != DType::kFloat64) {
    portable_tables().f32.rows.store_row(type, wide.data(), out.data(), rows * cols);
  }
  return out;
}

// Tests products with every algorithm, and tiles of every size (gemm/self_test.cpp); returns the
// name of one that is wrong, or nullptr. poison: overwrites scratch memory, so that an earlier
// result cannot pass for the next one.
template <class T>
const char* failing_product(const Kernels<T>& kernels, DType type, bool poison);

}  // namespace moe_ops::cpu
