// Operations on rows: loads and stores of every element type, sums over rows, norms, rotations.
// Arithmetic is in T, the accumulate type: float for float32, bfloat16 and float16 in memory,
// double for float64.
#pragma once

#include <cstdint>

#include "moe_ops/common.h"

namespace moe_ops::cpu {

// T as a tag.
template <class T>
constexpr DType kAccumulate = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;

// `count` rows of n elements, ld elements apart.
template <class P>
struct TypedRowsOf {
  DType type;
  P* data;
  int64_t ld, count, n;
};
using TypedRows = TypedRowsOf<const void>;
using MutableTypedRows = TypedRowsOf<void>;

// `count` rows of n elements that lie anywhere.
template <class P>
struct RowPointersOf {
  DType type;
  P* const* rows;
  int64_t count, n;
};
using RowPointers = RowPointersOf<const void>;
using MutableRowPointers = RowPointersOf<void>;

// Row t of out, n wide and contiguous, is the sum of weights[t*top_k + s] * rows[i*ld] in the order
// of s, with i = index[t*top_k + s]; those below 0 are left out. weights == nullptr: ones.
template <class T>
struct CombineRows {
  DType type;  // of out
  const T* rows;
  int64_t ld;
  const int32_t* index;
  const T* weights;
  int64_t num_tokens, top_k, n;
  void* out;
};

// add_rms_norm on `rows` contiguous rows of `cols`. moe_ops/add_rms_norm.h says what may be null.
template <class T>
struct NormRows {
  DType type;  // of x, residual, y and sum
  int64_t rows, cols;
  T eps;
  const T *weight, *bias;
  T* wide;  // scratch, [cols]
  const void *x, *residual;
  void *y, *sum;
  T* rstd;
};
template <class T>
struct NormRowsBwd {
  DType type;  // of grad_y, grad_sum, sum and grad_x
  int64_t rows, cols;
  const T* weight;
  const void *grad_y, *grad_sum, *sum;
  const T* rstd;
  void* grad_x;
  T *weight_sum, *bias_sum;  // [cols], added to
};

// Rotates features i and i + half of each of a row's heads by angle i of the row, or by its
// negative (sign -1). cos and sin are [rows, half]; in and out may be the same.
template <class T>
struct RotateRows {
  int64_t rows;
  const T* in;
  int64_t ld_in;
  const T *cos, *sin;
  T sign;
  int64_t heads, half;
  T* out;
  int64_t ld_out;
};

template <class T>
struct RowKernels {
  int lanes;  // elements of T in a vector
  // dst[i] = scale * src[i]
  void (*load_row)(DType type, const void* src, T* dst, int64_t n, T scale);
  void (*load_rows)(const TypedRows& src, T* dst, int64_t ld_dst, T scale);
  void (*store_row)(DType type, const T* src, void* dst, int64_t n);
  void (*store_rows)(const T* src, int64_t ld_src, const MutableTypedRows& dst);
  // store_row with non-temporal stores where the target has them and dst and n are whole cache
  // lines; stream_fence orders them.
  void (*stream_row)(DType type, const T* src, void* dst, int64_t n);
  void (*stream_fence)();
  // dst[r*ld + i] = scales[r] * rows[r][i], and the way back. scales == nullptr: ones.
  void (*gather_rows)(const RowPointers& rows, const T* scales, T* dst, int64_t ld);
  void (*scatter_rows)(const T* src, int64_t ld, const T* scales, const MutableRowPointers& rows);
  void (*combine_rows)(const CombineRows<T>& p);
  // out[r] = the sum over i of a[r][i] * b[r*ld + i]
  void (*dot_rows)(const RowPointers& a, const T* b, int64_t ld, T* out);
  T (*dot_row)(DType a_type, const void* a, DType b_type, const void* b, int64_t n);
  // out[i] = sum_r weights[r] * rows[r][i], in the order of r; weights == nullptr: ones.
  void (*weighted_sum)(const RowPointers& rows, const T* weights, T* out);
  // acc[i] += scale * row[i]
  void (*axpy)(DType type, const void* row, T scale, T* acc, int64_t n);
  // row[i] *= factors[i]; T = float.
  void (*multiply_row)(const T* factors, T* row, int64_t n);
  void (*norm_rows)(const NormRows<T>& p);
  void (*norm_rows_bwd)(const NormRowsBwd<T>& p);
  void (*rotate_rows)(const RotateRows<T>& p);
};

template <class T>
const RowKernels<T>& row_kernels();

}  // namespace moe_ops::cpu
