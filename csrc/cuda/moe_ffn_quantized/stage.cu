// Which kernel serves a stage, and rows as all of them read them.
#include <cstdlib>
#include <string_view>

#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/moe_ffn_quantized/stage.h"
#include "cuda/overlap.cuh"
#include "cuda/rows.cuh"
#include "moe_ops/batch_invariant.h"

namespace moe_ops::cuda::quantized {

namespace {

struct CopyParams {
  Rows x;                // [rows, size]
  const float* factors;  // [size] or nullptr
  int64_t num_rows, size, stride;
  void* out;  // [rows, size] rows `stride` elements apart, zeros between them
};

template <class S>
__global__ void copy_rows_kernel(const CopyParams p) {
  await_previous_kernel();
  const int64_t row = warp_row();
  if (row >= p.num_rows) return;
  const S* const from = static_cast<const S*>(p.x.data) + row * p.x.stride;
  S* const to = static_cast<S*>(p.out) + row * p.stride;
  constexpr int kStretch = 4;
#pragma unroll
  for (int i = 0; i < kStretch; ++i) {
    const int64_t c = lane_access<kStretch>() + i * kWarp;
    if (c >= p.stride) return;
    float v = c < p.size ? widen(from[c]) : 0.0f;
    if (p.factors != nullptr && c < p.size) v *= p.factors[c];
    to[c] = narrow<S>(v);
  }
}

}  // namespace

bool needs_copy(const Rows& x, int64_t size, const float* factors) {
  return factors != nullptr || size % 16 != 0 ||
         !rows_aligned(x.data, x.stride * dtype_size(x.type), 16);
}

Status copy_rows(const Rows& x, const float* factors, int64_t num_rows, int64_t size, void* out,
                 Stream stream) {
  const CopyParams p{x, factors, num_rows, size, padded(size), out};
  if (p.num_rows == 0 || p.stride == 0) return 0;
  const auto launch = [&](auto type) {
    using S = typename decltype(type)::type;
    const RowGrid g = row_grid(p.num_rows, p.stride, 4);
    Launch at{g.grid, g.block, stream};
    at.overlaps = true;
    return launch_kernel<copy_rows_kernel<S>>(at, p);
  };
  switch (p.x.type) {
    case DType::kBFloat16:
      return launch(TypeTag<bf16>{});
    case DType::kFloat16:
      return launch(TypeTag<fp16>{});
    default:
      return launch(TypeTag<float>{});
  }
}

namespace {

// Returns whether the kernel for few tokens runs; MOE_OPS_QUANT_KERNEL=few or tiles selects a
// kernel independently of the number of tokens, for tests and benchmarks.
bool takes_few(const QuantStage& s) {
  const char* const forced = std::getenv("MOE_OPS_QUANT_KERNEL");
  if (forced != nullptr && std::string_view(forced) == "few") return true;
  if (forced != nullptr && std::string_view(forced) == "tiles") return false;
  if (batch_invariant()) return false;
  return s.num_tokens <= kQuantFewTokens || s.num_rows <= kQuantFewRows * s.num_experts;
}

template <class S>
__global__ void zero_tail_kernel(const QuantStage s) {
  await_previous_kernel();
  const int64_t row = warp_row(), f = lane_access<1>();
  if (row >= s.num_rows || f >= s.out_stride) return;
  if (row < valid_rows(s.expert_offsets, s.num_experts, s.num_rows)) return;
  static_cast<S*>(s.out)[row * s.out_stride + f] = narrow<S>(0.0f);
}

template <class S>
Status zero_tail(const QuantStage& s, Stream stream) {
  const RowGrid g = row_grid(s.num_rows, s.out_stride, 1);
  Launch at{g.grid, g.block, stream};
  at.overlaps = true;
  return launch_kernel<zero_tail_kernel<S>>(at, s);
}

using RunStage = Status (*)(const QuantStage&, Stream);

// Calls the function for the type of the stage's rows.
Status by_type(const QuantStage& s, Stream stream, RunStage in_bf16, RunStage in_fp16,
               RunStage in_fp32) {
  switch (s.a.type) {
    case DType::kBFloat16:
      return in_bf16(s, stream);
    case DType::kFloat16:
      return in_fp16(s, stream);
    default:
      return in_fp32(s, stream);
  }
}

Status zero_tail(const QuantStage& s, Stream stream) {
  return by_type(s, stream, zero_tail<bf16>, zero_tail<fp16>, zero_tail<float>);
}

}  // namespace

Status run_stage(const QuantStage& s, Stream stream) {
  if (s.num_rows == 0 || s.features == 0) return 0;
  if (s.num_experts == 0) return s.zero_tail ? zero_tail(s, stream) : 0;
  // Kernels count in 32 bits, up to a tile past the end.
  constexpr int64_t kMost = INT32_MAX - 4096;
  if (s.num_rows > kMost || s.num_experts > kMost || s.depth > kMost || 2 * s.features > kMost)
    return cudaErrorInvalidValue;
  if (!s.w.format.has_kernels) return by_type(s, stream, stored_bf16, stored_fp16, stored_fp32);
  if (takes_few(s)) return by_type(s, stream, few_bf16, few_fp16, few_fp32);
  if (s.zero_tail) MOE_TRY(zero_tail(s, stream));
  return by_type(s, stream, tiles_bf16, tiles_fp16, tiles_fp32);
}

}  // namespace moe_ops::cuda::quantized
