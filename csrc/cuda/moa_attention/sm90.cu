// Which calls the sm_90a kernels serve.
#include <cstdlib>
#include <string_view>

#include "cuda/check.h"
#include "cuda/moa_attention/config.h"
#include "cuda/moa_attention/generic.h"
#include "cuda/moa_attention/sm90.h"
#include "cuda/runtime.h"

namespace moe_ops::cuda::attention::sm90 {

namespace {

// Returns whether the sm_90a kernels may run; MOE_OPS_ATTENTION=generic disables them for tests and
// benchmarks.
bool usable() {
  const char* s = std::getenv("MOE_OPS_ATTENTION");
  return device_info().capability == 90 && (s == nullptr || std::string_view(s) != "generic");
}

// Returns whether the call has few rows; batch-invariant mode treats few rows like many.
bool few_rows(const MoaAttentionParams& p) {
  return !p.batch_invariant && has_few_rows(p.num_tokens * p.num_slots);
}

bool has_kernel(const MoaAttentionParams& p) {
  return (p.type == DType::kBFloat16 || p.type == DType::kFloat16) &&
         (p.head_size == 64 || p.head_size == 128);
}

// The error of a capped logit is 2^-22 of the cap.
constexpr double kLargestCap = 1024;

}  // namespace

bool supports(const MoaAttentionParams& p) {
  if (!usable() || !has_kernel(p) || few_rows(p) || p.softcap > kLargestCap) return false;
  if (p.kind == AttentionKind::kSoftmax && !(p.scale > 0)) return false;
  return reinterpret_cast<uintptr_t>(p.out) % 16 == 0 && rows_of_queries(p, p.q).possible &&
         rows_of_keys(p, p.k).possible && rows_of_keys(p, p.v).possible;
}

Status forward(const MoaAttentionParams& p, Stream stream) {
  const bool bf16 = p.type == DType::kBFloat16;
  if (p.kind == AttentionKind::kSoftmax) {
    return bf16 ? softmax_bf16(p, stream) : softmax_fp16(p, stream);
  }
  return bf16 ? stick_bf16(p, stream) : stick_fp16(p, stream);
}

bool supports(const MoaAttentionBwdParams& b) {
  const MoaAttentionParams& p = b.fwd;
  return backward_workspace(p) > 0 && rows_of_queries(p, p.q).possible &&
         rows_of_queries(p, b.grad_out).possible && rows_of_keys(p, p.k).possible &&
         rows_of_keys(p, p.v).possible;
}

int64_t backward_workspace(const MoaAttentionParams& p) {
  const bool serves = usable() && has_kernel(p) && p.softcap == 0 && p.num_keys > 0 && !few_rows(p);
  return serves ? Sm90BackwardSpace(p).bytes : 0;
}

Status backward(const MoaAttentionBwdParams& b, Stream stream) {
  const Sm90BackwardSpace space(b.fwd);
  const Chain chain = space.chain(b.fwd.workspace);
  BackwardLaunch launch = backward_launch(b, space);
  const bool bf16 = b.fwd.type == DType::kBFloat16;
  if (b.fwd.kind == AttentionKind::kSoftmax) {
    MOE_TRY(bf16 ? delta_bf16(launch, stream) : delta_fp16(launch, stream));
    take_band(launch, space, 0);
    return bf16 ? sm90::softmax_bwd_bf16(launch, chain, stream)
                : sm90::softmax_bwd_fp16(launch, chain, stream);
  }
  const int64_t blocks = b.fwd.batch * b.fwd.num_heads * space.band_tiles;
  for (int64_t band = 0; band < space.row_tiles; band += space.band_tiles) {
    take_band(launch, space, band);
    MOE_TRY(bf16 ? sticks_bf16(launch, blocks, stream) : sticks_fp16(launch, blocks, stream));
    MOE_TRY(bf16 ? sm90::stick_bwd_bf16(launch, chain, stream)
                 : sm90::stick_bwd_fp16(launch, chain, stream));
  }
  return 0;
}

}  // namespace moe_ops::cuda::attention::sm90
