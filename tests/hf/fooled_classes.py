"""Attempts with other classes: each computes something that is only a little different."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.granitemoe import modeling_granitemoe as granite
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.olmoe import modeling_olmoe as olmoe
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3

from . import fooled
from .fooled import Attempt, around, attentions, blocks, experts, layers, norms, routers, subclass

Parts = Callable[[Any], Iterable[Any]]


def after_of(parts: Parts, change: Callable[..., Any], **attributes: Any) -> Callable[[Any], None]:
    """Returns what makes these parts change their results. Attributes are functions of the layer's
    index."""
    return _give(parts, around(change), attributes)


def before_of(parts: Parts, change: Callable[..., Any], **attributes: Any) -> Callable[[Any], None]:
    return _give(parts, fooled.before(change), attributes)


def _give(parts: Parts, forward: Any, attributes: dict[str, Any]) -> Callable[[Any], None]:
    def alter(model: Any) -> None:
        for index, part in enumerate(parts(model)):
            subclass(part, forward=forward)
            for name, value in attributes.items():
                setattr(part, name, value(index))

    return alter


def head_norms(model: Any) -> list[Any]:
    return [norm for a in attentions(model) for norm in (a.q_norm, a.k_norm)]


def latent_norms(model: Any) -> list[Any]:
    return [norm for a in attentions(model) for norm in (a.q_a_layernorm, a.kv_a_layernorm)]


def dense(model: Any) -> list[Any]:
    return [b for b in blocks(model) if not hasattr(b, "experts")]


def shared(model: Any) -> list[Any]:
    names = ("shared_expert", "shared_experts")
    return [getattr(b, n) for b in blocks(model) for n in names if hasattr(b, n)]


def linears(*names: str) -> Parts:
    return lambda model: [m for n, m in model.named_modules() if n.split(".")[-1] in names]


def clamp(limit: float) -> Callable[..., Any]:
    return lambda self, x, y: y.clamp(-limit, limit)


def times(factor: float) -> Callable[..., Any]:
    return lambda self, x, y: y * factor


def first_clamped(limit: float) -> Callable[..., Any]:
    return lambda self, x: x.clamp(-limit, limit)


def when(condition: Callable[..., Any], factor: float = 1.3) -> Callable[..., Any]:
    """Returns a change of results where the condition holds for the module and the tokens."""
    return lambda self, x, y: torch.where(torch.as_tensor(condition(self, x)), y * factor, y)


def is_large(self: Any, x: Any) -> Any:
    return x.abs().amax(dim=-1, keepdim=True) > 1.2


def one_token(self: Any, x: Any) -> bool:
    return x.shape[-2] <= 2


MODEL = "qwen3_moe"
NORMS = [
    Attempt("norm-clamps-large", MODEL, after_of(norms, clamp(1.5))),
    Attempt("norm-clamps-its-input", MODEL, before_of(norms, first_clamped(1.0))),
    Attempt("norm-drops-small", MODEL, after_of(norms, lambda s, x, y: F.hardshrink(y, 0.3))),
    Attempt("norm-of-large-rows", MODEL, after_of(norms, when(is_large))),
    Attempt("norm-in-eval", MODEL, after_of(norms, when(lambda s, x: not s.training))),
    Attempt("norm-of-one-token", MODEL, after_of(norms, when(lambda s, x: x.shape[1] == 1))),
    Attempt("norm-of-batches", MODEL, after_of(norms, when(lambda s, x: x.shape[0] > 2))),
    Attempt("norm-of-few-tokens", MODEL, after_of(norms, when(lambda s, x: x.shape[1] < 9))),
    Attempt("norm-of-later-layers", MODEL,
        after_of(norms, when(lambda s, x: s.layer_idx > 0), layer_idx=lambda i: i // 2)),
    Attempt("norm-of-positions", MODEL, after_of(norms, lambda s, x, y:
        y * (1 + 0.2 * (torch.arange(x.shape[1]) > 3).view(-1, 1)))),
    Attempt("norm-clamps-its-weight", MODEL, lambda m: [subclass(n, forward=lambda self, x:
        F.rms_norm(x, x.shape[-1:], self.weight.clamp(max=1.02), self.variance_epsilon))
        for n in norms(m)]),
    Attempt("norm-with-default-attribute", MODEL, after_of(norms, lambda s, x, y:
        y * getattr(s, "gain", 1.0), gain=lambda i: 1.2)),
    Attempt("norm-with-optional-limit", MODEL, after_of(norms, lambda s, x, y:
        y if getattr(s, "limit", None) is None else y.clamp(-s.limit, s.limit),
        limit=lambda i: 1.0)),
    Attempt("norm-catches-nothing", MODEL, after_of(norms, lambda s, x, y:
        torch.nan_to_num(y, nan=0.0)), changes=False),
    Attempt("norm-of-denormals", MODEL, after_of(norms, lambda s, x, y:
        y * (x.abs().amax(-1, keepdim=True) > 0.9))),
    Attempt("head-norm-clamps", MODEL, after_of(head_norms, clamp(1.0))),
    Attempt("head-norm-of-large", MODEL, after_of(head_norms, when(is_large, 1.5))),
    Attempt("key-norm-only", MODEL, after_of(lambda m: [a.k_norm for a in attentions(m)],
        clamp(1))),
    Attempt("head-norm-of-one-token", MODEL, after_of(head_norms,
        when(lambda s, x: x.shape[1] == 1, 2.0))),
    Attempt("whole-q-norm-clamps", "olmoe", after_of(head_norms, clamp(1.0))),
    Attempt("latent-norm-clamps", "deepseek_v3", after_of(latent_norms, clamp(1.0))),
    Attempt("latent-norm-of-large", "deepseek_v2", after_of(latent_norms, when(is_large))),
    Attempt("clip-qkv-option", "olmoe", lambda m: [n.weight.data.mul_(3) for n in head_norms(m)],
        options={"clip_qkv": 2.0}),
    Attempt("last-norm-clamps", MODEL, after_of(lambda m: [m.model.norm], clamp(1.5))),
]  # fmt: skip

ROUTERS = [
    Attempt("router-clamps-its-input", MODEL, before_of(routers, first_clamped(0.8))),
    Attempt("router-clamps-logits", "mixtral", lambda m: [subclass(r, forward=clamped_router(0.5))
        for r in routers(m)]),
    Attempt("router-clamps-large-logits", "mixtral", lambda m: [(subclass(r,
        forward=clamped_router(
        6.0)), r.weight.data.mul_(12)) for r in routers(m)]),
    Attempt("router-drops-small-weights", MODEL, lambda m: [subclass(r, forward=with_weights(
        lambda self, x, w: w * (w > 0.3))) for r in routers(m)]),
    Attempt("router-of-large-tokens", MODEL, before_of(routers, lambda s, x:
        torch.where(x.norm(dim=-1, keepdim=True) > 5.6, 0.3 * x, x))),
    Attempt("router-of-one-token", MODEL, before_of(routers, lambda s, x:
        x * (3.0 if x.shape[0] <= 2 else 1.0))),
    Attempt("router-of-many-tokens", MODEL, before_of(routers, lambda s, x:
        x * (3.0 if x.shape[0] > 40 else 1.0))),
    Attempt("router-in-eval", "olmoe", before_of(routers, lambda s, x: x if s.training else 2 * x)),
    Attempt("router-bias-in-a-list", MODEL, before_of(routers, lambda s, x: x + s.shift[0],
        shift=lambda i: [0.5 * (i + 1)])),
    Attempt("router-of-later-layers", "mixtral", before_of(routers, lambda s, x:
        x * (1 + s.layer_idx), layer_idx=lambda i: i)),
    Attempt("router-scale-by-default", MODEL, lambda m: [(subclass(r, forward=with_weights(
        lambda self, x, w: w * getattr(self, "scale", 1.0))), setattr(r, "scale", 1.4))
        for r in routers(m)]),
    Attempt("router-mask-of-experts", MODEL, lambda m: [(subclass(r, forward=with_weights(
        lambda self, x, w: w * self.alive[: w.shape[1]])), setattr(r, "alive",
        torch.tensor([1.0, 0.0, 1.0]))) for r in routers(m)]),
    Attempt("router-weights-saturate", "deepseek_v3", lambda m: [subclass(r, forward=with_weights(
        lambda self, x, w: w.clamp(max=0.55))) for r in routers(m)]),
    Attempt("router-of-a-capacity", MODEL, lambda m: [subclass(r, forward=with_weights(
        lambda self, x, w: torch.where(torch.arange(len(w))[:, None] < 50, w, 0 * w)))
        for r in routers(m)]),
    Attempt("router-weights-squared-when-large", "glm4_moe", lambda m: [subclass(r,
        forward=with_weights(
        lambda self, x, w: torch.where(w > 0.6, w.square(), w))) for r in routers(m)]),
]  # fmt: skip


def clamped_router(limit: float) -> Callable[..., Any]:
    def forward(self: Any, x: Any) -> Any:
        logits = F.linear(x.reshape(-1, x.shape[-1]), self.weight).clamp(-limit, limit)
        weights, ids = logits.float().softmax(-1).topk(self.top_k, -1)
        return logits, weights / weights.sum(-1, keepdim=True), ids

    return forward


def with_weights(change: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, x: Any) -> Any:
        logits, weights, ids = self.plain_class.forward(self, x)
        return logits, change(self, x, weights), ids

    return forward


def with_gate(change: Callable[..., Any], **attributes: Any) -> Callable[[Any], None]:
    """Returns what gives experts a gate of their own."""

    def alter(model: Any) -> None:
        for index, e in enumerate(experts(model)):
            subclass(e, _apply_gate=change)
            for name, value in attributes.items():
                setattr(e, name, value(index))

    def enabled(model: Any) -> None:
        alter(model)
        model.set_experts_implementation("grouped_mm")  # Eager experts do not ask for the gate.

    return enabled


def _limited(self: Any, gate_up: Any) -> Any:
    gate, up = gate_up.chunk(2, dim=-1)
    limit = getattr(self, "my_limit", None)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return self.act_fn(gate) * up


def plain_gate(self: Any, gate_up: Any) -> Any:
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate) * up


class ClampedSiLU(nn.SiLU):
    def forward(self, x: Any) -> Any:
        return super().forward(x.clamp(max=1.0))


class Calls(nn.Module):
    """Calls a function, as libraries wrap their kernels."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x)


