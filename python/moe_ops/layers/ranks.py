"""Sums over ranks for losses, balancing and routing statistics, with one all-reduce each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def sum_counts(counts: Iterable[Tensor], group: Any) -> None:
    """Sums counts over the ranks of a group (None: all), in place, with one all-reduce per device.

    Does nothing without torch.distributed. All ranks must pass the same number of counts, with
    equal sizes, in the same order.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in counts:
        by_device.setdefault(tensor.device, []).append(tensor)
    for members in by_device.values():
        together = torch.cat([t.reshape(-1) for t in members])
        dist.all_reduce(together, group=group)
        sizes = [t.numel() for t in members]
        for tensor, total in zip(members, together.split(sizes), strict=True):
            tensor.copy_(total.view(tensor.shape))


def mean_over_ranks(
    total: Tensor, num_tokens: int | Tensor, group: Any, counts: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Computes the mean over the tokens of all ranks of a group, and sums counts over the ranks.

    Args:
        total: the sum over this rank's tokens, any shape.
        num_tokens: number of these tokens; ranks may differ. A tensor that broadcasts to `total` if
            its elements have different token counts.
        counts: integers to sum in the same all-reduce.

    Returns:
        The mean, and the sums of the counts. The mean has the value of the whole batch on every
        rank, and a gradient whose mean over the ranks is that of the whole batch.
    """
    tokens = torch.as_tensor(num_tokens, device=total.device)
    parts = [total.detach().flatten(), tokens.flatten()]
    if counts is not None:
        parts.append(counts.flatten())
    packed = torch.cat([part.double() for part in parts])
    dist.all_reduce(packed, group=group)
    sizes = [total.numel(), total.numel() + tokens.numel()]
    sums, all_tokens, counted = packed.tensor_split(sizes)
    tokens = all_tokens.view(tokens.shape).clamp(min=1)
    share = total / (tokens / dist.get_world_size(group)).to(total.dtype)
    mean = share - share.detach() + (sums.view(total.shape) / tokens).to(total.dtype)
    return mean, None if counts is None else counted.view(counts.shape).to(counts.dtype)
