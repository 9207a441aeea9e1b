// quantize_fp8: rows as float8_e4m3fn with one fp32 scale for every 128 columns;
// quantize_fp8_columns: the rows of experts, transposed, with one for every 128 rows.
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

// Returns an expert's first group when rows are columns in groups of 128 and each expert's first
// group starts with its first row: expert e, whose rows start at `offset`, has its groups from
// fp8_first_group(offset, e) on. No two experts share a group, the place of one needs no sum over
// the others, and N rows of E experts take at most fp8_groups(N, E).
constexpr int64_t fp8_first_group(int64_t offset, int64_t expert) {
  return offset / kFp8Block + expert;
}
constexpr int64_t fp8_groups(int64_t rows, int64_t experts) { return rows / kFp8Block + experts; }

// Row r is row row_to_slot[r] / top_k of x, times topk_weights[row_to_slot[r]], in fp32; r itself
// and 1 where these are nullptr. Column d of a group is quantized as 128 numbers of a row are;
// what has no row counts as zeros.
struct QuantizeFp8ColumnsParams {
  const int32_t* expert_offsets = nullptr;  // [E+1]
  int64_t num_experts = 0;                  // E
  int64_t num_rows = 0;                     // N
  int64_t row_length = 0;                   // D
  Rows x;                                   // [N, D], or [T, D] with row_to_slot; no index
  int64_t num_source_rows = 0;              // N or T
  const int32_t* row_to_slot = nullptr;     // [N]
  int64_t top_k = 1;
  const float* topk_weights = nullptr;  // [T, K]; with row_to_slot
  uint8_t* q = nullptr;                 // [D, 128 G] contiguous, G = fp8_groups(N, E)
  float* scale = nullptr;               // [G, D] contiguous
};

namespace cpu {
void quantize_fp8_columns(const QuantizeFp8ColumnsParams& p, const Parallel& par);
void quantize_fp8(const QuantizeFp8Params& p, const Parallel& par);
}  // namespace cpu

namespace cuda {
Status quantize_fp8_columns(const QuantizeFp8ColumnsParams& p, Stream stream);
Status quantize_fp8(const QuantizeFp8Params& p, Stream stream);
}  // namespace cuda

}  // namespace moe_ops
