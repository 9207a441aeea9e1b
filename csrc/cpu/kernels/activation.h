// Activations of gated and plain experts, and the steps between the products of all_experts_ffn.
#pragma once

#include "cpu/kernels/gemm.h"
#include "moe_ops/activation.h"

namespace moe_ops::cpu {

// h = act(gate, up) of `rows` rows of n; `up` is read by activations with a gate alone.
template <class T>
struct ActRows {
  Activation kind;
  int64_t rows, n;
  T alpha, limit;
  const T *gate, *up;
  int64_t ld;
  T* h;
  int64_t ld_h;
};
template <class T>
struct ActRowsBwd {
  Activation kind;
  int64_t rows, n;
  T alpha, limit;
  const T *gate, *up;
  int64_t ld;
  const T* dh;
  int64_t ld_dh;
  const T* weights;  // [rows], factors of all that is written but dots; nullptr: ones
  T* h;              // may be dh, or nullptr where dots is
  int64_t ld_h;
  T *dgate, *dup;
  int64_t ld_grad;
  T* dots;  // [rows], <h, dh>, or nullptr
};

// all_experts_ffn works on all rows of a block at once. Its kernels write whole vectors: rows of outputs
// and `sum` reach up to the next one. Panels are those of pack_b, one after the other.
//
// Rows of src to first and second; sum += each row. nullptr: not wanted.
template <class T>
struct DenseCopy {
  DType type;
  const void* src;
  int64_t ld, rows, n;
  T* first;
  int64_t ld_first;
  T* second = nullptr;
  int64_t ld_second = 0;
  T* sum = nullptr;
};
// h = act(u), or u; backward from d, the gradient of h, whose rows are readable up to the next
// whole vector; nullptr (and ld_d 0): h alone.
template <class T>
struct DenseAct {
  bool has_act;
  Activation kind;
  int64_t rows, n;
  const T* u;
  int64_t ld_u;
  T* h = nullptr;  // forward
  int64_t ld_h = 0;
  const T* d = nullptr;  // backward
  int64_t ld_d = 0;
  T* h_panels = nullptr;    // h, as panels of `rows` rows and n columns; nullptr: not wanted
  T* du_rows = nullptr;     // gradients of u, rows kLda apart
  T* du_columns = nullptr;  // the same, rows kLdm apart
  T* sum = nullptr;         // [n], their sum is added
};

template <class T>
struct ActivationKernels {
  void (*forward)(const ActRows<T>& p);
  void (*backward)(const ActRowsBwd<T>& p);
  void (*dense_copy)(const DenseCopy<T>& p);
  // Rows of src as panels.
  void (*dense_panels)(DType type, const void* src, int64_t ld, int64_t rows, int64_t n, T* panels);
  void (*dense_forward)(const DenseAct<T>& p);
  void (*dense_backward)(const DenseAct<T>& p);
};

template <class T>
const ActivationKernels<T>& activation_kernels();

}  // namespace moe_ops::cpu
