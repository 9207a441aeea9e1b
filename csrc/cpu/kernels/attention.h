// Attention: the steps between its products, on scores [keys][width] of `width` rows of queries,
// one or two vectors.
#pragma once

#include "cpu/kernels/gemm.h"

namespace moe_ops::cpu {

template <class T>
struct KeyIndexOf {
  using type = int32_t;  // as wide as T, so that one comparison covers a vector
};
template <>
struct KeyIndexOf<double> {
  using type = int64_t;
};
template <class T>
using KeyIndex = typename KeyIndexOf<T>::type;

template <class T>
struct AttentionBlock {
  int64_t keys = 0;
  int width = 0;
  bool masked = false;                 // false: every row sees every key
  KeyIndex<T> begin = 0;               // number of the first key
  const KeyIndex<T>* first = nullptr;  // [width] row r sees keys from number first[r] ...
  const KeyIndex<T>* last = nullptr;   // ... to last[r] - 1
  T softcap = 0;  // scores become softcap * tanh(score / softcap); 0: they do not
  // For the narrow kernels, counted from the first key: no row sees one before `start`, and every
  // row sees those from all_first to all_last - 1.
  int64_t start = 0, all_first = 0, all_last = 0;
  // For the narrow kernels: keys and values that a row does not see are left out of its sums, not
  // multiplied by zero. The bits are the same where all numbers are finite.
  bool apart = false;
};

// Leading dimension of keys and values that the narrow kernels read, and their largest head size.
constexpr int64_t kNarrowSize = 16;
// Keys that they take at once: sums of 16 features and scores of 8 keys leave 8 of 32 registers.
constexpr int64_t kNarrowKeys = 8;

template <class T>
struct SoftmaxBwdParams {
  T* s;         // scores; become their gradients, of which ds_rows (kLda) is a copy
  const T* dp;  // gradients of weights
  const T *lse, *delta;
  T *p_rows, *ds_rows;  // p_rows: weights, rows kLda apart
};
template <class T>
struct StickBwdParams {
  T* s;
  const T* dp;
  const T* log_rest;  // that the block started from
  T* slopes;          // scratch like s, used with a softcap
  T* before;          // [width] the sum of weight times gradient over all keys before
  T *p_rows, *ds_rows;
};
// Keys and values are [keys][kNarrowSize], zero from `size` on to 8 or 16; q and what is summed
// [8 or 16][lanes]. q times keys is scores times power_scale, in which max counts too.
template <class T>
struct NarrowParams {
  int size;
  const T *keys, *values, *q;
  T *out, *max, *sum;
};
template <class T>
struct NarrowBwdParams {
  int size;
  const T *keys, *values, *q, *grad_out, *lse, *delta;
  T *grad_q, *p_rows, *ds_rows;
};
// out[r] = the product of row r of a and of b.
template <class T>
struct RowDotsParams {
  DType type;
  const void* a;
  int64_t lda;
  const void* b;
  int64_t ldb, rows, n;
  T* out;
};

template <class T>
struct AttentionKernels {
  T log_tiny;  // e^log_tiny is the smallest weight that is not zero
  T lowest;    // what `max` starts from
  // s becomes e^(s - max) with the larger of the old max and the scores; sum follows. factor: by
  // how much what was summed before shrinks; returns false where all are one.
  bool (*softmax)(const AttentionBlock<T>& b, T* s, T* max, T* sum, T* factor);
  // After the last block, for n rows, whole vectors: lse = max + log(sum), factor = 1 / sum; -inf
  // and 0 where sum is 0.
  void (*softmax_end)(int64_t n, const T* max, const T* sum, T* lse, T* factor);
  void (*softmax_bwd)(const AttentionBlock<T>& b, const SoftmaxBwdParams<T>& p);
  // From the last key to the first: s becomes weights, log_rest [width] the log of what is left of
  // the stick. Returns the largest. stick_rest moves log_rest only.
  T (*stick)(const AttentionBlock<T>& b, T* s, T* log_rest);
  T (*stick_rest)(const AttentionBlock<T>& b, T* s, T* log_rest);
  // From the first block of keys to the last.
  void (*stick_bwd)(const AttentionBlock<T>& b, const StickBwdParams<T>& p);
  // Softmax of heads of up to narrow_size features, whole: scores, weights and products, for one
  // vector of rows and no softcap. Null where narrow_size is 0.
  int narrow_size;
  T power_scale;
  // out += values times weights relative to max; max (from `lowest` on) and sum follow.
  void (*narrow)(const AttentionBlock<T>& b, const NarrowParams<T>& p);
  // Weights and gradients of scores as softmax_bwd writes them, but for keys before b.start, and
  // zeros for up to kNarrowKeys - 1 keys after the last; grad_q += keys times the latter.
  void (*narrow_bwd)(const AttentionBlock<T>& b, const NarrowBwdParams<T>& p);
  // c[f * width + r] += the sum over the keys j that row r sees of a[j * lda + f] * s[j * width +
  // r], with the same bits as a tile's where all numbers are finite.
  void (*seen_sums)(const AttentionBlock<T>& b, const T* a, int64_t lda, const T* s,
                    int64_t features, T* c);
  // Neither infinity nor NaN among n numbers.
  bool (*all_finite)(const T* x, int64_t n);
  // c[i * width + j] *= factor[j]
  void (*multiply_columns)(T* c, int64_t rows, int width, const T* factor);
  void (*row_dots)(const RowDotsParams<T>& p);
};

template <class T>
const AttentionKernels<T>& attention_kernels();

}  // namespace moe_ops::cpu
