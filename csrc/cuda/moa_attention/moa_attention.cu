// Which kernel serves a call, and how much workspace it wants.
#include "cuda/moa_attention/backward_launch.cuh"
#include "cuda/moa_attention/forward_kernel.cuh"
#include "cuda/moa_attention/generic.h"
#include "cuda/moa_attention/sm90.h"
#include "moe_ops/moa_attention.h"

namespace moe_ops::cuda {

namespace attention {
namespace {

template <class Fn, class Params>
Status of_type(DType type, const Params& p, Stream stream, Fn* bf16, Fn* fp16, Fn* fp32, Fn* fp64) {
  switch (type) {
    case DType::kFloat64:
      return fp64(p, stream);
    case DType::kFloat32:
      return fp32(p, stream);
    case DType::kBFloat16:
      return bf16(p, stream);
    default:
      return fp16(p, stream);
  }
}

bool in_range(const MoaAttentionParams& p) {
  return rows_of(p) < INT32_MAX - 64 && p.num_keys < INT32_MAX - 64;
}

}  // namespace
}  // namespace attention

int64_t moa_attention_workspace(const MoaAttentionParams& p) {
  const int64_t splits = attention::forward_splits(p);
  if (splits == 1) return 0;
  return splits * attention::heads_of(p) * attention::rows_of(p) * (p.head_size + 2) *
         dtype_size(accumulate_type(p.type));
}

Status moa_attention(const MoaAttentionParams& p, Stream stream) {
  using namespace attention;
  if (!in_range(p)) return cudaErrorInvalidValue;
  if (sm90::supports(p)) return sm90::forward(p, stream);
  return of_type(p.type, p, stream, forward_bf16, forward_fp16, forward_fp32, forward_fp64);
}

int64_t moa_attention_bwd_workspace(const MoaAttentionParams& p) {
  return std::max(attention::BackwardSpace(p).bytes, attention::sm90::backward_workspace(p));
}

Status moa_attention_bwd(const MoaAttentionBwdParams& b, Stream stream) {
  using namespace attention;
  if (!in_range(b.fwd)) return cudaErrorInvalidValue;
  if (sm90::supports(b)) return sm90::backward(b, stream);
  return b.fwd.kind == AttentionKind::kSoftmax
             ? of_type(b.fwd.type, b, stream, softmax_bwd_bf16, softmax_bwd_fp16, softmax_bwd_fp32,
                       softmax_bwd_fp64)
             : of_type(b.fwd.type, b, stream, stick_bwd_bf16, stick_bwd_fp16, stick_bwd_fp32,
                       stick_bwd_fp64);
}

}  // namespace moe_ops::cuda
