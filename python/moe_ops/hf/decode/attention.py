"""The attention implementation "moe_ops": torch's attention, with a mask only if it is needed.

Compiled code cannot inspect a mask to see that it is only causal, and transformers always makes one
when it compiles. This implementation has no mask unless tokens are padded or the cache is static.

In the batch-invariant mode it is `moa_attention`, in which the K query heads of a key head are
slots. Sums over keys start at the first token of each sequence, whatever the padding.

Letters: B sequences, S queries, P positions from the start of the sequences to the last query.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from moe_ops.layers.functional import multiplies_by_ops
from moe_ops.numerics import is_batch_invariant_enabled
from moe_ops.ops import moa_attention

_NAME = 'attn_implementation="moe_ops"'
# Arguments of models that torch's attention does not support; transformers' function silently
# ignores attention sinks.
_BEYOND_TORCH = {"s_aux": "attention sinks", "softcap": "a softcap"}
# Options of models whose queries attend to keys that an indexer chooses.
_CHOSEN_KEYS = ("index_topk", "index_topk_blocks", "indexer_budget")
# In the mode, moa_attention adds the sums of blocks of so many keys.
_KEYS_PER_BLOCK = 64


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    for name, what in _BEYOND_TORCH.items():
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{_NAME}: attention must be what torch's can do, got {what} of "
                f'{type(module).__name__}; use "eager".'
            )
    if multiplies_by_ops(query):
        if kwargs.get("dropout"):
            raise ValueError(
                f"{_NAME}: dropout must be 0 in the batch-invariant mode, got {kwargs['dropout']}."
            )
        if kwargs.get("position_bias") is not None:
            raise ValueError(
                f"{_NAME}: attention must have no position bias in the batch-invariant mode, got "
                f"one of {type(module).__name__}."
            )
        if attention_mask is None or attention_mask.dtype != torch.int32:
            raise ValueError(
                f"{_NAME}: attention must be causal, with the masks that transformers makes, in "
                f"the batch-invariant mode, got another kind of {type(module).__name__}."
            )
        return _by_sequence(query, key, value, attention_mask, kwargs.get("scaling")), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, *args, **kwargs)


def _by_sequence(
    query: Tensor, key: Tensor, value: Tensor, reach: Tensor, scale: float | None
) -> Tensor:
    """Returns attention [B, S, heads, features of a value].

    Args:
        query: [B, heads, S, d].
        key: [B, m, L, d], of the last L of P positions, or of more, where a static cache has room.
        value: [B, m, L, features], at most d.
        reach: [B, P], see `_reach`.
        scale: of scores.
    """
    length, num_positions = query.shape[2], reach.shape[1]
    dropped = max(0, num_positions - key.shape[2])
    window = int(reach.max())
    width = value.shape[-1]
    value = F.pad(value, (0, key.shape[-1] - width))
    slots = query.unflatten(1, (key.shape[1], -1)).permute(0, 3, 2, 1, 4)
    keys, values = (x[:, :, : num_positions - dropped].transpose(1, 2) for x in (key, value))

    def attend(rows: Any, first: int) -> Tensor:
        """Returns attention of the queries of sequences whose first token has position `first`."""
        k, v = (x[rows, max(0, first - dropped) :] for x in (keys, values))
        missing = max(0, dropped - first) % _KEYS_PER_BLOCK
        if missing:  # No query sees these keys, which place the others in their blocks.
            k, v = (F.pad(x, (0, 0, 0, 0, missing, 0)) for x in (k, v))
        q = slots[rows, max(0, length - (num_positions - first)) :]
        options: dict[str, Any] = {"kind": "softmax", "scale": scale}
        y = moa_attention(q, k, v, window=window if window < num_positions else None, **options)
        assert isinstance(y, Tensor)
        return y.transpose(2, 3).flatten(2, 3)[..., :width]

    firsts = torch.where(reach.any(1), (reach > 0).int().argmax(1), num_positions).tolist()
    if set(firsts) == {0}:
        return attend(slice(None), 0)
    out = query.new_zeros(query.shape[0], length, query.shape[1], width)
    for first in sorted({*firsts} - {num_positions}):
        rows = [i for i, at in enumerate(firsts) if at == first]
        y = attend(rows, first)
        out[rows, length - y.shape[1] :] = y
    return out


def causal_or_mask(**arguments: Any) -> Tensor | None:
    """Returns transformers' mask, or None if torch's is_causal suffices; in the batch-invariant
    mode `_reach`."""
    if is_batch_invariant_enabled():
        return _reach(**arguments)
    q_length, kv_length = arguments.get("q_length"), arguments["kv_length"]
    if (
        q_length is not None
        and q_length == kv_length
        and arguments.get("attention_mask") is None
        and arguments.get("local_size") is None
        and arguments.get("allow_is_causal_skip", True)
        and arguments.get("mask_function", causal_mask_function) is causal_mask_function
    ):
        return None
    return sdpa_mask(**arguments)


def _reach(**arguments: Any) -> Tensor:
    """Returns how many positions a query at each position sees: itself and those before it, up to
    its window; 0 for padding. [B, P] int32."""
    config: Any = arguments.get("config")
    if any(hasattr(config, name) for name in _CHOSEN_KEYS):
        raise ValueError(
            f"{_NAME}: in the batch-invariant mode, attention must read all keys of a window, got "
            f"an indexer that chooses keys ({config.model_type})."
        )
    batch, length, offset = arguments["batch_size"], arguments["q_length"], arguments["q_offset"]
    num_positions = int(offset) + length
    window = arguments.get("local_size")
    window = num_positions if window is None else window  # 0 of unused masks
    given = arguments.get("attention_mask")
    device = arguments["device"]
    tokens = torch.ones(batch, num_positions, dtype=torch.bool, device=device)
    if given is not None:
        tokens = F.pad(given, (0, num_positions - given.shape[1]))
        if (tokens[:, 1:] > tokens[:, :-1]).sum(1).add(tokens[:, 0]).gt(1).any():
            raise ValueError(
                f"{_NAME}: in the batch-invariant mode, attention_mask must have padding before or "
                "after the tokens of a sequence, got padding between tokens."
            )
    if arguments.get("mask_function", causal_mask_function) is not causal_mask_function:
        every = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        mask: Any = sdpa_mask(**{**arguments, **every})
        kept = arguments["kv_offset"] + torch.arange(arguments["kv_length"], device=device)
        back = torch.arange(int(offset), num_positions, device=device)[:, None] - kept
        sees = (back >= 0) & (back < window)
        kept_tokens = F.pad(tokens, (0, max(0, int(kept[-1]) + 1 - num_positions)))[:, kept]
        expected = sees[None, None] & kept_tokens[:, None, None]
        if not torch.equal(*(m & tokens[:, None, -length:, None] for m in (mask, expected))):
            raise ValueError(
                f"{_NAME}: in the batch-invariant mode, attention must be causal, with or without "
                "a window, got another mask."
            )
    reach: Tensor = tokens.int() * window
    return reach


def register() -> None:
    AttentionInterface.register("moe_ops", attention_forward)
    AttentionMaskInterface.register("moe_ops", causal_or_mask)