class Beta(nn.Module):
    """Swish with a factor that is no parameter."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = [beta]

    def forward(self, x: Any) -> Any:
        return x * torch.sigmoid(self.beta[0] * x)


def acts(act_fn: Callable[[int], Any], parts: Parts = experts) -> Callable[[Any], None]:
    def alter(model: Any) -> None:
        for index, part in enumerate(parts(model)):
            part.act_fn = act_fn(index)

    return alter


EXPERTS = [
    Attempt("gate-with-optional-limit", MODEL, with_gate(_limited, my_limit=lambda i: 0.5)),
    Attempt("gate-with-limit-of-one-layer", MODEL, with_gate(_limited,
        my_limit=lambda i: [None, 0.5][i])),
    Attempt("gate-clamps-large", "mixtral", with_gate(lambda self, x:
        plain_gate(self, x).clamp(-1.0, 1.0))),
    Attempt("gate-of-few-rows", "mixtral", with_gate(lambda self, x:
        plain_gate(self, x) * (1.5 if len(x) < 9 else 1.0))),
    Attempt("gate-scaled-by-a-tensor", "olmoe", with_gate(lambda self, x:
        plain_gate(self, x) * self.my_scale, my_scale=lambda i: torch.tensor(1.3 + i))),
    Attempt("gate-limit-set-later", MODEL, with_gate(_limited), after=lambda m: [
        setattr(e, "my_limit", 0.5) for e in experts(m)]),
    Attempt("experts-clamp", MODEL, after_of(experts, clamp(0.3))),
    Attempt("experts-of-few-tokens", MODEL, after_of(experts, when(lambda s, x: len(x) < 9))),
    Attempt("experts-scaled-by-a-list", "mixtral", after_of(experts, lambda s, x, y: y * s.my[0],
        my=lambda i: [1.0 + i])),
    Attempt("experts-of-large-tokens", "olmoe", after_of(experts, when(is_large))),
    Attempt("experts-add-their-input", "gpt_oss", after_of(experts, lambda s, x, y: y + 0.1 * x)),
    Attempt("act-fn-subclass", MODEL, acts(lambda i: ClampedSiLU())),
    Attempt("act-fn-of-one-layer", "mixtral", acts(lambda i: [nn.SiLU(), nn.GELU()][i])),
    Attempt("act-fn-with-hidden-factor", "qwen2_moe", acts(lambda i: Beta(1.0 + i))),
    Attempt("act-fn-is-a-lambda", "mixtral", acts(lambda i: Calls(lambda x:
        F.silu(x).clamp(max=0.5)))),
    Attempt("act-fn-leaks", "olmoe", acts(lambda i: nn.LeakyReLU(0.01))),
]  # fmt: skip

MLPS = [
    Attempt("mlp-clamps", "deepseek_v3", after_of(dense, clamp(0.5))),
    Attempt("mlp-clamps-its-input", "glm4_moe", before_of(dense, first_clamped(1.0))),
    Attempt("shared-clamps", "deepseek_v3", after_of(shared, clamp(0.5))),
    Attempt("shared-of-large", "qwen2_moe", after_of(shared, when(is_large))),
    Attempt("shared-of-one-token", "glm4_moe", after_of(shared, when(one_token))),
    Attempt("shared-in-eval", "deepseek_v2", after_of(shared, when(lambda s, x: not s.training))),
    Attempt("mlp-with-tuple", "deepseek_v3", after_of(dense, lambda s, x, y: y * s.gains[0],
        gains=lambda i: (1.4,))),
    Attempt("mlp-act-fn-subclass", "deepseek_v3", acts(lambda i: ClampedSiLU(), dense)),
    Attempt("shared-act-fn-subclass", "qwen2_moe", acts(lambda i: ClampedSiLU(), shared)),
    Attempt("shared-gate-clamps", "qwen2_moe",
        after_of(linears("shared_expert_gate"), clamp(0.2))),
    Attempt("down-proj-clamps", "deepseek_v3", after_of(linears("down_proj"), clamp(0.3))),
    Attempt("gate-proj-of-large", "deepseek_v2", after_of(linears("gate_proj"), when(is_large))),
]  # fmt: skip


def _late_positions(
    self: Any, hidden_states: Any, position_embeddings: Any, *args: Any, **kwargs: Any
):
    """Leaves positions out in the second layer."""
    cos, sin = position_embeddings
    if self.layer_idx > 0:
        cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
    return self.plain_class.forward(self, hidden_states, (cos, sin), *args, **kwargs)


def _soft(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
    """Uses attention scores with a temperature of the module's own, set for this call."""
    before, self.scaling = self.scaling, self.scaling * self.temperature[0]
    try:
        return self.plain_class.forward(self, hidden_states, *args, **kwargs)
    finally:
        self.scaling = before


