// grouped_gemm: the ragged-M product of rows sorted by expert with one matrix an expert;
// grouped_gemm_wgrad: its weight gradient (ragged K); grouped_sum: its bias gradient.
#pragma once

#include <cstdint>
#include <utility>

#include "moe_ops/common.h"

namespace moe_ops {

// Rows of a matrix; row r of the permuted order is row index[r] of `data` (r itself when index is
// nullptr). Every row is dense.
struct Rows {
  const void* data = nullptr;
  DType type = DType::kFloat32;
  int64_t stride = 0;  // elements between rows
  const int32_t* index = nullptr;
};

struct MutableRows {
  void* data = nullptr;
  DType type = DType::kFloat32;
  int64_t stride = 0;
  const int32_t* index = nullptr;
};

// Weights of few bits with scales. Two formats with float32 scales have kernels of integers on
// every device. bits = 8: int8, one scale a row. bits = 4: two a byte, the even k in the low
// nibble, stored as q + 8; one scale for each `group` steps of k. The CPU has such kernels for all
// int4, mxfp4 and nvfp4. In all others, and wherever the matrix is transposed, weights become
// floats on the way (cpu/gemm/dequant.h).
struct QuantFormat {
  int bits = 0;  // 0: the weights are numbers of their own
  int64_t group = 0;
  const float* scale = nullptr;                    // for the kernels of the two formats
  int64_t scale_stride_e = 0, scale_stride_o = 0;  // in scales, or bytes
  Codes codes = Codes::kInt8;
  ScaleType scale_type = ScaleType::kFloat32;
  const void* scales = nullptr;   // `scale`, or that of another format
  int64_t scale_rows = 1;         // rows of weights that share a row of scales
  const uint8_t* zero = nullptr;  // kInt4: zero points, one a scale; nullptr: 8
  bool has_kernels = true;        // one of the two formats
  bool exact = false;             // tokens are not rounded
  bool transposed = false;
};

// One matrix [O, K] an expert, dense along O or along K.
struct ExpertMatrices {
  const void* data = nullptr;
  DType type = DType::kFloat32;
  int64_t stride_e = 0, stride_o = 0, stride_k = 0;  // elements; stride_o or stride_k is 1
  // A copy of the matrices in the order of the kernels (cpu/gemm/prepack.h), or nullptr. Used by
  // products that sum over k; `data` stays valid beside it.
  const void* panels = nullptr;
  // With bits: rows are dense along k, strides count such weights, and type is that of the tokens
  // of the layer, whose precision products may count on.
  QuantFormat quant = {};
};

// Returns the matrices as [E, K, O]; only the strides change.
inline ExpertMatrices transposed(ExpertMatrices m) {
  std::swap(m.stride_o, m.stride_k);
  m.panels = nullptr;
  m.quant.transposed = !m.quant.transposed;
  return m;
}

struct ExpertVectors {
  const void* data = nullptr;  // nullptr: none
  DType type = DType::kFloat32;
  int64_t stride_e = 0;
};

// The accumulate type is double when b is float64, float otherwise.
struct GroupedGemmParams {
  const int32_t* expert_offsets = nullptr;  // [E+1], from 0, never falling
  int64_t num_experts = 0;                  // E
  int64_t out_features = 0;                 // O
  int64_t in_features = 0;                  // K
  Rows a;                                   // [rows, K]
  const void* a_scale = nullptr;            // [rows] in the accumulate type, or nullptr: ones
  ExpertMatrices b;                         // [E, O, K]
  ExpertVectors bias;                       // [E, O]
  MutableRows out;                          // [rows, O]
  // In the batch-invariant mode, a sum over k of weights that are dense along O is one chain in the
  // order of k. Steps whose factor in `a` is zero then leave no trace, wherever they are.
  bool one_chain = false;
};

struct GroupedWgradParams {
  const int32_t* expert_offsets = nullptr;
  int64_t num_experts = 0;
  int64_t out_features = 0;
  int64_t in_features = 0;
  Rows grad;                         // [rows, O]
  const void* grad_scale = nullptr;  // [rows] in the accumulate type, or nullptr
  Rows a;                            // [rows, K]
  const void* a_scale = nullptr;     // [rows] in the accumulate type, or nullptr
  void* out = nullptr;               // [E, O, K] contiguous; every element is written
  DType out_type = DType::kFloat32;
  bool accumulate = false;  // add to out; experts without rows are left alone
};

struct GroupedSumParams {
  const int32_t* expert_offsets = nullptr;
  int64_t num_experts = 0;
  int64_t features = 0;
  Rows rows;                    // [rows, O]
  const void* scale = nullptr;  // [rows] in the accumulate type, or nullptr
  void* out = nullptr;          // [E, O] contiguous
  DType out_type = DType::kFloat32;
};

namespace cpu {
void grouped_gemm(const GroupedGemmParams& p, const Parallel& par);
void grouped_gemm_wgrad(const GroupedWgradParams& p, const Parallel& par);
void grouped_sum(const GroupedSumParams& p, const Parallel& par);
}  // namespace cpu

// On a device the host knows upper bounds only: expert_offsets and maps are read by the kernels,
// and a value that leads outside the rows is clamped or skipped.
namespace cuda {

// Row r of the permuted order is row index[r] / index_divisor of `data` (r itself when index is
// nullptr): row_to_slot with divisor K gives the row's token. A source row outside [0, limit)
// counts as zeros. Every row is dense.
struct DeviceRows {
  const void* data = nullptr;
  DType type = DType::kFloat32;
  int64_t stride = 0;  // elements between rows
  const int32_t* index = nullptr;
  int32_t index_divisor = 1;
  int64_t limit = 0;  // rows of `data`
};

// Destination rows, indexed like DeviceRows; a row outside [0, limit) is not written.
struct MutableDeviceRows {
  void* data = nullptr;
  DType type = DType::kFloat32;
  int64_t stride = 0;
  const int32_t* index = nullptr;
  int32_t index_divisor = 1;
  int64_t limit = 0;
};

// One factor a row in the accumulate type: data[index[r]], or data[r] without an index. A position
// outside [0, limit) counts as zero. data == nullptr: ones.
struct RowScale {
  const void* data = nullptr;
  const int32_t* index = nullptr;
  int64_t limit = 0;
};

// out[r] = scale(r) * b[e(r)] a[r] + bias[e(r)]. a and bias have b's type; out has b's type or the
// accumulate type.
struct GroupedGemmParams {
  const int32_t* expert_offsets = nullptr;  // [E+1]
  int64_t num_experts = 0;                  // E
  int64_t num_rows = 0;                     // N, at least expert_offsets[E]
  int64_t out_features = 0;                 // O
  int64_t in_features = 0;                  // K
  DeviceRows a;                             // [N, K]
  RowScale a_scale;                         // [N]
  ExpertMatrices b;                         // [E, O, K]; panels and quant are not used
  ExpertVectors bias;                       // [E, O]
  MutableDeviceRows out;                    // [N, O]
  bool zero_tail = true;  // rows from expert_offsets[E] on become zero; otherwise they stay
};

// out[e] = sum over rows r of e of scale(r) * grad[r]^T a[r]; scale is grad_scale * a_scale.
struct GroupedWgradParams {
  const int32_t* expert_offsets = nullptr;
  int64_t num_experts = 0;
  int64_t num_rows = 0;
  int64_t out_features = 0;
  int64_t in_features = 0;
  DeviceRows grad;  // [N, O]
  RowScale grad_scale;
  DeviceRows a;  // [N, K], of grad's type
  RowScale a_scale;
  void* out = nullptr;               // [E, O, K] contiguous; every element is written
  DType out_type = DType::kFloat32;  // grad's type or the accumulate type
  bool accumulate = false;           // add to out; experts without rows are left alone
};

struct GroupedSumParams {
  const int32_t* expert_offsets = nullptr;
  int64_t num_experts = 0;
  int64_t num_rows = 0;
  int64_t features = 0;
  DeviceRows rows;  // [N, O]
  RowScale scale;
  void* out = nullptr;               // [E, O] contiguous
  DType out_type = DType::kFloat32;  // rows' type or the accumulate type
};

Status grouped_gemm(const GroupedGemmParams& p, Stream stream);
Status grouped_gemm_wgrad(const GroupedWgradParams& p, Stream stream);
Status grouped_sum(const GroupedSumParams& p, Stream stream);

}  // namespace cuda

}  // namespace moe_ops
