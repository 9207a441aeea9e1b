#include "moe_ops/moa_attention.h"

#include <cmath>

#include "moe_ops/batch_invariant.h"
#include "torch/device.h"
#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

namespace {

AttentionKind check_kind(const Op& op, const std::string& kind) {
  if (kind == "softmax") return AttentionKind::kSoftmax;
  MOE_CHECK(kind == "stick_breaking", op,
            ": kind must be \"softmax\" or \"stick_breaking\", got \"", kind, "\".");
  return AttentionKind::kStickBreaking;
}

AttentionOperand operand(const Tensor& t) {
  AttentionOperand x;
  x.data = t.const_data_ptr();
  x.stride_batch = t.stride(0);
  x.stride_token = t.stride(1);
  if (t.dim() == 5) x.stride_slot = t.stride(2);
  x.stride_head = t.stride(t.dim() - 2);
  return x;
}

// The call as the kernels take it, and what keeps its memory alive.
struct Call {
  MoaAttentionParams p;
  Tensor q, k, v;
  std::vector<int64_t> cu_seqlens;
};

void check_sequences(const Op& op, const Tensor& cu_seqlens, Call& call) {
  check_index(op, "cu_seqlens", cu_seqlens);
  check_dim(op, "cu_seqlens", cu_seqlens, 1, "[num_sequences + 1]");
  MOE_CHECK(cu_seqlens.numel() >= 1, op, ": cu_seqlens must start with 0, got shape [0].");
  const int64_t S = call.p.num_tokens;
  MOE_CHECK(call.p.batch == 1, op, ": q must be [1, S, K, n, d] with cu_seqlens, got shape ",
            shape_string(call.q), ".");
  MOE_CHECK(call.p.num_keys == S, op, ": k must have S = ", S,
            " in dimension 1 with cu_seqlens, got shape ", shape_string(call.k), ".");
  call.p.num_sequences = cu_seqlens.numel() - 1;
}

// Reads and checks the values, which a device op cannot read.
void read_sequences(const Op& op, const Tensor& cu_seqlens, Call& call) {
  const int64_t S = call.p.num_tokens;
  std::vector<int64_t>& cu = call.cu_seqlens;
  cu.resize(static_cast<size_t>(cu_seqlens.numel()));
  for_each_index(cu_seqlens, [&](int64_t i, int64_t value) {
    cu[i] = value;
    MOE_CHECK(i > 0 || value == 0, op, ": cu_seqlens must start with 0, got ", value, ".");
    MOE_CHECK(i == 0 || value >= cu[i - 1], op, ": cu_seqlens must not fall, got ", cu[i - 1],
              " then ", value, " at position ", i, ".");
  });
  MOE_CHECK(cu.back() == S, op, ": cu_seqlens must end with S = ", S, ", got ", cu.back(), ".");
  call.p.cu_seqlens = cu.data();
}

// Arguments that forward and backward share.
struct Inputs {
  const Tensor& q;  // [B, S, K, n, d]
  const Tensor& k;  // [B, S_kv, n, d]
  const Tensor& v;  // [B, S_kv, n, d]
  const std::string& kind;
  bool causal;
  double scale;
  int64_t window;               // 0: none
  double softcap;               // 0: none
  const OptTensor& cu_seqlens;  // [num_sequences + 1] or none
};

// Fills `call`, which must not be moved afterwards, as its parameters point into it.
void check_call(const Op& op, const Inputs& in, Call& call) {
  const auto& [q, k, v, kind, causal, scale, window, softcap, cu_seqlens] = in;
  MoaAttentionParams& p = call.p;
  p.type = check_float(op, "q", q);
  check_dim(op, "q", q, 5, "[B, S, K, n, d]");
  for (const auto& [name, t] : {std::pair{"k", &k}, std::pair{"v", &v}}) {
    check_same_dtype(op, name, *t, "q", q);
    check_dim(op, name, *t, 4, "[B, S_kv, n, d]");
    check_size(op, name, *t, 0, q.size(0), "B");
    check_size(op, name, *t, 2, q.size(3), "n");
    check_size(op, name, *t, 3, q.size(4), "d");
  }
  check_size(op, "v", v, 1, k.size(1), "S_kv");
  p.kind = check_kind(op, kind);
  p.batch = q.size(0);
  p.num_tokens = q.size(1);
  p.num_slots = q.size(2);
  p.num_heads = q.size(3);
  p.head_size = q.size(4);
  p.num_keys = k.size(1);
  MOE_CHECK(p.head_size >= 1 && p.head_size <= kMaxHeadSize, op, ": q must have d from 1 to ",
            kMaxHeadSize, " in dimension 4, got shape ", shape_string(q), ".");
  MOE_CHECK(p.num_keys < (int64_t{1} << 31), op, ": k must have fewer than 2^31 keys, got shape ",
            shape_string(k), ".");
  MOE_CHECK(std::isfinite(scale), op, ": scale must be finite, got ", scale, ".");
  MOE_CHECK(std::isfinite(softcap) && softcap >= 0, op,
            ": softcap must be positive and finite, got ", softcap, ".");
  MOE_CHECK(window >= 0, op, ": window must be at least 1, got ", window, ".");
  p.causal = causal;
  p.scale = scale;
  p.window = window;
  p.softcap = softcap;
  call.q = with_dense_rows(q);
  call.k = with_dense_rows(k);
  call.v = with_dense_rows(v);
  p.q = operand(call.q);
  p.k = operand(call.k);
  p.v = operand(call.v);
  if (cu_seqlens.has_value()) {
    check_sequences(op, *cu_seqlens, call);
  } else {
    MOE_CHECK((!causal && window == 0) || p.num_keys >= p.num_tokens, op,
              ": k must have at least the S = ", p.num_tokens,
              " keys of the queries when causal or with a window, got shape ", shape_string(k),
              ".");
  }
}

bool is_empty(const MoaAttentionParams& p) {
  return p.batch * p.num_tokens * p.num_slots * p.num_heads == 0;
}

std::tuple<Tensor, Tensor> moa_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                         std::string kind, bool causal, double scale,
                                         int64_t window, double softcap,
                                         const OptTensor& cu_seqlens) {
  constexpr const char* kOp = "moa_attention";
  Call call;
  check_call(kOp,
             {.q = q,
              .k = k,
              .v = v,
              .kind = kind,
              .causal = causal,
              .scale = scale,
              .window = window,
              .softcap = softcap,
              .cu_seqlens = cu_seqlens},
             call);
  if (cu_seqlens.has_value()) read_sequences(kOp, *cu_seqlens, call);
  MoaAttentionParams& p = call.p;
  Tensor out = empty_cpu(kOp, {p.batch, p.num_tokens, p.num_slots, p.num_heads, p.head_size},
                         q.scalar_type());
  Tensor state = empty_cpu(kOp, {p.batch, p.num_tokens, p.num_slots, p.num_heads},
                           accumulate_type(q.scalar_type()));
  p.out = out.mutable_data_ptr();
  p.state = state.mutable_data_ptr();
  if (!is_empty(p)) cpu::moa_attention(p, torch_parallel());
  return {out, state};
}

