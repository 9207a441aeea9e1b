#include <cuda_runtime.h>

#include "cuda/check.h"
#include "cuda/grouped_gemm/tensor_map.h"
#include "cuda/grouped_gemm/tensor_map_4d.h"

namespace moe_ops::cuda {

namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found{};
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault,
                                       &found) != cudaSuccess ||
      found != cudaDriverEntryPointSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  return reinterpret_cast<Encode>(entry);
}

template <class Desc>
bool possible(const Desc& d, int rank) {
  if (reinterpret_cast<uintptr_t>(d.data) % 16 != 0) return false;
  for (int i = 0; i < rank; ++i)
    if (d.size[i] < 1 || d.size[i] > INT32_MAX) return false;  // coordinates are int32
  for (int i = 0; i + 1 < rank; ++i) {
    const int64_t bytes = d.stride[i] * d.element_size;
    if (d.size[i + 1] == 1) continue;
    if (bytes <= 0 || bytes % 16 != 0 || bytes >= int64_t{1} << 40) return false;
  }
  return true;
}

template <class Desc>
Status encode_map(CUtensorMap* map, const Desc& d, int rank, CUtensorMapSwizzle swizzle) {
  static const Encode encode = find_encode();
  if (encode == nullptr) return cudaErrorNotSupported;
  cuuint64_t size[4], stride[3];
  cuuint32_t box[4], step[4] = {1, 1, 1, 1};
  for (int i = 0; i < rank; ++i) {
    size[i] = static_cast<cuuint64_t>(d.size[i]);
    box[i] = static_cast<cuuint32_t>(d.box[i]);
  }
  // The stride of a dimension of one element is never used; the encoder wants one all the same.
  uint64_t span = round_up<uint64_t>(size[0] * d.element_size, 16);
  for (int i = 0; i + 1 < rank; ++i) {
    stride[i] = d.size[i + 1] == 1 ? span : static_cast<cuuint64_t>(d.stride[i] * d.element_size);
    span = stride[i] * size[i + 1];
  }
  const CUresult result =
      encode(map, d.type, static_cast<cuuint32_t>(rank), const_cast<void*>(d.data), size, stride,
             box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

bool tensor_map_possible(const TensorMapDesc& d) { return possible(d, d.rank); }
bool tensor_map_possible(const TensorMap4dDesc& d) { return possible(d, 4); }

Status encode_tensor_map(CUtensorMap* map, const TensorMapDesc& d) {
  return encode_map(map, d, d.rank, CU_TENSOR_MAP_SWIZZLE_128B);
}
Status encode_tensor_map(CUtensorMap* map, const TensorMap4dDesc& d) {
  return encode_map(map, d, 4,
                    d.swizzle_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B);
}

}  // namespace moe_ops::cuda
