// The operands as tensors of bytes that TMA reads; the kernel chooses the boxes.
#pragma once

#include "cuda/grouped_gemm/tensor_map.h"
#include "moe_ops/grouped_gemm_fp8.h"

namespace moe_ops::cuda::sm90::fp8 {

inline TensorMapDesc operand_a(const GroupedGemmFp8Params& p) {
  TensorMapDesc d;
  d.data = p.a.data;
  d.type = CU_TENSOR_MAP_DATA_TYPE_UINT8;
  d.element_size = 1;
  d.rank = 2;
  d.size[0] = p.in_features;
  d.size[1] = p.a.limit;
  d.stride[0] = p.a.stride;
  return d;
}

inline TensorMapDesc operand_b(const GroupedGemmFp8Params& p) {
  TensorMapDesc d;
  d.data = p.b.data;
  d.type = CU_TENSOR_MAP_DATA_TYPE_UINT8;
  d.element_size = 1;
  d.rank = 3;
  d.size[0] = p.in_features;
  d.size[1] = p.out_features;
  d.size[2] = p.num_experts;
  d.stride[0] = p.b.stride_o;
  d.stride[1] = p.b.stride_e;
  return d;
}

}  // namespace moe_ops::cuda::sm90::fp8