void check_saved(const Op& op, const Tensor& grad_out, const Tensor& grad_state, const Tensor& q,
                 const Tensor& out, const Tensor& state) {
  for (const auto& [name, t] : {std::pair{"grad_out", &grad_out}, std::pair{"out", &out}}) {
    check_same_dtype(op, name, *t, "q", q);
    check_dim(op, name, *t, 5, "[B, S, K, n, d]");
    for (int64_t i = 0; i < 5; ++i) check_size(op, name, *t, i, q.size(i), "q's size");
  }
  for (const auto& [name, t] : {std::pair{"grad_state", &grad_state}, std::pair{"state", &state}}) {
    check_float(op, name, *t);
    check_dim(op, name, *t, 4, "[B, S, K, n]");
    for (int64_t i = 0; i < 4; ++i) check_size(op, name, *t, i, q.size(i), "q's size");
  }
}

std::tuple<Tensor, Tensor, Tensor> moa_attention_bwd(
    const Tensor& grad_out, const Tensor& grad_state, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& state, std::string kind, bool causal,
    double scale, int64_t window, double softcap, const OptTensor& cu_seqlens) {
  constexpr const char* kOp = "moa_attention_bwd";
  MoaAttentionBwdParams b;
  Call call;
  check_call(kOp,
             {.q = q,
              .k = k,
              .v = v,
              .kind = kind,
              .causal = causal,
              .scale = scale,
              .window = window,
              .softcap = softcap,
              .cu_seqlens = cu_seqlens},
             call);
  if (cu_seqlens.has_value()) read_sequences(kOp, *cu_seqlens, call);
  const ScalarType acc = accumulate_type(q.scalar_type());
  check_saved(kOp, grad_out, grad_state, q, out, state);
  const Tensor saved_out = dense(out), saved_state = contiguous_as(state, acc);
  const Tensor g_out = with_dense_rows(grad_out), g_state = contiguous_as(grad_state, acc);
  const ScalarType dtype = q.scalar_type();
  const MoaAttentionParams& p = call.p;
  Tensor grad_q =
      empty_cpu(kOp, {p.batch, p.num_tokens, p.num_slots, p.num_heads, p.head_size}, dtype);
  Tensor grad_k = empty_cpu(kOp, {p.batch, p.num_keys, p.num_heads, p.head_size}, dtype);
  Tensor grad_v = empty_cpu(kOp, {p.batch, p.num_keys, p.num_heads, p.head_size}, dtype);
  call.p.out = const_cast<void*>(saved_out.const_data_ptr());
  call.p.state = const_cast<void*>(saved_state.const_data_ptr());
  b.fwd = call.p;
  b.grad_out = operand(g_out);
  b.grad_state = g_state.const_data_ptr();
  const Tensor workspace = empty_cpu(kOp, {cpu::moa_attention_workspace(p)}, ScalarType::Byte);
  b.workspace = const_cast<void*>(workspace.const_data_ptr());
  b.grad_q = grad_q.mutable_data_ptr();
  b.grad_k = grad_k.mutable_data_ptr();
  b.grad_v = grad_v.mutable_data_ptr();
  cpu::moa_attention_bwd(b, torch_parallel());
  return {grad_q, grad_k, grad_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) {
  m.impl("moa_attention", MOE_BOX(moa_attention));
  m.impl("moa_attention_bwd", MOE_BOX(moa_attention_bwd));
}

#ifdef MOE_OPS_WITH_CUDA

namespace {

// The call for the device's launchers, and what keeps its index tensor alive.
struct DeviceCall {
  Call call;
  std::optional<DeviceIndex> sequences;
  cuda::MoaAttentionParams p;
};

void check_device_call(const Op& op, const Inputs& in, DeviceCall& call) {
  Call& host = call.call;
  check_call(op, in, host);
  call.p.batch_invariant = batch_invariant();
  if (call.p.batch_invariant) {
    // Slots of one token always lie evenly, those of several only if tokens do too.
    host.q = dense(host.q);
    host.k = token_rows(host.k);
    host.v = token_rows(host.v);
    host.p.q = operand(host.q);
    host.p.k = operand(host.k);
    host.p.v = operand(host.v);
  }
  static_cast<MoaAttentionParams&>(call.p) = host.p;
  if (in.cu_seqlens.has_value()) {
    call.sequences = device_index(op, "cu_seqlens", *in.cu_seqlens);
    call.p.sequences = {call.sequences->data, call.sequences->is_64};
  }
}

}  // namespace

static std::tuple<Tensor, Tensor> moa_attention_cuda(const Tensor& q, const Tensor& k,
                                                     const Tensor& v, std::string kind, bool causal,
                                                     double scale, int64_t window, double softcap,
                                                     const OptTensor& cu_seqlens) {
  const Op op("moa_attention", q);
  DeviceCall call;
  check_device_call(op,
                    {.q = q,
                     .k = k,
                     .v = v,
                     .kind = kind,
                     .causal = causal,
                     .scale = scale,
                     .window = window,
                     .softcap = softcap,
                     .cu_seqlens = cu_seqlens},
                    call);
  cuda::MoaAttentionParams& p = call.p;
  Tensor out = device_empty(q, {p.batch, p.num_tokens, p.num_slots, p.num_heads, p.head_size},
                            q.scalar_type());
  Tensor state = device_empty(q, {p.batch, p.num_tokens, p.num_slots, p.num_heads},
                              accumulate_type(q.scalar_type()));
  if (is_empty(p)) return {out, state};
  Tensor workspace = device_empty(q, {cuda::moa_attention_workspace(p)}, ScalarType::Byte);
  p.workspace = workspace.mutable_data_ptr();
  p.out = out.mutable_data_ptr();
  p.state = state.mutable_data_ptr();
  check_status(op, cuda::moa_attention(p, current_stream(q)));
  return {out, state};
}

static std::tuple<Tensor, Tensor, Tensor> moa_attention_bwd_cuda(
    const Tensor& grad_out, const Tensor& grad_state, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& state, std::string kind, bool causal,
    double scale, int64_t window, double softcap, const OptTensor& cu_seqlens) {
  const Op op("moa_attention_bwd", q);
  DeviceCall call;
  check_device_call(op,
                    {.q = q,
                     .k = k,
                     .v = v,
                     .kind = kind,
                     .causal = causal,
                     .scale = scale,
                     .window = window,
                     .softcap = softcap,
                     .cu_seqlens = cu_seqlens},
                    call);
  check_saved(op, grad_out, grad_state, q, out, state);
  const ScalarType dtype = q.scalar_type(), acc = accumulate_type(dtype);
  const Tensor saved_out = dense(out), saved_state = contiguous_as(state, acc);
  const Tensor g_out = with_dense_rows(grad_out), g_state = contiguous_as(grad_state, acc);
  cuda::MoaAttentionBwdParams b;
  cuda::MoaAttentionParams& p = call.p;
  Tensor workspace = device_empty(q, {cuda::moa_attention_bwd_workspace(p)}, ScalarType::Byte);
  Tensor grad_q =
      device_empty(q, {p.batch, p.num_tokens, p.num_slots, p.num_heads, p.head_size}, dtype);
  Tensor grad_k = device_empty(q, {p.batch, p.num_keys, p.num_heads, p.head_size}, dtype);
  Tensor grad_v = device_empty(q, {p.batch, p.num_keys, p.num_heads, p.head_size}, dtype);
  p.workspace = workspace.mutable_data_ptr();
  p.out = const_cast<void*>(saved_out.const_data_ptr());
  p.state = const_cast<void*>(saved_state.const_data_ptr());
  b.fwd = p;
  b.grad_out = operand(g_out);
  b.grad_state = g_state.const_data_ptr();
  b.grad_q = grad_q.mutable_data_ptr();
  b.grad_k = grad_k.mutable_data_ptr();
  b.grad_v = grad_v.mutable_data_ptr();
  check_status(op, cuda::moa_attention_bwd(b, current_stream(q)));
  return {grad_q, grad_k, grad_v};
}

MOE_CUDA_LIBRARY(m) {
  m.impl("moa_attention", MOE_CUDA_BOX(moa_attention_cuda));
  m.impl("moa_attention_bwd", MOE_CUDA_BOX(moa_attention_bwd_cuda));
}

#endif  // MOE_OPS_WITH_CUDA

}  // namespace moe_ops::adapter