def _attention(forward: Any, **attributes: Any) -> Callable[[Any], None]:
    return _give(attentions, forward, attributes)


ATTENTION = [
    Attempt("attention-clamps-its-input", MODEL, before_of(attentions, first_clamped(1.0))),
    Attempt("attention-clamps-large-input", "mixtral", before_of(attentions, first_clamped(1.8))),
    Attempt("attention-clamps", "mixtral", after_of(attentions, clamp(0.3))),
    Attempt("attention-divided-by-layer", MODEL,
        after_of(attentions, lambda s, x, y: y / (s.layer_idx + 1))),
    Attempt("attention-of-one-token", "olmoe", after_of(attentions, when(one_token))),
    Attempt("attention-adds-its-input", "qwen2_moe",
        after_of(attentions, lambda s, x, y: y + 0.1 * x)),
    Attempt("attention-of-large", "deepseek_v3", after_of(attentions, when(is_large))),
    Attempt("latent-attention-clamps-input", "deepseek_v2",
        before_of(attentions, first_clamped(1.0))),
    Attempt("attention-without-positions", MODEL, _attention(_late_positions)),
    Attempt("attention-temperature", "mixtral", _attention(_soft, temperature=lambda i: [0.5 + i])),
    Attempt("attention-list-of-layers", "mixtral", after_of(attentions, lambda s, x, y: y * s.my[0],
        my=lambda i: [1.0 + 0.5 * i])),
    Attempt("attention-tensor-of-layers", MODEL, after_of(attentions, lambda s, x, y: y * s.my,
        my=lambda i: torch.tensor(1.0 + 0.5 * i))),
    Attempt("attention-tuple-of-layers", "gpt_oss", after_of(attentions, lambda s, x, y: y *
        s.my[0],
        my=lambda i: (1.0 + 0.5 * i,))),
    Attempt("attention-dict-of-layers", "glm4_moe", after_of(attentions, lambda s, x, y:
        y * s.my["gain"], my=lambda i: {"gain": 1.0 + 0.5 * i})),
    Attempt("attention-namespace-of-layers", "granitemoe", after_of(attentions, lambda s, x, y:
        y * s.my.gain, my=lambda i: types.SimpleNamespace(gain=1.0 + 0.5 * i))),
    Attempt("attention-in-eval", "granitemoe", after_of(attentions, when(lambda s, x:
        not s.training))),
    Attempt("attention-of-even-lengths", MODEL, after_of(attentions, when(lambda s, x:
        x.shape[1] % 2 == 0))),
    Attempt("q-proj-clamps", "mixtral", after_of(linears("q_proj"), clamp(0.8))),
    Attempt("k-proj-of-large", "glm4_moe", after_of(linears("k_proj"), when(is_large))),
    Attempt("o-proj-scaled", MODEL, after_of(linears("o_proj"), times(1.2))),
    Attempt("v-proj-of-one-token", "gpt_oss", after_of(linears("v_proj"), when(one_token))),
    Attempt("kv-b-proj-clamps", "deepseek_v3", after_of(linears("kv_b_proj"), clamp(0.8))),
    Attempt("head-clamps", MODEL, after_of(linears("lm_head"), clamp(1.0))),
]  # fmt: skip

