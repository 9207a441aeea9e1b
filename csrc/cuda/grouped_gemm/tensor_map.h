// Tensor maps for TMA, made on the host and passed by value as __grid_constant__ parameters. The
// driver's encoder is found at run time, so nothing links with libcuda.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "moe_ops/common.h"

namespace moe_ops::cuda {

// A dense tensor in memory: sizes and boxes from the dense side outwards. stride[i]: elements from
// one index of dimension i + 1 to the next; bytes must be a multiple of 16.
struct TensorMapDesc {
  const void* data = nullptr;
  CUtensorMapDataType type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  int element_size = 2;
  int rank = 2;
  int64_t size[3] = {1, 1, 1};
  int64_t stride[2] = {0, 0};
  int box[3] = {1, 1, 1};
};

// True if TMA can read it: 16-byte alignment of data and strides, sizes and strides in range.
bool tensor_map_possible(const TensorMapDesc& d);

// Boxes are written with the 128-byte swizzle, zeros outside the tensor. Returns a cudaError_t.
Status encode_tensor_map(CUtensorMap* map, const TensorMapDesc& d);

// Boxes that a warp stores (sm90_store_boxes.cuh).
constexpr int kStoreRows = 16, kStoreBoxBytes = kStoreRows * 128;

// Returns the matrix `d` with two coordinates for rows, (x, y) with x < 16: row x + y - 16. Rows r
// to r + v - 1 of a box of 16 are x = 16 - v and the next, with y = r + v; its other rows have x >=
// 16 and are not stored. The map begins 16 rows before the matrix, but no row there has coordinates
// in use.
inline TensorMapDesc rows_to_store(TensorMapDesc d) {
  d.data = reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(d.data) -
                                         kStoreRows * d.stride[0] * d.element_size);
  d.rank = 3;
  d.size[2] = d.size[1] + 1;
  d.size[1] = kStoreRows;
  d.stride[1] = d.stride[0];
  d.box[0] = kStoreBoxBytes / kStoreRows / d.element_size;
  d.box[1] = kStoreRows;
  d.box[2] = 1;
  return d;
}

}  // namespace moe_ops::cuda
