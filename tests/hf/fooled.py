"""Attempts to fool `moe_ops.hf.optimize`, and how one is carried out.

An attempt alters a model before or after it is optimized, and a plain copy in the same way. Both
must compute the same then, for a prompt, for few tokens and in steps with a cache; or optimize says
in a sentence that it does not take such a model. An alteration that changes nothing would prove
nothing: it must change the plain model's logits, unless the attempt says that it does not.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import moe_ops.hf

from .models import CACHE, VOCAB, build

Alter = Callable[[PreTrainedModel], Any]
Patch = Callable[[pytest.MonkeyPatch], Any]
TOLERANCE = 2e-4


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One attempt.

    Args:
        name: of the test.
        model: a model type of tests/hf/models.py.
        before, after: alter a model before and after optimize.
        patch, patch_after: change classes or helpers for both models, before or after optimize.
        options: of the model's configuration.
        run: what is computed and compared; by default `calls`.
        changes: whether the alteration changes what the plain model computes.
        training: whether the models are compared in train mode, with equal random numbers.
        prepare: makes the model what the alteration is an alteration of.
    """

    name: str
    model: str
    before: Alter | None = None
    after: Alter | None = None
    patch: Patch | None = None
    patch_after: Patch | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    run: Callable[[PreTrainedModel], list[Tensor]] | None = None
    changes: bool = True
    training: bool = False
    prepare: Alter | None = None


def carry_out(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    run = attempt.run or calls
    plain, model = (build(attempt.model, **attempt.options) for _ in range(2))
    for m in (plain, model):
        if attempt.prepare is not None:
            attempt.prepare(m)
    unaltered = run(plain) if attempt.changes else None
    if attempt.patch is not None:
        attempt.patch(monkeypatch)
    for m in (plain, model):
        if attempt.before is not None:
            attempt.before(m)
    try:
        moe_ops.hf.optimize(model)
    except ValueError as error:
        assert re.fullmatch(r"[\w.]+: .+\.", str(error)), f"not a sentence: {error}"
        return
    if attempt.after is not None or attempt.patch_after is not None:
        run(model)  # Conclusions of a first call must not outlive the alteration.
    if attempt.patch_after is not None:
        attempt.patch_after(monkeypatch)
    for m in (plain, model):
        if attempt.after is not None:
            attempt.after(m)
        if attempt.training:
            m.train()
    want, got = run(plain), run(model)
    if unaltered is not None:
        assert max(map(relative, unaltered, want)) > 1e-3, "the attempt changes nothing"
    worst = [relative(a, b) for a, b in zip(got, want, strict=True)]
    assert max(worst) <= TOLERANCE, f"relative errors {[f'{e:.2g}' for e in worst]}"


def relative(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    return float(error) if error.isfinite() else float("inf")


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(3))


def forward(model: PreTrainedModel, ids: Tensor, cache: Any = None, **inputs: Any) -> Any:
    if cache is not None:
        inputs[CACHE] = cache
    return model(input_ids=ids, **inputs)


@torch.no_grad()
def calls(model: PreTrainedModel) -> list[Tensor]:
    """Returns the logits of few tokens, of many, and of steps with a cache."""
    torch.manual_seed(5)
    results = [forward(model, tokens(2, 6)).logits, forward(model, tokens(3, 30)).logits]
    return results + list(decode(model))


def decode(model: PreTrainedModel, batch: int = 2) -> Iterator[Tensor]:
    ids = tokens(batch, 9)
    output = forward(model, ids[:, :5], use_cache=True)
    yield output.logits
    for at in range(5, 9):
        output = forward(model, ids[:, at : at + 1], output[CACHE], use_cache=True)
        yield output.logits


# ------------------------------------------------------------------------------------------- parts


def layers(model: PreTrainedModel) -> nn.ModuleList:
    return model.transformer.blocks if hasattr(model, "transformer") else model.model.layers


def last(model: PreTrainedModel) -> Any:
    return layers(model)[-1]


def block(layer: Any) -> Any:
    return getattr(layer, "block_sparse_moe", None) or layer.mlp


def router(layer: Any) -> Any:
    return getattr(block(layer), "gate", None) or block(layer).router


def norms(model: PreTrainedModel) -> list[Any]:
    return [
        m
        for layer in layers(model)
        for m in (layer.input_layernorm, layer.post_attention_layernorm)
    ]


def attentions(model: PreTrainedModel) -> list[Any]:
    return [layer.self_attn for layer in layers(model)]


def routers(model: PreTrainedModel) -> list[Any]:
    return [router(layer) for layer in layers(model) if hasattr(block(layer), "experts")]


def experts(model: PreTrainedModel) -> list[Any]:
    return [block(layer).experts for layer in layers(model) if hasattr(block(layer), "experts")]


def blocks(model: PreTrainedModel) -> list[Any]:
    return [block(layer) for layer in layers(model)]


def subclass(module: nn.Module, **members: Any) -> None:
    """Makes a module one of a subclass with these members; `plain_class` is the class it had."""
    cls = type(module)
    module.__class__ = type(f"Other{cls.__name__}", (cls,), {"plain_class": cls, **members})


def around(change: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a method that gives `change` the module, the tokens and what its class makes of them;
    a first result of a tuple is what is changed."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        y = self.plain_class.forward(self, *args, **kwargs)
        if isinstance(y, tuple):
            return (change(self, x, y[0]), *y[1:])
        return change(self, x, y)

    return forward


def before(change: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a method that gives its class changed tokens."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args:
            args = (change(self, args[0]), *args[1:])
        else:
            kwargs["hidden_states"] = change(self, kwargs["hidden_states"])
        return self.plain_class.forward(self, *args, **kwargs)

    return forward