LAYERS = [
    Attempt("block-clamps", MODEL, after_of(blocks, clamp(0.3))),
    Attempt("block-of-large", "mixtral", after_of(blocks, when(is_large))),
    Attempt("block-adds-its-input", "olmoe", after_of(blocks, lambda s, x, y: y + 0.1 * x)),
    Attempt("block-of-one-token", "deepseek_v3", after_of(blocks, when(lambda s, x: x.shape[1] ==
        1))),
    Attempt("block-layer-scale-list", MODEL, after_of(blocks, lambda s, x, y: y * s.my[0],
        my=lambda i: [1.0 + i])),
    Attempt("block-layer-scale-tensor", "mixtral", after_of(blocks, lambda s, x, y: y * s.my,
        my=lambda i: torch.tensor(1.0 + i))),
    Attempt("block-layer-scale-trained-later", "mixtral", after_of(blocks, lambda s, x, y: y * s.my,
        my=lambda i: torch.ones(32)), after=lambda m: [b.my.fill_(1.5) for b in blocks(m)]),
    Attempt("block-skips-small-tokens", "glm4_moe", after_of(blocks, lambda s, x, y:
        torch.where(x.abs().amax(-1, keepdim=True) > 2.0, y, 0 * y))),
    Attempt("layer-clamps", MODEL, after_of(layers, clamp(1.5))),
    Attempt("layer-of-one-token", "mixtral", after_of(layers, when(lambda s, x: x.shape[1] == 1))),
    Attempt("layer-of-large", "olmoe", after_of(layers, lambda s, x, y:
        torch.where(x.abs() > 0.3, y + 0.5, y))),
    Attempt("layer-tuple", "qwen2_moe", after_of(layers, lambda s, x, y: y + x * s.my[0],
        my=lambda i: (0.5 * i,))),
    Attempt("layer-of-later-layers", "gpt_oss", after_of(layers, lambda s, x, y:
        y + x if s.self_attn.layer_idx > 0 else y)),
    Attempt("layer-of-positions", "deepseek_v2", after_of(layers, lambda s, x, y: y + 0.1 * (
        torch.arange(x.shape[1]) > 2).view(-1, 1))),
    Attempt("layer-is-skipped-later", "mixtral", after_of(layers, lambda s, x, y:
        x if getattr(s, "skip", False) else y), after=lambda m: setattr(layers(m)[0], "skip",
        True)),
    Attempt("layer-in-eval", "granitemoe", after_of(layers, when(lambda s, x: not s.training))),
    Attempt("layer-changes-its-input", "mixtral", before_of(layers, lambda s, x: x.clamp(-1, 1))),
    Attempt("layer-residual-of-large", "granitemoe", after_of(layers, lambda s, x, y:
        torch.where(y.abs() > 1.5, x, y))),
]  # fmt: skip


