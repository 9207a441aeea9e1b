from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import acc_dtype


def moa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kind: str,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes attention of q [B, S, K, n, d] over k and v [B, S_kv, n, d].

    Queries with equal keys are computed together on those keys only: masked keys affect no sum,
    even if infinite or NaN, and get no gradient.
    """
    if kind not in ("softmax", "stick_breaking"):
        raise ValueError(
            f'moa_attention: kind must be "softmax" or "stick_breaking", got "{kind}".'
        )
    acc = acc_dtype(q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    seen = visible(q.shape[1], k.shape[1], causal, window, cu_seqlens, q.device)
    parts = [
        _attend(q[:, tokens].to(acc), k[:, keys].to(acc), v[:, keys].to(acc), kind, scale, softcap)
        for tokens, keys in _ranges(seen)
    ]
    out, rest = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return out.to(q.dtype) if kind == "softmax" else (out.to(q.dtype), rest)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, kind: str, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Computes attention over all keys, and the rest of the sticks [B, S, K, n]."""
    logits = torch.einsum("bikhd,bjhd->bkhij", q, k) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    rest = F.logsigmoid(-logits)
    if kind == "softmax":
        weights = logits.softmax(-1)
    else:
        # The rest of the stick after the keys from the last to the one after j.
        left = rest.flip(-1).cumsum(-1).flip(-1) - rest
        weights = (F.logsigmoid(logits) + left).exp()
    out = torch.einsum("bkhij,bjhd->bikhd", weights, v)
    return out, rest.sum(-1).exp().permute(0, 3, 1, 2)


def _ranges(seen: Tensor) -> list[tuple[slice, slice]]:
    """Returns runs of queries that attend to equal keys, and these keys, which are contiguous."""
    count = seen.sum(-1)
    first = seen.int().argmax(-1) if seen.shape[-1] else count
    sight = list(zip(first.tolist(), (first + count).tolist(), strict=True))
    starts = [i for i in range(len(sight)) if i == 0 or sight[i] != sight[i - 1]] or [0]
    ends = [*starts[1:], len(sight)]
    return [
        (slice(start, end), slice(*sight[start]) if sight else slice(0, 0))
        for start, end in zip(starts, ends, strict=True)
    ]


def visible(
    num_tokens: int,
    num_keys: int,
    causal: bool,
    window: int | None,
    cu_seqlens: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Returns the keys that each query attends to, [S, S_kv]: queries are the last S positions."""
    key = torch.arange(num_keys, device=device)
    position = torch.arange(num_tokens, device=device)[:, None] + num_keys - num_tokens
    seen = torch.ones(num_tokens, num_keys, dtype=torch.bool, device=device)
    if causal:
        seen &= key <= position
    if window is not None:
        seen &= (position - key).abs() < window
    if cu_seqlens is not None:
        sequence = torch.bucketize(key, cu_seqlens[1:].to(key), right=True)
        seen &= sequence[:, None] == sequence
    return seen
