// Every schema of torch.ops.moe_ops on one page. Letters: T tokens, H hidden, I intermediate,
// E experts, K top-k, N = T*K slots, O output features. Fake, autograd and autocast rules live in
// python/moe_ops/ops/, one file an op; implementations are registered at the end of each adapter.
// Optional tensors are not keyword-only here: torch.library.register_autograd does not see those.
#include <torch/csrc/stable/library.h>

static void define_schemas(torch::stable::detail::StableLibrary& m) {
  // --- routing
  // x [T,H], weight [E,H] -> router_logits [T,E] in logits_dtype: x's, or the one it is summed in.
  m.def(
      "router_linear(Tensor x, Tensor weight, Tensor? bias=None, ScalarType? logits_dtype=None) "
      "-> Tensor");
  m.def(
      "router_linear_bwd(Tensor grad_logits, Tensor x, Tensor weight, bool need_x, "
      "bool need_weight, bool need_bias) "
      "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  // router_logits [T,E] -> topk_weights [T,K] fp32, topk_ids [T,K] int32. Ties: the smaller id.
  m.def(
      "topk_router(Tensor router_logits, int top_k, str score_func=\"softmax\", "
      "bool topk_first=False, bool renormalize=False, float routed_scaling_factor=1.0, "
      "Tensor? expert_bias=None, int num_groups=1, int num_topk_groups=1, "
      "str group_score=\"max\") -> (Tensor topk_weights, Tensor topk_ids)");
  m.def(
      "topk_router_bwd(Tensor grad_weights, Tensor router_logits, Tensor topk_ids, "
      "str score_func, bool topk_first, bool renormalize, float routed_scaling_factor) -> Tensor");
  // The shortest prefix of experts whose probability reaches top_p; unused slots hold id -1.
  m.def(
      "topp_router(Tensor router_logits, float top_p, int max_k, *, int min_k=1, "
      "bool renormalize=False, float routed_scaling_factor=1.0) "
      "-> (Tensor topk_weights, Tensor topk_ids)");
  m.def(
      "topp_router_bwd(Tensor grad_weights, Tensor router_logits, Tensor topk_ids, "
      "bool renormalize, float routed_scaling_factor) -> Tensor");
  // Each expert takes its `capacity` best tokens; result in slot form [T,E].
  m.def(
      "expert_choice_router(Tensor router_logits, int capacity, *, str score_func=\"softmax\", "
      "float routed_scaling_factor=1.0) -> (Tensor topk_weights, Tensor topk_ids)");
  m.def(
      "expert_choice_router_bwd(Tensor grad_weights, Tensor router_logits, Tensor topk_ids, "
      "str score_func, float routed_scaling_factor) -> Tensor");

  // --- permutation
  // Stable counting sort of slots by expert; slots without an expert go to the tail. All int32.
  m.def(
      "sort_by_expert(Tensor topk_ids, int num_experts) "
      "-> (Tensor expert_offsets, Tensor row_to_slot, Tensor slot_to_row)");
  // For experts on several ranks: a row for each token and each rank that it goes to, sorted by
  // rank -> rank_offsets [n+1], row_to_token [R], slot_to_row [T,K], local_ids [R,K], all int32,
  // R = T * min(K, n); -1 where there is none.
  m.def(
      "dispatch_layout(Tensor topk_ids, int num_ranks, int experts_per_rank, Tensor? "
      "physical=None) "
      "-> (Tensor rank_offsets, Tensor row_to_token, Tensor slot_to_row, Tensor local_ids)");
  // x [T,H] -> rows [N,H]; rows past expert_offsets[E] and those whose slot is -1 are zero. top_k
  // None: N / T.
  m.def("permute(Tensor x, Tensor expert_offsets, Tensor row_to_slot, int? top_k=None) -> Tensor");
  m.def(
      "permute_bwd(Tensor grad_rows, Tensor expert_offsets, Tensor row_to_slot, int num_tokens, "
      "int? top_k=None) -> Tensor");
  // rows [N,H], any number -> y [T,H]: weighted sum over a token's slots, in fp32 and in slot
  // order; slots whose row is -1 add nothing.
  m.def(
      "unpermute(Tensor rows, Tensor expert_offsets, Tensor slot_to_row, "
      "Tensor? topk_weights=None) -> Tensor");
  m.def(
      "unpermute_bwd(Tensor grad_y, Tensor rows, Tensor expert_offsets, Tensor slot_to_row, "
      "Tensor? topk_weights) -> (Tensor grad_rows, Tensor grad_topk_weights)");

  // --- expert arithmetic
  // [..., 2I] -> [..., I]
  m.def(
      "gated_act(Tensor gate_up, str activation=\"swiglu\", *, bool interleaved=False, "
      "float alpha=1.702, float limit=7.0) -> Tensor");
  m.def(
      "gated_act_bwd(Tensor grad_h, Tensor gate_up, str activation, bool interleaved, "
      "float alpha, float limit) -> Tensor");
  // a [N,K] with b [E,O,K], ragged over rows: out[r] = b[e(r)] a[r] + bias[e(r)]
  m.def("grouped_gemm(Tensor a, Tensor b, Tensor expert_offsets, Tensor? bias=None) -> Tensor");
  // grad [N,O], a [N,K] -> [E,O,K]: the sum over an expert's rows of grad^T a
  m.def("grouped_gemm_wgrad(Tensor grad, Tensor a, Tensor expert_offsets) -> Tensor");
  // x [N,D] -> codes [N,D] float8_e4m3fn, scale [N,ceil(D/128)] fp32: x is about q * scale.
  m.def("quantize_fp8(Tensor x) -> (Tensor q, Tensor scale)");
  // The rows of experts, x [N,D] or those that row_to_slot [N] takes from x [T,D] (times
  // topk_weights [T,K]) -> codes [D,128 G], scale [G,D], G = N/128 + E: a scale for 128 rows of an
  // expert, counted from its first one.
  m.def(
      "quantize_fp8_columns(Tensor x, Tensor expert_offsets, Tensor? row_to_slot=None, "
      "Tensor? topk_weights=None) -> (Tensor q, Tensor scale)");
  // grouped_gemm of float8_e4m3fn a [N,K] and b [E,O,K] with fp32 scales: a_scale
  // [N,ceil(K/128)], b_scale [E,ceil(O/128),ceil(K/128)]. Inference only.
  m.def(
      "grouped_gemm_fp8(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor expert_offsets, "
      "ScalarType out_dtype, Tensor? bias=None) -> Tensor");
  // Its weight gradient from columns: grad [O,128 G], a [K,128 G], scales [G,O] and [G,K] ->
  // [E,O,K]; or added to main_grad, with a result of shape [0].
  m.def(
      "grouped_gemm_fp8_wgrad(Tensor grad, Tensor grad_scale, Tensor a, Tensor a_scale, "
      "Tensor expert_offsets, ScalarType out_dtype) -> Tensor");
  m.def(
      "grouped_gemm_fp8_wgrad_accumulate(Tensor grad, Tensor grad_scale, Tensor a, "
      "Tensor a_scale, Tensor expert_offsets, Tensor(a!) main_grad) -> Tensor");
  // rows [N,O] -> [E,O]: the sum over an expert's rows
  m.def("grouped_sum(Tensor rows, Tensor expert_offsets) -> Tensor");

  // sum = x + residual + bias [..., H], rstd [rows] the inverse of its root mean square and y =
  // sum * rstd * weight. Without anything to add, sum is x and comes back with shape [0].
  m.def(
      "add_rms_norm(Tensor x, Tensor weight, Tensor? residual=None, Tensor? bias=None, "
      "float eps=1e-06) -> (Tensor y, Tensor sum, Tensor rstd)");
  // grad_x is the gradient of the residual too.
  m.def(
      "add_rms_norm_bwd(Tensor grad_y, Tensor? grad_sum, Tensor sum, Tensor weight, Tensor rstd, "
      "bool need_x, bool need_weight, bool need_bias) "
      "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");

  // grouped_gemm of quantized weights; `format` names one of moe_ops/weight_format.h, which says
  // what dtypes and shapes b, b_scale and b_zero have: "int4 g64" is uint8 [E,O,K/2] with float32
  // [E,O,K/64]. They have no gradient.
  m.def(
      "grouped_gemm_quantized(Tensor a, Tensor b, Tensor b_scale, Tensor expert_offsets, "
      "str format, Tensor? bias=None, Tensor? b_zero=None) -> Tensor");
  // grouped_gemm_quantized without rounding of a; transposed: a [N,O] -> [N,K], which is the
  // gradient of a.
  m.def(
      "grouped_gemm_quantized_exact(Tensor a, Tensor b, Tensor b_scale, Tensor expert_offsets, "
      "str format, Tensor? bias=None, Tensor? b_zero=None, bool transposed=False) -> Tensor");

  // --- whole blocks x [T,H] -> residual + residual_scale * sigmoid(output_gate norm(x)) * w_down
  // (act(w_gate norm(x)) * w_up norm(x)), [T,O]; w_gate and w_up [I,H], w_down [O,I] in
  // `formats`, where "float" is x's dtype. Operands that are None are left out. Inference only.
  m.def(
      "gated_mlp_decode(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, Tensor? "
      "w_gate_scale=None, "
      "Tensor? w_up_scale=None, Tensor? w_down_scale=None, Tensor? norm_weight=None, "
      "float eps=1e-06, Tensor? output_gate=None, Tensor? residual=None, "
      "float residual_scale=1.0, str activation=\"swiglu\", str formats=\"float\") -> Tensor");
  // y[t] = sum_k topk_weights[t,k] * (w_down[e] act(w_gate_up[e] x[t] + b_gate_up[e]) + b_down[e])
  // in out_dtype: x's, or the one it is summed in, as grad_y is then.
  m.def(
      "moe_ffn(Tensor x, Tensor w_gate_up, Tensor w_down, Tensor topk_weights, Tensor topk_ids, "
      "Tensor? b_gate_up=None, Tensor? b_down=None, str activation=\"swiglu\", "
      "bool interleaved=False, bool apply_router_weight_on_input=False, float alpha=1.702, "
      "float limit=7.0, ScalarType? out_dtype=None) -> Tensor");
  // A copy of expert weights [E,O,K] in the order in which this machine's kernels read them, as
  // bytes; halves: the two halves of the features are gate and up.
  m.def("pack_experts(Tensor w, bool halves=False) -> Tensor");
  // moe_ffn that reads such copies; inference only. w_gate_up and w_down stay the truth: where the
  // copies do not match them any more, they are used. packed_only: only their shapes are read.
  m.def(
      "moe_ffn_packed(Tensor x, Tensor w_gate_up, Tensor w_down, Tensor packed_gate_up, "
      "Tensor packed_down, Tensor topk_weights, Tensor topk_ids, Tensor? b_gate_up=None, "
      "Tensor? b_down=None, str activation=\"swiglu\", bool interleaved=False, "
      "bool apply_router_weight_on_input=False, float alpha=1.702, float limit=7.0, ScalarType? "
      "out_dtype=None, bool packed_only=False) -> Tensor");
  // moe_ffn of quantized weights; `format` names that of both, or of each: "q4_k, q6_k"; x_scale
  // [H]: factors of x. Gradients of x and topk_weights only.
  m.def(
      "moe_ffn_quantized(Tensor x, Tensor w_gate_up, Tensor w_gate_up_scale, Tensor w_down, "
      "Tensor w_down_scale, Tensor topk_weights, Tensor topk_ids, str format, "
      "Tensor? x_scale=None, Tensor? b_gate_up=None, Tensor? b_down=None, "
      "str activation=\"swiglu\", bool interleaved=False, "
      "bool apply_router_weight_on_input=False, float alpha=1.702, "
      "float limit=7.0, Tensor? w_gate_up_zero=None, Tensor? w_down_zero=None) -> Tensor");
  // moe_ffn_quantized for training: also returns the pre-activation [N,2I] and the routing.
  m.def(
      "moe_ffn_quantized_fwd(Tensor x, Tensor w_gate_up, Tensor w_gate_up_scale, Tensor w_down, "
      "Tensor w_down_scale, Tensor topk_weights, Tensor topk_ids, str format, "
      "Tensor? x_scale=None, Tensor? b_gate_up=None, Tensor? b_down=None, "
      "str activation=\"swiglu\", bool interleaved=False, "
      "bool apply_router_weight_on_input=False, float alpha=1.702, "
      "float limit=7.0, Tensor? w_gate_up_zero=None, Tensor? w_down_zero=None) "
      "-> (Tensor y, Tensor preact, Tensor expert_offsets, Tensor row_to_slot, Tensor "
      "slot_to_row)");
  // grad_x is the gradient of x times x_scale. Gradients that are not wanted have shape [0].
  m.def(
      "moe_ffn_quantized_bwd(Tensor grad_y, Tensor x, Tensor w_gate_up, Tensor w_gate_up_scale, "
      "Tensor w_down, Tensor w_down_scale, Tensor topk_weights, Tensor preact, "
      "Tensor expert_offsets, Tensor row_to_slot, Tensor slot_to_row, str format, "
      "Tensor? b_gate_up, "
      "Tensor? b_down, str activation, bool interleaved, bool apply_router_weight_on_input, "
      "float alpha, float limit, Tensor? w_gate_up_zero, Tensor? w_down_zero, bool need_x, "
      "bool need_topk_weights) -> (Tensor grad_x, Tensor grad_topk_weights)");
  // moe_ffn of frozen weights with low-rank terms, for inference and training. format: that of
  // quantized weights, "" for weights of x's type. Factors a [G,r,D] and b [G,O,r]: G = E, E *
  // num_adapters, or 1 for one that all share. low_gate_up and low_down: scaling * a times the rows
  // that meet each weight.
  m.def(
      "moe_ffn_lora_fwd(Tensor x, Tensor w_gate_up, Tensor? w_gate_up_scale, "
      "Tensor? w_gate_up_zero, Tensor w_down, Tensor? w_down_scale, Tensor? w_down_zero, "
      "str format, Tensor? b_gate_up, Tensor? b_down, Tensor topk_weights, Tensor topk_ids, "
      "Tensor? lora_a_gate_up, Tensor? lora_b_gate_up, Tensor? lora_a_down, Tensor? lora_b_down, "
      "float scaling, Tensor? adapter_ids, int num_adapters, str activation, bool interleaved, "
      "bool apply_router_weight_on_input, float alpha, float limit, bool training) -> "
      "(Tensor y, Tensor preact, Tensor low_gate_up, Tensor low_down, Tensor group_offsets, "
      "Tensor row_to_slot, Tensor slot_to_row)");
  m.def(
      "moe_ffn_lora_bwd(Tensor grad_y, Tensor x, Tensor w_gate_up, Tensor? w_gate_up_scale, "
      "Tensor? w_gate_up_zero, Tensor w_down, Tensor? w_down_scale, Tensor? w_down_zero, "
      "str format, Tensor? b_gate_up, Tensor? b_down, Tensor topk_weights, "
      "Tensor? lora_a_gate_up, Tensor? lora_b_gate_up, Tensor? lora_a_down, Tensor? lora_b_down, "
      "float scaling, Tensor? adapter_ids, int num_adapters, Tensor preact, Tensor low_gate_up, "
      "Tensor low_down, Tensor group_offsets, Tensor row_to_slot, Tensor slot_to_row, str "
      "activation, "
      "bool interleaved, bool apply_router_weight_on_input, float alpha, float limit, "
      "bool need_x, bool need_topk_weights, bool need_a_gate_up, bool need_b_gate_up, "
      "bool need_a_down, bool need_b_down) -> (Tensor grad_x, Tensor grad_topk_weights, "
      "Tensor grad_a_gate_up, Tensor grad_b_gate_up, Tensor grad_a_down, Tensor grad_b_down)");
  // moe_ffn of weights float8_e4m3fn [E,O,D] with scales [E,ceil(O/128),ceil(D/128)]; x and the
  // activated features become float8_e4m3fn too, with a scale for 128 of a row. x may come as such
  // codes, with x_scale [T,ceil(H/128)] and an out_dtype. Inference only.
  m.def(
      "moe_ffn_fp8(Tensor x, Tensor w_gate_up, Tensor w_gate_up_scale, Tensor w_down, "
      "Tensor w_down_scale, Tensor topk_weights, Tensor topk_ids, Tensor? b_gate_up=None, "
      "Tensor? b_down=None, str activation=\"swiglu\", bool interleaved=False, "
      "bool apply_router_weight_on_input=False, float alpha=1.702, float limit=7.0, Tensor? "
      "x_scale=None, ScalarType? out_dtype=None) -> Tensor");
  // moe_ffn for training: also returns the pre-activation [N,2I] and the routing.
  m.def(
      "moe_ffn_fwd(Tensor x, Tensor w_gate_up, Tensor w_down, Tensor topk_weights, "
      "Tensor topk_ids, Tensor? b_gate_up=None, Tensor? b_down=None, "
      "str activation=\"swiglu\", bool interleaved=False, "
      "bool apply_router_weight_on_input=False, float alpha=1.702, float limit=7.0, ScalarType? "
      "out_dtype=None) "
      "-> (Tensor y, Tensor preact, Tensor expert_offsets, Tensor row_to_slot, Tensor "
      "slot_to_row)");
  // Gradients that are not wanted come back with shape [0].
  m.def(
      "moe_ffn_bwd(Tensor grad_y, Tensor x, Tensor w_gate_up, Tensor w_down, Tensor topk_weights, "
      "Tensor preact, Tensor expert_offsets, Tensor row_to_slot, Tensor slot_to_row, "
      "Tensor? b_down, str activation, bool interleaved, bool apply_router_weight_on_input, "
      "float alpha, float limit, bool need_x, bool need_w_gate_up, bool need_w_down, "
      "bool need_topk_weights, bool need_b_gate_up, bool need_b_down) "
      "-> (Tensor grad_x, Tensor grad_w_gate_up, Tensor grad_w_down, Tensor grad_topk_weights, "
      "Tensor grad_b_gate_up, Tensor grad_b_down)");
  // moe_ffn_bwd with the weight gradients added to main_w_gate_up and main_w_down if given; the
  // corresponding results have shape [0].
  m.def(
      "moe_ffn_bwd_accumulate(Tensor grad_y, Tensor x, Tensor w_gate_up, Tensor w_down, "
      "Tensor topk_weights, Tensor preact, Tensor expert_offsets, Tensor row_to_slot, "
      "Tensor slot_to_row, Tensor? b_down, str activation, bool interleaved, "
      "bool apply_router_weight_on_input, float alpha, float limit, bool need_x, "
      "bool need_w_gate_up, bool need_w_down, bool need_topk_weights, bool need_b_gate_up, "
      "bool need_b_down, Tensor(a!)? main_w_gate_up, Tensor(b!)? main_w_down) "
      "-> (Tensor grad_x, Tensor grad_w_gate_up, Tensor grad_w_down, Tensor grad_topk_weights, "
      "Tensor grad_b_gate_up, Tensor grad_b_down)");
  // x [T,H], w [E,O,H] -> [T,K,O]: each token through each of its experts; empty slots are zero.
  m.def("moe_linear_map(Tensor x, Tensor w, Tensor topk_ids, Tensor? bias=None) -> Tensor");
  m.def(
      "moe_linear_map_bwd(Tensor grad_h, Tensor x, Tensor w, Tensor topk_ids, bool need_x, "
      "bool need_w, bool need_bias) -> (Tensor grad_x, Tensor grad_w, Tensor grad_bias)");
  // h [T,K,D], w [E,H,D] -> [T,H]: sum_k topk_weights[t,k] * (w[e] h[t,k] + bias[e])
  m.def(
      "moe_linear_reduce(Tensor h, Tensor w, Tensor topk_weights, Tensor topk_ids, "
      "Tensor? bias=None) -> Tensor");
  m.def(
      "moe_linear_reduce_bwd(Tensor grad_y, Tensor h, Tensor w, Tensor topk_weights, "
      "Tensor topk_ids, Tensor? bias, bool need_h, bool need_w, bool need_topk_weights, "
      "bool need_bias) -> (Tensor grad_h, Tensor grad_w, Tensor grad_topk_weights, "
      "Tensor grad_bias)");
  // x [T,H], tables w_gate_up [E,G,H] (G = 2 with a gate, else 1) and w_down [E,H,1] of experts of
  // one neuron -> [T,H]: sum_k topk_weights[t,k] * act(w_gate_up[e] x[t]) * w_down[e]
  m.def(
      "peer_ffn(Tensor x, Tensor w_gate_up, Tensor w_down, Tensor topk_weights, Tensor topk_ids, "
      "str activation=\"gelu\", bool sparse_grad=False) -> Tensor");
  // peer_ffn for training: also returns the pre-activation [T,G,K].
  m.def(
      "peer_ffn_fwd(Tensor x, Tensor w_gate_up, Tensor w_down, Tensor topk_weights, "
      "Tensor topk_ids, str activation=\"gelu\", bool sparse_grad=False) "
      "-> (Tensor y, Tensor preact)");
  // Gradients of the tables have num_rows rows, row r the sum over the slots whose grad_ids [T,K]
  // is r; without grad_ids, whose topk_ids is. Gradients that are not wanted have shape [0].
  m.def(
      "peer_ffn_bwd(Tensor grad_y, Tensor x, Tensor w_gate_up, Tensor w_down, "
      "Tensor topk_weights, Tensor topk_ids, Tensor preact, Tensor? grad_ids, str activation, "
      "int num_rows, bool need_x, bool need_w_gate_up, bool need_w_down, bool need_topk_weights) "
      "-> (Tensor grad_x, Tensor grad_w_gate_up, Tensor grad_w_down, Tensor grad_topk_weights)");

  // --- every expert on every token
  // x [T,G,H], w_up [E,I,H], w_down [E,O,I], input_ids [E] in [0,G) -> [T,E,O]:
  // w_down[e] act(w_up[e] x[t, input_ids[e]] + b_up[e]) + b_down[e]
  m.def(
      "all_experts_ffn(Tensor x, Tensor w_up, Tensor w_down, Tensor input_ids, Tensor? b_up=None, "
      "Tensor? b_down=None, str activation=\"relu\") -> Tensor");
  // all_experts_ffn for training: also returns the pre-activation [E,T,I].
  m.def(
      "all_experts_ffn_fwd(Tensor x, Tensor w_up, Tensor w_down, Tensor input_ids, Tensor? "
      "b_up=None, "
      "Tensor? b_down=None, str activation=\"relu\") -> (Tensor y, Tensor preact)");
  // Gradients that are not wanted come back with shape [0].
  m.def(
      "all_experts_ffn_bwd(Tensor grad_y, Tensor x, Tensor w_up, Tensor w_down, Tensor input_ids, "
      "Tensor preact, str activation, bool need_x, bool need_w_up, bool need_w_down, "
      "bool need_b_up, bool need_b_down) -> (Tensor grad_x, Tensor grad_w_up, Tensor grad_w_down, "
      "Tensor grad_b_up, Tensor grad_b_down)");
  // outputs [T,E,O], weights [T,M,E] -> y [T,M,O]: sum_e weights[t,m,e] act(n[t,e]), times
  // factor [T/r,M,O], a row of which r tokens share, if given; n = outputs or, with norm_weight and
  // norm_bias [E,O], their normalization over tokens by mean and var [E,O], or by those of the
  // tokens, which come back ([0] where not computed).
  m.def(
      "mix_expert_outputs(Tensor outputs, Tensor weights, Tensor? factor=None, "
      "Tensor? norm_weight=None, Tensor? norm_bias=None, Tensor? mean=None, Tensor? var=None, str "
      "activation=\"none\", "
      "float eps=1e-05) -> (Tensor y, Tensor mean, Tensor var)");
  // batch: mean and var are those of the tokens. Gradients that are not wanted have shape [0].
  m.def(
      "mix_expert_outputs_bwd(Tensor grad_y, Tensor outputs, Tensor weights, Tensor? factor, "
      "Tensor? "
      "norm_weight, "
      "Tensor? norm_bias, Tensor? mean, Tensor? var, str activation, float eps, bool batch, "
      "bool need_weights, bool need_factor, bool need_norm_weight, bool need_norm_bias) -> "
      "(Tensor grad_outputs, Tensor grad_weights, Tensor grad_factor, Tensor grad_norm_weight, "
      "Tensor grad_norm_bias)");

  // --- attention t [B,S,...,d], cos and sin [S,d/2] or [B,S,d/2]: features i and i + d/2 are
  // rotated as a pair.
  m.def("rotary(Tensor t, Tensor cos, Tensor sin, bool inverse=False) -> Tensor");
  // x [B,S,H] -> x + residual_scale * attention of norm(x) over keys and values [B,m,L,d], whose
  // positions from `start` on get those of x. w_q [n d,H], w_k and w_v [m d,H], w_o [H,n d];
  // `formats` as of gated_mlp_decode. cos and sin [B or 1,S,r], the first
  // rotary_size / 2 of a row count; mask [B or 1,1,S,start + S] bool or float. Inference only.
  m.def(
      "attention_decode(Tensor x, Tensor w_q, Tensor w_k, Tensor w_v, Tensor w_o, Tensor cos, "
      "Tensor sin, Tensor(a!) keys, Tensor(b!) values, int start, int rotary_size, float scale, "
      "Tensor? norm_weight=None, float eps=1e-06, Tensor? b_q=None, Tensor? b_k=None, "
      "Tensor? b_v=None, Tensor? b_o=None, Tensor? w_q_scale=None, Tensor? w_k_scale=None, "
      "Tensor? w_v_scale=None, Tensor? w_o_scale=None, Tensor? q_norm=None, Tensor? k_norm=None, "
      "float head_eps=1e-06, Tensor? mask=None, Tensor? sinks=None, "
      "float residual_scale=1.0, str formats=\"float\") -> Tensor");
  // attention_decode for MLA. latents [B,1,L,r] and rope_keys [B,1,L,d_r] are the caches: the
  // normalized and the rotated part of w_kv_a x, [r + d_r,H]. w_q [n (d_n + d_r),H], or [..,r_q]
  // after w_q_a [r_q,H] and q_norm; w_kv_b [n (d_n + d_v),r] float; w_o [H,n d_v]. `formats` of
  // w_q, w_kv_a, w_o and w_q_a.
  m.def(
      "mla_decode(Tensor x, Tensor w_q, Tensor w_kv_a, Tensor kv_norm, Tensor w_kv_b, "
      "Tensor w_o, Tensor cos, Tensor sin, Tensor(a!) latents, Tensor(b!) rope_keys, int start, "
      "int num_heads, float scale, Tensor? norm_weight=None, float eps=1e-06, Tensor? w_q_a=None, "
      "Tensor? q_norm=None, float latent_eps=1e-06, Tensor? b_q=None, Tensor? b_q_a=None, "
      "Tensor? b_kv_a=None, Tensor? b_o=None, Tensor? w_q_scale=None, Tensor? w_q_a_scale=None, "
      "Tensor? w_kv_a_scale=None, Tensor? w_o_scale=None, bool interleaved=False, "
      "bool interleaved_keys=False, Tensor? mask=None, float residual_scale=1.0, "
      "str formats=\"float\") -> Tensor");
  // q [B,S,K,n,d], k and v [B,S_kv,n,d] -> out like q, state [B,S,K,n] fp32: the log-sum-exp of
  // softmax, what remains of the stick. window 0: all keys; softcap 0: none.
  m.def(
      "moa_attention(Tensor q, Tensor k, Tensor v, str kind, bool causal, float scale, "
      "int window, float softcap, Tensor? cu_seqlens) -> (Tensor out, Tensor state)");
  m.def(
      "moa_attention_bwd(Tensor grad_out, Tensor grad_state, Tensor q, Tensor k, Tensor v, "
      "Tensor out, Tensor state, str kind, bool causal, float scale, int window, float softcap, "
      "Tensor? cu_seqlens) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
}

STABLE_TORCH_LIBRARY(moe_ops, m) { define_schemas(m); }

#ifdef MOE_OPS_SIMULATED
// The CUDA adapters again, for CPU tensors: their kernels run on a simulator
// (docs/cuda-without-a-gpu.md).
STABLE_TORCH_LIBRARY(moe_ops_sim, m) { define_schemas(m); }
#endif
