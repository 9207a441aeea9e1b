"""The experts function that transformers calls as the forward of an experts module.

T tokens, H hidden size, I intermediate size, E experts, K top-k, N = T*K routed rows.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import activations as hf_activations

from moe_ops._private_torch import disable_modes
from moe_ops.expert_weights.packing import expert_ffn
from moe_ops.ops import grouped_gemm, permute, sort_slots, unpermute
from moe_ops.reference import gated_act as gated_act_reference


def experts_forward(
    self: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Runs the experts of a transformers MoE block on moe_ops.

    One ``moe_ffn`` where the module's activation is one that op knows; otherwise the same steps one
    by one around the module's own activation (and its norm of expert outputs, if it has one).

    Args:
        self: a module decorated with ``use_experts_implementation``; its layout flags, parameters
            and ``_apply_gate`` or ``act_fn`` are read, nothing is written.
        hidden_states: [T, H].
        top_k_index: [T, K], integer. Ids outside [0, E) are nobody's here, as under expert
            parallelism: their slots add nothing and get no gradient, whatever their weight holds.
        top_k_weights: [T, K], any float dtype, used in fp32.
        out_dtype: float32 for sums that are not rounded, which expert parallelism adds up.

    Returns:
        [T, H] in ``out_dtype``, or for None the dtype of ``hidden_states``. Where the parameters
        have another dtype, the products run in theirs, as in transformers' ``grouped_mm``.
    """
    has_gate = getattr(self, "has_gate", True)
    w_up, w_down = bank_views(self)
    b_up, b_down = bank_bias(self)
    post_norm = self.post_expert_norm if getattr(self, "has_post_expert_norm", False) else None

    act = self._apply_gate if has_gate else self.act_fn
    fused = fused_activation(self) if post_norm is None else None
    return _run(
        self,
        hidden_states,
        w_up,
        w_down,
        top_k_weights,
        top_k_index,
        act,
        fused,
        b_up=b_up,
        b_down=b_down,
        post_norm=post_norm,
        out_dtype=out_dtype,
    )


def bank_views(experts: Any) -> tuple[Tensor, Tensor]:
    """w_gate_up (w_up) and w_down as moe_ffn takes them; views, whatever the layout."""
    up_name = "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"
    w_up, w_down = getattr(experts, up_name), experts.down_proj
    if experts.is_transposed:  # [E, H, 2I] and [E, I, H]: the ops read views of any stride.
        return w_up.transpose(1, 2), w_down.transpose(1, 2)
    return w_up, w_down


def bank_bias(experts: Any) -> tuple[Tensor | None, Tensor | None]:
    """b_gate_up (b_up) and b_down."""
    if not experts.has_bias:
        return None, None
    up_name = "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"
    return getattr(experts, f"{up_name}_bias"), experts.down_proj_bias


def run_gated(
    bank: nn.Module,
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    act_fn: Callable[[Tensor], Tensor],
    *,
    apply_router_weight_on_input: bool = False,
) -> Tensor:
    """moe_ffn without biases and with ``act_fn(gate) * up`` between, for any `act_fn`.

    `bank` is the module that the weights belong to and that keeps a packed copy of them.
    """

    def act(preact: Tensor) -> Tensor:
        gate, up = preact.chunk(2, dim=-1)
        return act_fn(gate) * up

    fused = fused_gate(act_fn)
    on_input = apply_router_weight_on_input
    return _run(bank, x, w_gate_up, w_down, topk_weights, topk_ids, act, fused, on_input=on_input)


def _run(
    bank: nn.Module,
    hidden_states: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    act: Callable[[Tensor], Tensor],
    fused: dict[str, Any] | None,
    *,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    post_norm: nn.Module | None = None,
    on_input: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    result_dtype = hidden_states.dtype if out_dtype is None else out_dtype
    x = cast_like(hidden_states, w_up)
    b_up = None if b_up is None else cast_like(b_up, w_up)
    b_down = None if b_down is None else cast_like(b_down, w_down)
    if fused is not None and w_up.dtype == w_down.dtype:
        rest: dict[str, Any] = {} if out_dtype is None else {"out_dtype": out_dtype}
        y = expert_ffn(
            bank,
            x,
            w_up,
            w_down,
            topk_weights,
            topk_ids,
            b_gate_up=b_up,
            b_down=b_down,
            apply_router_weight_on_input=on_input,
            **fused,
            **rest,
        )
        return y.to(result_dtype)

    num_tokens, top_k = topk_ids.shape
    if on_input:  # Each slot becomes a token of its own with one expert.
        x = (x[:, None, :] * topk_weights[:, :, None].to(x.dtype)).flatten(0, 1)
        topk_ids = topk_ids.reshape(-1, 1)
    expert_offsets, row_to_slot, slot_to_row = sort_slots(topk_ids, w_up.shape[0])
    rows = permute(x, expert_offsets, row_to_slot)
    h = act(grouped_gemm(rows, w_up, expert_offsets, bias=b_up))
    rows = grouped_gemm(cast_like(h, w_down), w_down, expert_offsets, bias=b_down)
    if post_norm is not None:
        rows = post_norm(rows)
    y = unpermute(rows, expert_offsets, slot_to_row, None if on_input else topk_weights)
    if on_input:
        y = y.view(num_tokens, top_k, y.shape[-1]).sum(1)
    return y.to(result_dtype)


def cast_like(t: Tensor, weight: Tensor) -> Tensor:
    """`t` in the dtype of `weight`; untouched under autocast, where the ops choose the dtype."""
    if t.dtype == weight.dtype or torch.is_autocast_enabled(t.device.type):
        return t
    return t.to(weight.dtype)


# By exact class: a subclass may compute something else. The four tanh forms differ by rounding.
_ACTIVATION_OF_CLASS: dict[type, str] = {nn.SiLU: "silu", nn.ReLU: "relu"}
for _class_name, _activation in (
    ("SiLUActivation", "silu"),
    ("GELUActivation", "gelu"),
    ("GELUTanh", "gelu_tanh"),
    ("NewGELUActivation", "gelu_tanh"),
    ("FastGELUActivation", "gelu_tanh"),
    ("AccurateGELUActivation", "gelu_tanh"),
    ("ReLUSquaredActivation", "relu2"),
):
    if hasattr(hf_activations, _class_name):
        _ACTIVATION_OF_CLASS[getattr(hf_activations, _class_name)] = _activation

_GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}


