"""Attempts with caches: copies, branches, cuts and views of what the steps read and write."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from .fooled import Attempt, forward, tokens
from .models import CACHE

MODELS = ("qwen3_moe", "gpt_oss", "deepseek_v3")


def prompt(model: Any, batch: int = 2, length: int = 5, cache: Any = None) -> Any:
    """Returns the output of a prompt; its cache goes on with `step`."""
    return forward(model, tokens(batch, length), cache, use_cache=True)


def step(model: Any, cache: Any, at: int, batch: int = 2) -> Tensor:
    ids = tokens(batch, at + 20)[:, at + 10 : at + 11]
    return forward(model, ids, cache, use_cache=True).logits


def shallow(cache: Any) -> Any:
    """Returns a copy of a cache and of its layers that shares their tensors."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


def two_branches(model: Any) -> Iterator[Tensor]:
    first = prompt(model)[CACHE]
    yield step(model, first, 0)
    second = shallow(first)
    yield step(model, first, 1)
    yield step(model, second, 2)
    yield step(model, first, 3)
    yield step(model, second, 4)


def branches_at_once(model: Any) -> Iterator[Tensor]:
    first = prompt(model)[CACHE]
    for at in range(3):
        yield step(model, first, at)
    others = [shallow(first) for _ in range(3)]
    for at in range(3):
        for index, other in enumerate(others):
            yield step(model, other, 5 * index + at)


def deep_copy(model: Any) -> Iterator[Tensor]:
    first = prompt(model)[CACHE]
    yield step(model, first, 0)
    second = copy.deepcopy(first)
    yield step(model, first, 1)
    yield step(model, second, 2)
    yield step(model, first, 3)


def crop(model: Any) -> Iterator[Tensor]:
    cache = prompt(model, length=4)[CACHE]
    for at in range(4):
        yield step(model, cache, at)
    cache.crop(-2)
    yield step(model, cache, 7)
    yield step(model, cache, 8)


def crop_a_branch(model: Any) -> Iterator[Tensor]:
    cache = prompt(model, length=4)[CACHE]
    yield step(model, cache, 0)
    other = shallow(cache)
    other.crop(-1)
    yield step(model, other, 5)
    yield step(model, cache, 6)
    yield step(model, other, 7)


def reorder(model: Any) -> Iterator[Tensor]:
    cache = prompt(model)[CACHE]
    yield step(model, cache, 0)
    cache.reorder_cache(torch.tensor([1, 1]))
    yield step(model, cache, 1)
    cache.reorder_cache(torch.tensor([1, 0]))
    yield step(model, cache, 2)


def select(model: Any) -> Iterator[Tensor]:
    cache = prompt(model, batch=3)[CACHE]
    yield step(model, cache, 0, batch=3)
    cache.batch_select_indices(torch.tensor([2, 0]))
    yield step(model, cache, 1)


def repeat(model: Any) -> Iterator[Tensor]:
    cache = prompt(model, batch=1)[CACHE]
    yield step(model, cache, 0, batch=1)
    cache.batch_repeat_interleave(3)
    yield step(model, cache, 1, batch=3)
    yield step(model, cache, 2, batch=3)


def held_views(model: Any) -> Iterator[Tensor]:
    """Keys that somebody holds must stay what they were."""
    cache = prompt(model)[CACHE]
    yield step(model, cache, 0)
    held = [(layer.keys, layer.keys.clone()) for layer in cache.layers]
    for at in range(1, 4):
        yield step(model, cache, at)
    for now, then in held:
        yield 1.0 + (now - then).abs()


def held_views_of_a_cut(model: Any) -> Iterator[Tensor]:
    cache = prompt(model, length=4)[CACHE]
    yield step(model, cache, 0)
    yield step(model, cache, 1)
    held = [(layer.values, layer.values.clone()) for layer in cache.layers]
    cache.crop(-2)
    yield step(model, cache, 5)
    yield step(model, cache, 6)
    for now, then in held:
        yield 1.0 + (now - then).abs()


def changed_in_place(model: Any) -> Iterator[Tensor]:
    cache = prompt(model)[CACHE]
    yield step(model, cache, 0)
    for layer in cache.layers:
        layer.values.mul_(0.5)
    yield step(model, cache, 1)


