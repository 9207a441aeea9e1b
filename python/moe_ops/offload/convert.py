"""offload_experts: moves a model's experts off the device and gives it a cache for some of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_ops.expert_weights import ExpertWeights, is_quantized, replace_module
from moe_ops.layers.experts import ACTIVATION_OPTIONS
from moe_ops.quant.bank import check_weights, find_banks

from .cache import ExpertCache
from .experts import OffloadedExperts
from .policy import CachePolicy
from .store import ExpertStore, FileStore, MemoryStore, Parts, Stored, forms, save_experts
from .trace import tokens_of

_QUANTIZED = ("w_gate_up", "w_down", "w_gate_up_scale", "w_down_scale")
_BIASES = ("b_gate_up", "b_down")
_OPTIONAL = ("w_gate_up_zero", "w_down_zero", *_BIASES)


class _Bank(NamedTuple):
    """Experts of a model, float or quantized."""

    name: str
    module: nn.Module
    tensors: Parts
    activation: Mapping[str, Any]
    x_scale: Tensor | None
    format: str  # Format of quantized experts; empty for float ones.
    hook: Any  # Hook that installs replacement experts; None for quantized experts.


def offload_experts(
    model: nn.Module,
    num_slots: int | None = None,
    *,
    max_bytes: int | None = None,
    path: Path | str | None = None,
    store: ExpertStore | None = None,
    policy: CachePolicy | str = "lru",
    device: torch.device | str | None = None,
    keep_cached: bool = True,
    skip: Sequence[str] = (),
) -> ExpertCache:
    """Moves the experts of a model off the device and gives it a cache for some of them, in place.

    Example:
        cache = offload_experts(model, max_bytes=2**30, path="experts.safetensors")
        model.generate(tokens, 32)
        print(cache.stats.hit_rate)

    It supports the experts that `moe_ops.quantize` supports, and those that it has made.
    The model's results are unchanged up to rounding, and bitwise identical if the kernels are
    batch-invariant (`moe_ops.set_batch_invariant`) and a call's experts fit into the slots. For
    inference only.

    Args:
        model: on the CPU; move the rest of it to `device` afterwards. With `store`, experts may be
            on the meta device.
        num_slots: N, the number of experts in the cache, for all layers together; at least 1.
        max_bytes: alternatively, the maximum size of the cache.
        path: a safetensors file to write the experts to and read them from. None: they stay in CPU
            memory, pinned if `device` is CUDA.
        store: alternatively, an existing store, with experts in the order of the model's layers:
            ``FileStore.open(path)``.
        policy: "lru", "lfu", "fifo", or a `moe_ops.offload.CachePolicy`.
        device: of the slots; None is that of the weights.
        keep_cached: see `FileStore`.
        skip: shell patterns of the names of experts' modules to leave unchanged.

    Returns:
        The cache, with its `stats`. Its `close()` ends the thread of a prefetching policy, and
        closes the file.

    Raises:
        ValueError: no experts, experts in several formats (use `skip`), sharded experts, experts
            that compute in fp8 or that moe_ffn cannot run, or a cache smaller than one expert. The
            model is unchanged.
        OSError: the file could not be written; the model is unchanged.
    """
    patterns = (skip,) if isinstance(skip, str) else tuple(skip)
    banks = list(_find(model, patterns, on_meta=store is not None))
    _check(model, banks, num_slots, max_bytes, path, store)
    target = banks[0].tensors["w_down"][0].device if device is None else torch.device(device)
    if store is None and path is not None:
        save_experts(path, [bank.tensors for bank in banks])
        store = FileStore.open(path, keep_cached=keep_cached)
    elif store is None:
        store = MemoryStore([bank.tensors for bank in banks], pin=target.type == "cuda")
    if max_bytes is not None:
        num_slots = max_bytes // store.expert_bytes
    assert num_slots is not None
    if target.type == "meta":
        target = torch.device("cpu")
    cache = ExpertCache(store, num_slots, policy, device=target)
    numbers: dict[int, OffloadedExperts] = {}
    for number, bank in enumerate(banks):
        experts = OffloadedExperts(cache, number, bank.activation, bank.x_scale, bank.format)
        experts.train(bank.module.training)
        numbers[number] = experts
        if bank.hook is None:
            stand_in: Any = bank.module
            replace_module(model, bank.module, stand_in.stand_in(experts))
        else:
            bank.hook.install(model, bank.module, experts)
    model.register_forward_pre_hook(
        lambda _, args, kwargs: cache.begin(tokens_of(args, kwargs)), with_kwargs=True
    )
    return cache


def _find(root: nn.Module, skip: tuple[str, ...], *, on_meta: bool) -> Iterator[_Bank]:
    found: dict[int, _Bank] = {}
    for name, module in root.named_modules():
        if is_quantized(module) and not any(fnmatchcase(name, pattern) for pattern in skip):
            found[id(module)] = _quantized(name, module)
    for bank in find_banks(root, skip, op="offload_experts"):
        if not on_meta:
            check_weights("offload_experts", bank.name, bank.module, bank.bank)
        weights = bank.bank
        found[id(bank.module)] = _Bank(
            bank.name, bank.module, parts_of(weights), weights.activation, None, "", bank.hook
        )
    # In the model's order, which is most likely the order of calls.
    for module in root.modules():
        if id(module) in found:
            yield found[id(module)]


def _quantized(name: str, module: Any) -> _Bank:
    names = (*_QUANTIZED, *(n for n in _OPTIONAL if getattr(module, n) is not None))
    tensors = {n: (getattr(module, n),) for n in names}
    activation = {option: getattr(module, option) for option in ACTIVATION_OPTIONS}
    return _Bank(name, module, tensors, activation, module.x_scale, module.format, None)


def parts_of(weights: ExpertWeights) -> Parts:
    """Returns float experts in the format of stores and `save_experts`."""
    parts: dict[str, tuple[Tensor, ...]] = {
        "w_gate_up": weights.gate_up,
        "w_down": (weights.down,),
    }
    parts |= {n: (getattr(weights, n),) for n in _BIASES if getattr(weights, n) is not None}
    return parts


def _check(
    model: nn.Module,
    banks: Sequence[_Bank],
    num_slots: int | None,
    max_bytes: int | None,
    path: Path | str | None,
    store: ExpertStore | None,
) -> None:
    name = "offload_experts"
    if not banks or banks[0].module is model:
        raise ValueError(
            f"{name}: model must hold a bank of experts, got {type(model).__name__}"
            + (", which is one; put it into a MoE." if banks else " without one.")
        )
    if (num_slots is None) == (max_bytes is None):
        raise ValueError(f"{name}: one of num_slots and max_bytes must be given, got {num_slots}.")
    if path is not None and store is not None:
        raise ValueError(f"{name}: path or store must be given, got both.")
    for bank in banks:
        if getattr(bank.module, "dispatcher", None) is not None:
            raise ValueError(f"{name}: {bank.name} must be whole, got one shared out over ranks.")
        if getattr(bank.module, "fp8_training", False):
            raise ValueError(
                f"{name}: {bank.name} must compute in the type of its weights, got precision "
                f"{getattr(bank.module, 'precision', None)!r}."
            )
    shapes = [_shape(bank.tensors) for bank in banks]
    for bank, shape in zip(banks, shapes, strict=True):
        if shape != shapes[0]:
            raise ValueError(
                f"{name}: banks must have one form, got {shapes[0]} in {banks[0].name} and {shape} "
                f"in {bank.name}; skip leaves banks as they are."
            )
    size = sum(stored.num_bytes for stored in forms(banks[0].tensors).values())
    if store is not None:
        size = store.expert_bytes
        got = store.num_banks, store.num_experts, _sizes(store.tensors)
        wanted = len(banks), shapes[0]["w_down"][0], _sizes(forms(banks[0].tensors))
        if got != wanted:
            raise ValueError(f"{name}: store must hold {wanted} like the model, got {got}.")
    if max_bytes is not None and max_bytes < size:
        raise ValueError(
            f"{name}: max_bytes must hold an expert of {size} bytes at least, got {max_bytes}."
        )


def _shape(bank: Parts) -> dict[str, list[int]]:
    num_experts = bank["w_down"][0].shape[0]
    return {name: [num_experts, *stored.shape] for name, stored in forms(bank).items()}


def _sizes(tensors: Mapping[str, Stored]) -> dict[str, list[int]]:
    return {name: list(stored.shape) for name, stored in sorted(tensors.items())}