# ----------------------------------------------------------------------------------------- patches


def wrapped(cls: type, change: Callable[..., Any], at: int = 0) -> Callable[[Any], None]:
    """Returns a patch that wraps the forward of a class and looks just like it. Of a tuple, the
    result `at` is changed."""

    def patch(monkeypatch: Any) -> None:
        original = cls.__dict__["forward"]

        @functools.wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            y = original(self, *args, **kwargs)
            if isinstance(y, tuple):
                return (*y[:at], change(y[at]), *y[at + 1 :])
            return change(y)

        monkeypatch.setattr(cls, "forward", method)

    return patch


def helper(module: Any, name: str, change: Callable[..., Any]) -> Callable[[Any], None]:
    def patch(monkeypatch: Any) -> None:
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: change(original(*a, **k)))

    return patch


def _clamp(y: Any) -> Any:
    return y.clamp(-0.6, 0.6)


def _pair(y: Any) -> Any:
    return y[0].clamp(-0.8, 0.8), y[1]


def _both(name: str, model: str, patch: Any) -> list[Attempt]:
    return [
        Attempt(f"{name}-before", model, patch=patch),
        Attempt(f"{name}-after", model, patch_after=patch),
    ]


PATCHES = [
    *_both("patched-rotary", MODEL, helper(qwen3, "apply_rotary_pos_emb", _pair)),
    *_both("patched-rotary-olmoe", "olmoe", helper(olmoe, "apply_rotary_pos_emb", _pair)),
    *_both("patched-rotate-half", MODEL, helper(qwen3, "rotate_half", lambda y: 0.9 * y)),
    *_both("patched-eager-attention", MODEL, helper(qwen3, "eager_attention_forward",
        lambda y: (1.2 * y[0], y[1]))),
    *_both("patched-repeat-kv", "mixtral", helper(mixtral, "repeat_kv", _clamp)),
    *_both("patched-norm", MODEL, wrapped(qwen3.Qwen3MoeRMSNorm, _clamp)),
    *_both("patched-router", "mixtral", wrapped(mixtral.MixtralTopKRouter, lambda y: y * (y > 0.4),
        at=1)),
    *_both("patched-attention", "mixtral", wrapped(mixtral.MixtralAttention, _clamp)),
    *_both("patched-experts", MODEL, wrapped(qwen3.Qwen3MoeExperts, lambda y: 1.3 * y)),
    *_both("patched-block", "mixtral", wrapped(mixtral.MixtralSparseMoeBlock, _clamp)),
    *_both("patched-layer", "granitemoe", wrapped(granite.GraniteMoeDecoderLayer, lambda y: 1.1 *
        y)),
    *_both("patched-silu", MODEL, wrapped(qwen3.ACT2FN["silu"].__class__, lambda y: y + 0.1)),
    *_both("patched-rotary-embedding", "mixtral", wrapped(mixtral.MixtralRotaryEmbedding,
        lambda y: 0.5 * y)),
    *_both("patched-linear", MODEL, wrapped(nn.Linear, _clamp)),
]  # fmt: skip

ATTEMPTS = [*NORMS, *ROUTERS, *EXPERTS, *MLPS, *ATTENTION, *LAYERS, *PATCHES]
