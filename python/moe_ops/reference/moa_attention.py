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
    """Attention of q [B, S, K, n, d] to k and v [B, S_kv, n, d], with the S x S_kv matrix whole."""
    acc = acc_dtype(q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bikhd,bjhd->bkhij", q.to(acc), k.to(acc)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    seen = visible(q.shape[1], k.shape[1], causal, window, cu_seqlens, q.device)
    if kind == "softmax":
        # Not -inf: a row that sees nothing is all zeros then, and not NaN.
        weights = logits.masked_fill(~seen, torch.finfo(acc).min).softmax(-1).masked_fill(~seen, 0)
    elif kind == "stick_breaking":
        rest = F.logsigmoid(-logits).masked_fill(~seen, 0)
        # What the keys from the last to the one after j have left of the stick.
        left = rest.flip(-1).cumsum(-1).flip(-1) - rest
        weights = (F.logsigmoid(logits) + left).exp().masked_fill(~seen, 0)
    else:
        raise ValueError(
            f'moa_attention: kind must be "softmax" or "stick_breaking", got "{kind}".'
        )
    out = torch.einsum("bkhij,bjhd->bikhd", weights, v.to(acc)).to(q.dtype)
    if kind == "softmax":
        return out
    return out, rest.sum(-1).exp().permute(0, 3, 1, 2)


def visible(
    num_tokens: int,
    num_keys: int,
    causal: bool,
    window: int | None,
    cu_seqlens: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Which keys each query sees, [S, S_kv]: queries are the last S positions."""
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
