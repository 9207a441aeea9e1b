// attend_decode, which only CUDA has: what attention_decode computes between its projections. It
// has a namespace of its own, because it is a part of an op and not one that users call.
#include "moe_ops/attend_decode.h"

#include "torch/attention_block.h"
#include "torch/device.h"

#ifdef MOE_OPS_WITH_CUDA

namespace moe_ops::adapter {

namespace {

// Checks a cache and returns its memory.
KeptHeads<void> device_heads(const Op& op, const char* name, const Tensor& t, const Tensor& x,
                             int64_t end) {
  check_device(op, name, t);
  check_heads(op, name, t, x, end);
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

// q [B, S, n d], k and v [B, S, m d] -> y [B, S, n d]; k and v are written into keys and values at
// `start`. The arguments are those of attention_decode, which has checked them.
Tensor attend_decode_cuda(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos,
                          const Tensor& sin, const Tensor& keys, const Tensor& values,
                          int64_t start, int64_t rotary_size, double scale, const OptTensor& q_norm,
                          const OptTensor& k_norm, double head_eps, const OptTensor& mask,
                          const OptTensor& sinks) {
  const Op op("attention_decode", q);
  cuda::AttendDecodeParams p;
  p.type = check_float(op, "q", q);
  p.batch = q.size(0);
  p.num_tokens = q.size(1);
  p.start = start;
  const int64_t end = start + p.num_tokens;
  p.keys = device_heads(op, "keys", keys, q, end);
  p.values = device_heads(op, "values", values, q, end);
  p.kv_heads = keys.size(1);
  p.head_size = keys.size(3);
  p.heads = q.size(2) / p.head_size;
  MOE_CHECK(p.head_size <= cuda::kMaxHeadSize, op, ": keys must have at most ", cuda::kMaxHeadSize,
            " features per head, got shape ", shape_string(keys), ".");
  const Tensor own_q = dense(q), own_k = dense(k), own_v = dense(v);
  p.q = own_q.const_data_ptr();
  p.k = own_k.const_data_ptr();
  p.v = own_v.const_data_ptr();
  OptTensor head_q, head_k, own_sinks;
  p.norms_heads = true;
  if (q_norm.has_value()) {
    p.norms_heads = q_norm->size(0) == p.head_size;
    head_q = dense(*q_norm);
    head_k = dense(*k_norm);
  }
  if (sinks.has_value()) own_sinks = dense(*sinks);
  p.query_norm = data_of(head_q);
  p.key_norm = data_of(head_k);
  p.sinks = data_of(own_sinks);
  p.head_eps = head_eps;
  p.half = rotary_size / 2;
  const Tensor own_cos = with_dense_rows(cos), own_sin = with_dense_rows(sin);
  p.cos = own_cos.const_data_ptr();
  p.sin = own_sin.const_data_ptr();
  p.angle_type = check_float(op, "cos", own_cos);
  p.cos_stride_batch = stride_unless_one(own_cos, 0);
  p.cos_stride_token = own_cos.stride(1);
  p.sin_stride_batch = stride_unless_one(own_sin, 0);
  p.sin_stride_token = own_sin.stride(1);
  OptTensor own_mask;
  if (mask.has_value()) {
    own_mask = with_dense_rows(*mask);
    p.mask.data = own_mask->const_data_ptr();
    p.mask.is_bool = mask->scalar_type() == ScalarType::Bool;
    if (!p.mask.is_bool) p.mask.type = check_float(op, "mask", *mask);
    p.mask.stride_batch = stride_unless_one(*own_mask, 0);
    p.mask.stride_token = stride_unless_one(*own_mask, 2);
  }
  p.scale = scale;
  p.splits = (end + cuda::kSplitKeys - 1) / cuda::kSplitKeys;
  const ScalarType acc = accumulate_type(q.scalar_type());
  const int64_t B = p.batch, S = p.num_tokens, n = p.heads;
  Tensor queries = device_empty(q, {B, S, n, p.head_size}, acc);
  Tensor sums = device_empty(q, {B, S, n, p.splits, p.head_size}, acc);
  Tensor totals = device_empty(q, {B, S, n, p.splits, 2}, acc);
  Tensor y = device_empty(q, {B, S, n * p.head_size}, q.scalar_type());
  p.queries = queries.mutable_data_ptr();
  p.sums = sums.mutable_data_ptr();
  p.totals = totals.mutable_data_ptr();
  p.y = y.mutable_data_ptr();
  check_status(op, cuda::attend_decode(p, current_stream(q)));
  return y;
}

template <class Backend>
void register_kernel(torch::stable::detail::StableLibrary& lib) {
  lib.impl("attend_decode", MOE_CUDA_BOX(attend_decode_cuda));
}

}  // namespace

STABLE_TORCH_LIBRARY(moe_ops_cuda, lib) {
  lib.def(
      "attend_decode(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) keys, "
      "Tensor(b!) values, int start, int rotary_size, float scale, Tensor? q_norm, "
      "Tensor? k_norm, float head_eps, Tensor? mask, Tensor? sinks) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(moe_ops_cuda, CUDA, lib) { register_kernel<OnCuda>(lib); }
#ifdef MOE_OPS_SIMULATED
STABLE_TORCH_LIBRARY_IMPL(moe_ops_cuda, CPU, lib) { register_kernel<Simulated>(lib); }
#endif

}  // namespace moe_ops::adapter

#endif  // MOE_OPS_WITH_CUDA
