"""Operations on the rows of a `Router`, one row per expert, documented by its methods.

Routers import these functions, so their class cannot be imported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .rows import (
    as_groups,
    as_ids,
    check_split,
    merge_matrix,
    mix_rows,
    repeated_rows,
    split_rows,
    take_rows,
    whole_rows,
)


def select(
    router: Any,
    ids: Sequence[int] | Tensor,
    top_k: int | None,
    num_groups: int | None,
    num_topk_groups: int | None,
) -> Any:
    """Implements `Router.select`."""
    index = as_ids("Router.select", ids, router.num_experts)
    rows = {name: take_rows(t, index) for name, t in _row_tensors(router).items()}
    return _rebuild(router, rows, top_k, **_groups(router, index, num_groups, num_topk_groups))


def append(
    router: Any,
    other: int | Any,
    init: str,
    top_k: int | None,
    num_groups: int | None,
    num_topk_groups: int | None,
) -> Any:
    """Implements `Router.append`."""
    if router.num_groups > 1 and num_groups is None:
        raise ValueError(
            f"Router.append: num_groups must be given for a router with {router.num_groups} "
            "groups, got None."
        )
    old = _row_tensors(router)
    if isinstance(other, int):
        new = _fresh_rows(router, other, init)
    else:
        new = _row_tensors(other)
        if other.hidden_size != router.hidden_size or new.keys() != old.keys():
            raise ValueError(
                "Router.append: other must have the hidden_size, bias and expert_bias of "
                f"{router}, got {other}."
            )
    rows = {name: torch.cat([t, new[name].to(t)]) for name, t in old.items()}
    return _rebuild(router, rows, top_k, num_groups=num_groups, num_topk_groups=num_topk_groups)


def split(router: Any, ids: Sequence[int] | Tensor | None, factor: int, mode: str) -> Any:
    """Implements `Router.split`."""
    index = as_ids("Router.split", ids, router.num_experts)
    check_split("Router.split", factor, mode)
    partial = len(index) < router.num_experts
    if mode == "slice":
        summed_groups = router.num_groups > 1 and router.group_score != "max"
        if not router.splits_into_slices or partial or summed_groups:
            raise ValueError(
                "Router.split: mode='slice' needs kind='topk', all experts, and no top2_sum "
                f"groups, got kind={router.kind!r}, {len(index)} of {router.num_experts} experts "
                f"and {router.num_groups} groups with group_score={router.group_score!r}."
            )
    if partial and router.num_groups > 1:
        raise ValueError(
            f"Router.split: ids must be all experts of a router with {router.num_groups} groups, "
            f"got {len(index)} of {router.num_experts}."
        )
    parents = split_rows(index, factor, router.num_experts)
    rows = {name: take_rows(t, parents) for name, t in _row_tensors(router).items()}
    if mode == "copy":
        return _rebuild(router, rows)
    return _rebuild(
        router,
        _scale_bias(router, rows, 1.0 / factor),
        router.top_k * factor,
        routed_scaling_factor=router.routed_scaling_factor * _slice_gain(router, factor),
    )


def merge(
    router: Any,
    groups: Sequence[Sequence[int]],
    weights: Tensor | Sequence[float] | None,
    mode: str,
    top_k: int | None,
    num_groups: int | None,
    num_topk_groups: int | None,
) -> Any:
    """Implements `Router.merge`."""
    members = as_groups("Router.merge", groups, router.num_experts, mode)
    matrix = merge_matrix("Router.merge", members, weights, router.num_experts)
    rows = {name: mix_rows(matrix, t) for name, t in _row_tensors(router).items()}
    changes = _groups(router, [m[0] for m in members], num_groups, num_topk_groups)
    if mode == "concat":
        size = len(members[0])
        if not router.splits_into_slices or router.top_k % size:
            raise ValueError(
                "Router.merge: mode='concat' needs kind='topk' and groups whose size divides "
                f"top_k = {router.top_k}, got kind={router.kind!r} and size {size}."
            )
        rows = _scale_bias(router, rows, float(size))
        changes["routed_scaling_factor"] = router.routed_scaling_factor / _slice_gain(router, size)
        top_k = router.top_k // size if top_k is None else top_k
    return _rebuild(router, rows, top_k, **changes)


def _slice_gain(router: Any, factor: int) -> float:
    """Returns the factor by which weights shrink when each selected expert becomes `factor` equal
    ones."""
    if router.renormalize:
        return factor ** (1.0 / router.renormalize_p)
    # A softmax shares its mass among the slices; other scores do not depend on other experts.
    return float(factor) if router.score_func == "softmax" else 1.0


def _scale_bias(router: Any, rows: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    """Scales the bias with softmax scores, which shrink with the number of experts."""
    if "expert_bias" in rows and router.score_func == "softmax" and not router.topk_first:
        rows["expert_bias"] = rows["expert_bias"] * factor
    return rows


def _groups(
    router: Any, index: list[int], num_groups: int | None, num_topk_groups: int | None
) -> dict[str, Any]:
    """Returns the groups of a router with the old experts `index`, which must be equal runs of old
    groups."""
    if router.num_groups == 1 or num_groups is not None:
        return {"num_groups": num_groups, "num_topk_groups": num_topk_groups}
    size = router.num_experts // router.num_groups
    old = [e // size for e in index]
    starts = [i for i in range(len(old)) if i == 0 or old[i] != old[i - 1]]
    lengths = {b - a for a, b in zip(starts, [*starts[1:], len(old)], strict=True)}
    if len(lengths) != 1 or len({old[i] for i in starts}) != len(starts):
        raise ValueError(
            "Router: the experts kept must be equal, unbroken runs of the old groups (or "
            f"num_groups must be given), got experts {index} of groups of {size}."
        )
    return {"num_groups": len(starts), "num_topk_groups": num_topk_groups}


def _row_tensors(router: Any) -> dict[str, Tensor]:
    tensors = {"weight": router.weight, "bias": router.bias, "expert_bias": router.expert_bias}
    return whole_rows("Router", {name: t for name, t in tensors.items() if t is not None})


def _fresh_rows(router: Any, num: int, init: str) -> dict[str, Tensor]:
    if num < 1:
        raise ValueError(f"Router.append: the number of experts must be >= 1, got {num}.")
    # A random row gets the mean expert_bias of the old rows.
    new = repeated_rows(_row_tensors(router), num, "mean" if init == "random" else init)
    if new is None:
        raise ValueError(f"Router.append: init must be 'random', 'copy' or 'mean', got {init!r}.")
    if init == "random":
        bound = router.weight.shape[1] ** -0.5
        new["weight"] = torch.empty_like(new["weight"].contiguous()).uniform_(-bound, bound)
        if "bias" in new:
            new["bias"] = torch.zeros_like(new["bias"])
    return new


def _rebuild(router: Any, rows: dict[str, Tensor], top_k: int | None = None, **changes: Any) -> Any:
    """Returns a router like this one with other rows; changes that are None are ignored."""
    changes = {name: value for name, value in changes.items() if value is not None}
    if "num_groups" in changes or router.num_groups > 1:
        num_groups = changes.get("num_groups", router.num_groups)
        changes.setdefault("num_topk_groups", min(router.num_topk_groups, num_groups))
    num_experts = rows["weight"].shape[0]
    result = router.with_rows(num_experts, router.top_k if top_k is None else top_k, **changes)
    for name in ("weight", "bias"):
        old = getattr(router, name)
        if old is not None:
            new = rows[name].to(old).clone()
            setattr(result, name, nn.Parameter(new, requires_grad=old.requires_grad))
    if router.expert_bias is not None:
        result.expert_bias = rows["expert_bias"].to(router.expert_bias).clone()
        result.tokens_per_expert = torch.zeros(
            num_experts, dtype=torch.int64, device=router.expert_bias.device
        )
        histogram = getattr(router, "bias_histogram", None)
        if histogram is not None:
            result.bias_histogram = histogram.new_zeros(num_experts, histogram.shape[1])
    return result.train(router.training)
