// Launching the generic attention kernels.
#pragma once

#include <type_traits>

#include "cuda/launch.h"
#include "cuda/moa_attention/config.h"
#include "cuda/runtime.h"
#include "cuda/vec.cuh"
#include "moe_ops/moa_attention.h"

namespace moe_ops::cuda::attention {

template <class S>
constexpr DType kTypeOf = std::is_same_v<S, double>  ? DType::kFloat64
                          : std::is_same_v<S, float> ? DType::kFloat32
                          : std::is_same_v<S, bf16>  ? DType::kBFloat16
                                                     : DType::kFloat16;

inline bool aligned(const AttentionOperand& x, DType type) {
  const int64_t size = dtype_size(type);
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride_batch * size % 16 == 0 &&
         x.stride_token * size % 16 == 0 && x.stride_slot * size % 16 == 0 &&
         x.stride_head * size % 16 == 0;
}

inline int64_t heads_of(const MoaAttentionParams& p) { return p.batch * p.num_heads; }
inline int64_t rows_of(const MoaAttentionParams& p) { return p.num_tokens * p.num_slots; }
inline int64_t row_tiles_of(const MoaAttentionParams& p, int64_t rows) {
  return ceil_div(rows_of(p), rows);
}

// Launches one block per item.
template <auto kernel, class Params>
Status launch_items(const Params& params, int64_t items, int threads, int64_t shared_bytes,
                    Stream stream) {
  if (items <= 0) return 0;
  if (items > INT32_MAX || shared_bytes > device_info().max_shared_bytes) {
    return cudaErrorInvalidConfiguration;
  }
  const Launch at{static_cast<unsigned>(items), static_cast<unsigned>(threads), stream,
                  static_cast<size_t>(shared_bytes)};
  return launch_kernel<kernel>(at, params);
}

}  // namespace moe_ops::cuda::attention
