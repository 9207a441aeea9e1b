"""Argument checks shared by the attention ops for decoding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe_ops.ops._checks import (
    check,
    check_dtype,
    check_float,
    check_like,
    check_same_device,
)


def check_kept(op: str, args: Mapping[str, Any], *names: str) -> None:
    """Checks x, start, and caches [B, m, L, d] that are written in place."""
    x, start = args["x"], args["start"]
    check_float(op, "x", x, "[B, S, H]")
    batch, length, _ = x.shape
    check(start >= 0, f"{op}: start must be at least 0, got {start}.")
    for name in names:
        kept = args[name]
        check_like(op, name, kept, "x", x, "[B, m, L, d]", B=batch)
        check(
            kept.shape[2] >= start + length,
            f"{op}: {name} must have room for start + S = {start + length} tokens, got shape "
            f"{list(kept.shape)}.",
        )


def check_block(op: str, args: Mapping[str, Any], rotary_size: int, *epsilons: str) -> None:
    """Checks the first norm, angles, mask, numbers, and the devices of all operands."""
    x = args["x"]
    batch, length, hidden = x.shape
    check_like(op, "norm_weight", args["norm_weight"], "x", x, "[H]", H=hidden)
    half = rotary_size // 2
    for name in ("cos", "sin"):
        angles: Tensor = args[name]
        check_float(op, name, angles, "[B, S, r]", S=length)
        check(
            angles.shape[0] in (1, batch) and angles.shape[2] >= half,
            f"{op}: {name} must be [B or 1, S, r] with r at least rotary_size / 2 = {half}, got "
            f"shape {list(angles.shape)}.",
        )
    check_dtype(op, "sin", args["sin"].dtype, (args["cos"].dtype,), " like cos")
    mask, end = args["mask"], args["start"] + length
    if mask is not None:
        if mask.dtype != torch.bool:
            check_float(op, "mask", mask)
        check(
            mask.dim() == 4
            and mask.shape[0] in (1, batch)
            and tuple(mask.shape[1:]) == (1, length, end),
            f"{op}: mask must be [B or 1, 1, S, start + S], got shape {list(mask.shape)}.",
        )
    for name in ("eps", *epsilons):
        check(args[name] >= 0, f"{op}: {name} must be at least 0, got {args[name]}.")
    check_same_device(op, **{n: t for n, t in args.items() if isinstance(t, Tensor)})
