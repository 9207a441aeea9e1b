// One row to codes of e4m3 and scales. Shared by quantize_fp8 and moe_ffn_fp8.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/kernels/fp8.h"
#include "cpu/kernels/rows.h"

namespace moe_ops::cpu {

// Columns that quantize_fp8_columns transposes at once.
constexpr int64_t kFp8Columns = 64;

// Quantizes n values of any type but float64 to q [n] with scale [ceil(n / 128)].
inline void quantize_fp8_row(DType type, const void* x, int64_t n, uint8_t* q, float* scale) {
  const char* src = static_cast<const char*>(x);
  float wide[kFp8Block];
  for (int64_t i = 0; i < n; i += kFp8Block) {
    const int64_t count = std::min(kFp8Block, n - i);
    const float* values = wide;
    if (type == DType::kFloat32) {
      values = reinterpret_cast<const float*>(src) + i;
    } else {
      row_kernels<float>().load_row(type, src + i * dtype_size(type), wide, count, 1.0f);
    }
    scale[i / kFp8Block] = fp8_kernels().quantize(values, count, q + i);
  }
}

}  // namespace moe_ops::cpu