def fused_gate(act_fn: Callable[[Tensor], Tensor]) -> dict[str, Any] | None:
    """The activation arguments of moe_ffn that compute ``act_fn(gate) * up``; None if none do."""
    name = activation_name(act_fn)
    return {"activation": _GATED[name]} if name in _GATED else None


def activation_name(act_fn: Callable[[Tensor], Tensor]) -> str | None:
    """What `act_fn` computes, as moe_ffn names its plain activations; None when unknown.

    A module with forward hooks counts as unknown: inside a fused op they would never run.
    """
    if not isinstance(act_fn, nn.Module) or act_fn._forward_hooks or act_fn._forward_pre_hooks:
        return None
    if type(act_fn) is nn.GELU:
        return "gelu" if act_fn.approximate == "none" else "gelu_tanh"
    return _ACTIVATION_OF_CLASS.get(type(act_fn))


def fused_activation(experts: Any) -> dict[str, Any] | None:
    """The activation arguments of moe_ffn that compute what this module does; None if none do."""
    if not getattr(experts, "has_gate", True):
        name = activation_name(experts.act_fn)
        return None if name is None else {"activation": name}
    if "_apply_gate" in experts.__dict__:  # Replaced on this one module.
        return None
    kind = gate_kind(type(experts)._apply_gate)
    if kind == "act_fn":
        return fused_gate(experts.act_fn)
    if kind == "unknown":
        return None
    return {
        "activation": "swiglu_oai",
        "interleaved": kind == "clamped_interleaved",
        "alpha": float(experts.alpha),
        "limit": float(experts.limit),
    }


_GATE_KINDS: dict[Callable[..., Tensor], str] = {}


@torch.compiler.assume_constant_result
def gate_kind(apply_gate: Callable[..., Tensor]) -> str:
    """Which gate an `_apply_gate` function is: act_fn, clamped, clamped_interleaved or unknown.

    act_fn is transformers' default, ``act_fn(gate) * up`` on halves; the clamped ones are gpt-oss's
    with the attributes `alpha` and `limit`. The function is judged by what it computes on a few
    numbers in fp64, once: its name would not show a changed formula.
    """
    if apply_gate not in _GATE_KINDS:
        # from_pretrained builds models with "meta" as the default device: what the function makes
        # of its own must not go there either.
        with disable_modes(), torch.device("cpu"), torch.no_grad():
            _GATE_KINDS[apply_gate] = _probe_gate(apply_gate)
    return _GATE_KINDS[apply_gate]


def _probe_gate(apply_gate: Callable[..., Tensor]) -> str:
    # Small values, and large ones that any clamp would show. No gate equals its up.
    where: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    steps = torch.arange(64, **where).reshape(2, 32)
    gate_up = torch.sin(3.0 * steps + 0.5) * torch.tensor([[3.0], [2000.0]], **where)
    module = SimpleNamespace(act_fn=torch.sin, alpha=1.25, limit=1.5)
    try:
        actual = apply_gate(module, gate_up.clone())
    except Exception:  # It needs more than these attributes, so it is none of the known gates.
        return "unknown"
    gate, up = gate_up.chunk(2, dim=-1)
    expected = {"act_fn": torch.sin(gate) * up}
    for kind, interleaved in (("clamped", False), ("clamped_interleaved", True)):
        expected[kind] = gated_act_reference(
            gate_up, "swiglu_oai", interleaved=interleaved, alpha=module.alpha, limit=module.limit
        )
    for kind, value in expected.items():
        if actual.shape == value.shape and torch.allclose(actual, value, rtol=1e-12, atol=1e-12):
            return kind
    return "unknown"
