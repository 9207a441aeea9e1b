"""Attempts that only large or tiny numbers show: weights are scaled first, then classes clamp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .fooled import Attempt, attentions, blocks, experts, layers, norms, routers, subclass
from .fooled_classes import (
    Calls,
    Parts,
    acts,
    after_of,
    before_of,
    clamp,
    clamped_router,
    dense,
    first_clamped,
    head_norms,
    latent_norms,
    linears,
    plain_gate,
    shared,
    with_gate,
    with_weights,
)

MODEL = "qwen3_moe"


def scaled(parts: Parts, factor: float, name: str = "weight") -> Callable[[Any], None]:
    def alter(model: Any) -> None:
        for part in parts(model):
            getattr(part, name).data.mul_(factor)

    return alter


def attempt(name: str, model: str, prepare: Any, alter: Any, **options: Any) -> Attempt:
    return Attempt(f"large-{name}", model, prepare=prepare, before=alter, **options)


def embeddings(model: Any) -> list[Any]:
    return [model.model.embed_tokens]


def _floored(self: Any, x: Any) -> Any:
    """Normalizes by a root that is at least a small number, in place of one added to the square."""
    root = x.square().mean(-1, keepdim=True).sqrt()
    return self.weight * x / root.clamp(min=self.variance_epsilon**0.5)


def _outside(self: Any, x: Any) -> Any:
    root = x.square().mean(-1, keepdim=True).sqrt()
    return self.weight * x / (root + self.variance_epsilon**0.5)


def _norms_of(forward: Any) -> Callable[[Any], None]:
    return lambda m: [subclass(n, forward=forward) for n in norms(m)] and None


def gate_limit(limit: float) -> Callable[[Any], None]:
    return with_gate(lambda self, x: plain_gate(self, x.clamp(-limit, limit)))


ATTEMPTS = [
    attempt("norm-clamps-at-50", MODEL, scaled(norms, 30), after_of(norms, clamp(50.0))),
    attempt("norm-clamps-at-8", "mixtral", scaled(norms, 5), after_of(norms, clamp(8.0))),
    attempt("norm-weight-clamps", MODEL, scaled(norms, 8), lambda m: [subclass(n, forward=lambda
        self, x: F.rms_norm(x, x.shape[-1:], self.weight.clamp(max=8), self.variance_epsilon))
        for n in norms(m)]),
    attempt("norm-input-clamps", "olmoe", scaled(embeddings, 300),
        before_of(norms, first_clamped(100.0))),
    attempt("head-norm-clamps", MODEL, scaled(head_norms, 4), after_of(head_norms, clamp(6.0))),
    attempt("latent-norm-clamps", "deepseek_v3", scaled(latent_norms, 4),
        after_of(latent_norms, clamp(6.0))),
    attempt("clip-qkv", "olmoe", scaled(head_norms, 6),
        lambda m: setattr(m.config, "clip_qkv", 8.0)),
    attempt("attention-input-clamps", "mixtral", scaled(norms, 3),
        before_of(attentions, first_clamped(4.5))),
    attempt("attention-input-clamps-at-30", MODEL, scaled(norms, 20),
        before_of(attentions, first_clamped(30.0))),
    attempt("latent-attention-input-clamps", "deepseek_v2", scaled(norms, 3),
        before_of(attentions, first_clamped(4.5))),
    attempt("attention-clamps", "gpt_oss", scaled(linears("v_proj"), 30),
        after_of(attentions, clamp(10.0))),
    attempt("mlp-gate-clamps", "deepseek_v3", scaled(linears("gate_proj"), 8), acts(lambda i: Calls(
        lambda x: F.silu(x.clamp(max=7.0))), lambda m: dense(m) + shared(m))),
    attempt("mlp-clamps", "glm4_moe", scaled(linears("down_proj"), 40),
        after_of(dense, clamp(20.0))),
    attempt("shared-clamps", "qwen2_moe", scaled(linears("down_proj"), 40),
        after_of(shared, clamp(10.0))),
    attempt("gate-clamps", "mixtral", scaled(experts, 8, "gate_up_proj"), gate_limit(7.0)),
    attempt("gate-clamps-at-20", MODEL, scaled(experts, 20, "gate_up_proj"), gate_limit(20.0)),
    attempt("act-fn-clamps", "olmoe", scaled(experts, 10, "gate_up_proj"), acts(lambda i: Calls(
        lambda x: F.silu(x.clamp(max=9.0))))),
    attempt("act-fn-of-silu-class", "mixtral", scaled(experts, 10, "gate_up_proj"), lambda m: [
        subclass(e.act_fn, forward=lambda self, x: F.silu(x).clamp(max=9.0)) for e in experts(m)]),
    attempt("experts-clamp", MODEL, scaled(experts, 40, "down_proj"),
        after_of(experts, clamp(15.0))),
    attempt("router-logits-clamp", "mixtral", scaled(routers, 10), lambda m: [subclass(r,
        forward=clamped_router(6.0)) for r in routers(m)]),
    attempt("router-logits-clamp-at-30", "mixtral", scaled(routers, 20), lambda m: [subclass(r,
        forward=clamped_router(30.0)) for r in routers(m)]),
    attempt("router-drops-small-weights", MODEL, scaled(routers, 3), lambda m: [subclass(r,
        forward=with_weights(lambda self, x, w: w * (w > 0.05))) for r in routers(m)]),
    attempt("router-drops-tiny-weights", "olmoe", scaled(routers, 6), lambda m: [subclass(r,
        forward=with_weights(lambda self, x, w: torch.where(w > 0.01, w, w + 0.2)))
        for r in routers(m)]),
    attempt("router-input-clamps", "deepseek_v3", scaled(norms, 4),
        before_of(routers, first_clamped(5.0))),
    attempt("block-clamps", MODEL, scaled(experts, 60, "down_proj"),
        after_of(blocks, clamp(20.0))),
    attempt("layer-clamps", "mixtral", scaled(experts, 60, "down_proj"),
        after_of(layers, clamp(20.0))),
    attempt("q-proj-clamps", "mixtral", scaled(linears("q_proj"), 10),
        after_of(linears("q_proj"), clamp(12.0))),
    attempt("head-clamps", MODEL, scaled(linears("lm_head"), 10),
        after_of(linears("lm_head"), clamp(15.0))),
    attempt("norm-floors-its-root", MODEL, scaled(embeddings, 1e-3), _norms_of(_floored)),
    attempt("norm-epsilon-outside", "mixtral", scaled(embeddings, 1e-3), _norms_of(_outside)),
    attempt("norm-of-tiny-rows", "olmoe", scaled(embeddings, 1e-5), after_of(norms, lambda s, x, y:
        torch.where(x.abs().amax(-1, keepdim=True) < 1e-4, 2 * y, y))),
    attempt("gelu-for-silu-at-large", MODEL, scaled(experts, 10, "gate_up_proj"), acts(
        lambda i: Calls(lambda x: torch.where(x.abs() > 8, F.relu(x) + 1.0, F.silu(x))))),
    attempt("softplus-like-act-fn", "mixtral", scaled(experts, 20, "gate_up_proj"), acts(
        lambda i: Calls(lambda x: torch.where(x > 20, 0 * x + 20, nn.functional.silu(x))))),
]  # fmt: skip
