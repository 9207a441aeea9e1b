"""Operations on a `MoE` and on `AttentionExperts`, documented by their methods.

The layers import these functions, so their classes cannot be imported here. Letters: E experts, D
width of an expert's heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .rows import as_ids, repeated_rows, take_rows, whole_rows


def select(moe: Any, ids: Sequence[int] | Tensor, changes: dict[str, Any]) -> Any:
    """Implements `MoE.select`."""
    return moe.rebuild(moe.router.select(ids, **changes), moe.experts.select(ids))


def append(
    moe: Any, other: int | Any, init: str, router_init: str | None, changes: dict[str, Any]
) -> Any:
    """Implements `MoE.append`."""
    if not isinstance(other, int):
        router = moe.router.append(other.router, **changes)
        return moe.rebuild(router, moe.experts.append(other.experts))
    experts = moe.experts.append(other, init=init)
    router_init = router_init or _router_init(init)
    return moe.rebuild(moe.router.append(other, init=router_init, **changes), experts)


def split(
    moe: Any, ids: Sequence[int] | Tensor | None, factor: int, mode: str, noise: float
) -> Any:
    """Implements `MoE.split`."""
    router = moe.router.split(ids, factor, mode=mode)
    return moe.rebuild(router, moe.experts.split(ids, factor, mode=mode, noise=noise))


def merge(
    moe: Any,
    groups: Sequence[Sequence[int]],
    weights: Tensor | Sequence[float] | None,
    mode: str,
    neuron_order: Tensor | None,
    changes: dict[str, Any],
) -> Any:
    """Implements `MoE.merge`."""
    router = moe.router.merge(groups, weights, mode=mode, **changes)
    experts = moe.experts.merge(groups, weights, mode=mode, neuron_order=neuron_order)
    return moe.rebuild(router, experts)


def _router_init(init: str) -> str:
    """Returns the `init` of router rows for new experts; a router has no output that could be
    zero."""
    return "random" if init == "zero_output" else init


def select_attention(layer: Any, ids: Sequence[int] | Tensor, changes: dict[str, Any]) -> Any:
    """Implements `AttentionExperts.select`."""
    index = as_ids("AttentionExperts.select", ids, layer.router.num_experts)
    rows = {name: take_rows(p, index) for name, p in _row_tensors(layer).items()}
    return _rebuild_attention(layer, layer.router.select(ids, **changes), rows)


def append_attention(
    layer: Any, num: int, init: str, router_init: str | None, changes: dict[str, Any]
) -> Any:
    """Implements `AttentionExperts.append`."""
    if init not in ("random", "zero_output", "copy", "mean"):
        raise ValueError(
            "AttentionExperts.append: init must be 'random', 'zero_output', 'copy' or 'mean', "
            f"got {init!r}."
        )
    router = layer.router.append(num, init=router_init or _router_init(init), **changes)
    old, rows = _row_tensors(layer), {}
    repeated = repeated_rows(old, num, init)
    for name, p in old.items():
        if repeated is not None:
            new = repeated[name]
        elif name == "kv_bias" or (name == "w_output" and init == "zero_output"):
            new = p.new_zeros(num, *p.shape[1:])
        else:
            bound = p.shape[-1] ** -0.5
            new = p.new_empty(num, *p.shape[1:]).uniform_(-bound, bound)
        rows[name] = torch.cat([p, new])
    return _rebuild_attention(layer, router, rows)


def _row_tensors(layer: Any) -> dict[str, Tensor]:
    """Returns the experts' tensors, [E, ...]; with `expert_kv` they include keys and values."""
    weights = {"w_query": layer.w_query, "w_output": layer.w_output}
    tensors = whole_rows("AttentionExperts", weights)
    if layer.expert_kv:
        experts = layer.router.num_experts
        for name, p in (("kv_weight", layer.kv_proj.weight), ("kv_bias", layer.kv_proj.bias)):
            if p is not None:  # [2 E D, ...]: keys of all experts, then values.
                tensors[name] = p.detach().view(2, experts, -1, *p.shape[1:]).transpose(0, 1)
    return tensors


def _rebuild_attention(layer: Any, router: Any, rows: dict[str, Tensor]) -> Any:
    # On the meta device, initialization draws no random numbers.
    result = layer.blank(router, device="meta")
    tensors: dict[str, Tensor | None] = {
        "kv_proj.weight": layer.kv_proj.weight,
        "kv_proj.bias": layer.kv_proj.bias,
        "bias": layer.bias,
    }
    for name, rowwise in rows.items():
        if name.startswith("kv_"):
            flat = rowwise.transpose(0, 1).flatten(0, 2)
            tensors[name.replace("kv_", "kv_proj.")] = flat
        else:
            tensors[name] = rowwise
    for name, old in layer.named_parameters():
        tensor = tensors.get(name)
        if tensor is None:
            continue  # A parameter of the router.
        module = result.get_submodule(name.rpartition(".")[0])
        new = tensor.detach().to(old).clone(memory_format=torch.contiguous_format)
        parameter = nn.Parameter(new, requires_grad=old.requires_grad)
        setattr(module, name.rpartition(".")[2], parameter)
    return result.train(layer.training)
