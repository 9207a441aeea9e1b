"""torch.vmap rules: a batch of calls becomes one call with more tokens if only token arguments are
batched, and a loop otherwise (batched weights, per-sample gradients of weights)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_ops.ops._library import Signature, library

# Arguments whose first dimension is independent tokens, as in every result. Arguments with more
# dimensions are rows too.
_TOKENS: dict[str, tuple[str, ...]] = {
    "gated_act": ("gate_up",),
    "gated_mlp_decode": ("x", "residual"),
    "all_experts_ffn": ("x",),
    "moe_ffn": ("x", "topk_weights", "topk_ids"),
    "moe_ffn_packed": ("x", "topk_weights", "topk_ids"),
    "moe_ffn_quantized": ("x", "topk_weights", "topk_ids"),
    "moe_linear_map": ("x", "topk_ids"),
    "moe_linear_reduce": ("h", "topk_weights", "topk_ids"),
    "peer_ffn": ("x", "topk_weights", "topk_ids"),
    "router_linear": ("x",),
    "topk_router": ("router_logits",),
    "topk_router_bwd": ("grad_weights", "router_logits", "topk_ids"),
    "topp_router": ("router_logits",),
}


def _fold(t: Tensor, dim: int | None, size: int, tokens: int) -> Tensor:
    """Returns [size * tokens, ...] of a batch along `dim`, or of one tensor for all samples."""
    batch = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return batch.reshape(size * tokens, *batch.shape[2:])


def _folded(op: str, names: Sequence[str], in_dims: Sequence[Any], args: Sequence[Any]) -> bool:
    """Returns whether vmap batches only token operands, each at least 2-D per sample."""
    for name, dim, value in zip(names, in_dims, args, strict=True):
        if dim is not None and name not in _TOKENS[op]:
            return False
        if name in _TOKENS[op] and isinstance(value, Tensor):
            if value.dim() - (dim is not None) < 2:
                return False
    return True


def register_rule(op: str) -> None:
    """Registers the torch.vmap rule of an op."""
    packet = getattr(torch.ops.moe_ops, op)
    names_of_all = Signature(op).names if op in _TOKENS else ()

    def rule(info: Any, in_dims: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        size, names = info.batch_size, names_of_all[: len(args)]
        if op in _TOKENS and _folded(op, names, in_dims, args):
            first = next(
                a.movedim(d, 0) for a, d in zip(args, in_dims, strict=True) if d is not None
            )
            tokens = first.shape[1]
            row = [
                _fold(a, d, size, tokens) if n in _TOKENS[op] and isinstance(a, Tensor) else a
                for n, a, d in zip(names, args, in_dims, strict=True)
            ]
            found = packet(*row, **kwargs)
            if isinstance(found, Tensor):
                return found.unflatten(0, (size, tokens)), 0
            return tuple(t.unflatten(0, (size, tokens)) for t in found), (0,) * len(found)

        def sample(i: int) -> Any:
            row = [a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)]
            return packet(*row, **kwargs)

        samples = [sample(i) for i in range(size)]
        if isinstance(samples[0], Tensor):
            return torch.stack(samples), 0
        return tuple(map(torch.stack, zip(*samples, strict=True))), (0,) * len(samples[0])

    torch.library.register_vmap(f"moe_ops::{op}", rule, lib=library)