def replaced(model: Any) -> Iterator[Tensor]:
    cache = prompt(model)[CACHE]
    yield step(model, cache, 0)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.flip(0), layer.values.flip(0)
    yield step(model, cache, 1)
    for layer in cache.layers:
        layer.values = layer.values * 0.5
    yield step(model, cache, 2)


def put_back(model: Any) -> Iterator[Tensor]:
    """Tensors that a layer had before are given to it again."""
    cache = prompt(model)[CACHE]
    yield step(model, cache, 0)
    kept = [(layer.keys, layer.values) for layer in cache.layers]
    lengths = [getattr(layer, "cumulative_length", None) for layer in cache.layers]
    yield step(model, cache, 1)
    for layer, (keys, values), length in zip(cache.layers, kept, lengths, strict=True):
        layer.keys, layer.values = keys, values
        if length is not None:
            layer.cumulative_length = length
    yield step(model, cache, 2)
    yield step(model, cache, 3)


def moved_to_another_cache(model: Any) -> Iterator[Tensor]:
    first, second = prompt(model)[CACHE], DynamicCache(config=model.config)
    yield step(model, first, 0)
    second.layers = first.layers
    yield step(model, second, 1)
    yield step(model, first, 2)


def reset(model: Any) -> Iterator[Tensor]:
    cache = prompt(model)[CACHE]
    yield step(model, cache, 0)
    fresh = DynamicCache(config=model.config)
    yield prompt(model, cache=fresh).logits
    yield step(model, fresh, 2)
    yield step(model, cache, 3)


def static(model: Any) -> Iterator[Tensor]:
    cache = StaticCache(config=model.config, max_cache_len=16)
    yield prompt(model, cache=cache).logits
    yield step(model, cache, 0)
    cache.reset()
    yield prompt(model, length=3, cache=cache).logits
    yield step(model, cache, 1)


def static_copy(model: Any) -> Iterator[Tensor]:
    cache = StaticCache(config=model.config, max_cache_len=16)
    yield prompt(model, cache=cache).logits
    other = copy.deepcopy(cache)
    yield step(model, cache, 0)
    yield step(model, other, 1)
    yield step(model, cache, 2)


def interleaved(model: Any) -> Iterator[Tensor]:
    caches = [prompt(model, length=n)[CACHE] for n in (3, 6)]
    for at in range(3):
        for cache in caches:
            yield step(model, cache, at)


def long(model: Any) -> Iterator[Tensor]:
    """Steps past every buffer's first size."""
    cache = prompt(model, batch=1, length=60)[CACHE]
    for at in range(8):
        yield step(model, cache, at, batch=1)


def of_a_batch_that_shrinks(model: Any) -> Iterator[Tensor]:
    cache = prompt(model, batch=3)[CACHE]
    yield step(model, cache, 0, batch=3)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:1], layer.values[:1]
    yield step(model, cache, 1, batch=1)


def on_grad(model: Any) -> Iterator[Tensor]:
    """A step that is to have gradients reads what steps without them wrote."""
    with torch.no_grad():
        cache = prompt(model)[CACHE]
        first = step(model, cache, 0)
    yield first
    with torch.enable_grad():
        loss = step(model, cache, 1).square().mean()
        names = [n for n, _ in model.named_parameters()]
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        yield dict(zip(names, grads, strict=True))["lm_head.weight"]
    with torch.no_grad():
        yield step(model, cache, 2)


def listed(way: Callable[[Any], Iterator[Tensor]]) -> Callable[[Any], list[Tensor]]:
    def run(model: Any) -> list[Tensor]:
        if way is on_grad:
            return list(way(model))
        with torch.no_grad():
            return list(way(model))

    return run


WAYS = (
    two_branches, branches_at_once, deep_copy, crop, crop_a_branch, reorder, select, repeat,
    held_views, held_views_of_a_cut, changed_in_place, replaced, put_back, moved_to_another_cache,
    reset, static, static_copy, interleaved, long, of_a_batch_that_shrinks, on_grad,
)  # fmt: skip
# A sliding window cuts its keys off: it cannot be cut again, and what it had is not all there.
NOT_SLIDING = (crop, crop_a_branch, held_views_of_a_cut)

ATTEMPTS = [
    Attempt(
        f"cache-{way.__name__.replace('_', '-')}-{model}", model, run=listed(way), changes=False
    )
    for way in WAYS
    for model in MODELS
    if not (model == "gpt_oss" and way in NOT_SLIDING)
]
