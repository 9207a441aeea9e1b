// Tensor maps of rank 4 (tensor_map.h): rows of heads of a batch.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "moe_ops/common.h"

namespace moe_ops::cuda {

struct TensorMap4dDesc {
  const void* data = nullptr;
  CUtensorMapDataType type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  int element_size = 2;
  int64_t size[4] = {1, 1, 1, 1};
  int64_t stride[3] = {0, 0, 0};
  int box[4] = {1, 1, 1, 1};
  int swizzle_bytes = 128;  // or 64: as many as a line of the box has
};

bool tensor_map_possible(const TensorMap4dDesc& d);
Status encode_tensor_map(CUtensorMap* map, const TensorMap4dDesc& d);

}  // namespace moe_ops::cuda
