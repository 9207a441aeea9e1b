// quantize_fp8: rows as float8_e4m3fn with one fp32 scale for every 128 columns.
#pragma once

#include <cstdint>

#include "moe_ops/common.h"
#include "moe_ops/grouped_gemm.h"

namespace moe_ops {

// Codes of e4m3 in rows, each dense, with scales [rows, ceil(K / 128)] beside them; row r of the
// permuted order is row index[r] of both (r itself when index is nullptr).
struct Fp8Rows {
  const uint8_t* data = nullptr;
  int64_t stride = 0;
  const float* scale = nullptr;
  int64_t scale_stride = 0;  // the scales of a row are dense
  const int32_t* index = nullptr;
};

// x [num_rows, row_length] of float32, bfloat16 or float16. scale = amax / 448, q = the code
// nearest to x * (448 / amax), ties to even. A block that holds a NaN or an infinity gets the scale
// NaN and codes NaN.
struct QuantizeFp8Params {
  Rows x;  // no index
  int64_t num_rows = 0;
  int64_t row_length = 0;
  uint8_t* q = nullptr;    // [num_rows, row_length] contiguous
  float* scale = nullptr;  // [num_rows, ceil(row_length / 128)] contiguous
};

namespace cpu {
void quantize_fp8(const QuantizeFp8Params& p, const Parallel& par);
}  // namespace cpu

namespace cuda {
Status quantize_fp8(const QuantizeFp8Params& p, Stream stream);
}  // namespace cuda

}  // namespace moe_ops
