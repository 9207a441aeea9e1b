// The operands of the ops as tensors that TMA reads; the kernel chooses the boxes.
#pragma once

#include "cuda/grouped_gemm/tensor_map.h"
#include "moe_ops/grouped_gemm.h"

namespace moe_ops::cuda::sm90 {

inline TensorMapDesc matrix(const void* data, DType type, int64_t cols, int64_t rows,
                            int64_t stride) {
  TensorMapDesc d;
  d.data = data;
  d.type =
      type == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  d.element_size = 2;
  d.rank = 2;
  d.size[0] = cols;
  d.size[1] = rows;
  d.stride[0] = stride;
  return d;
}

// Returns the map of `count` matrices: B is always of rank 3; the rows of a weight gradient are one
// matrix.
inline TensorMapDesc matrices(TensorMapDesc d, int64_t count, int64_t stride) {
  d.rank = 3;
  d.size[2] = count;
  d.stride[1] = stride;
  return d;
}

inline TensorMapDesc operand_a(const GroupedGemmParams& p) {
  return matrix(p.a.data, p.a.type, p.in_features, p.a.limit, p.a.stride);
}

inline TensorMapDesc operand_b(const GroupedGemmParams& p) {
  const bool nt = p.b.stride_k == 1;
  return matrices(matrix(p.b.data, p.b.type, nt ? p.in_features : p.out_features,
                         nt ? p.out_features : p.in_features, nt ? p.b.stride_o : p.b.stride_k),
                  p.num_experts, p.b.stride_e);
}

inline TensorMapDesc operand_a(const GroupedWgradParams& p) {
  return matrix(p.grad.data, p.grad.type, p.out_features, p.grad.limit, p.grad.stride);
}

inline TensorMapDesc operand_b(const GroupedWgradParams& p) {
  return matrices(matrix(p.a.data, p.a.type, p.in_features, p.a.limit, p.a.stride), 1, 0);
}

}  // namespace moe_ops::cuda::sm90
