"""The attention implementation "moe_ops": torch's attention, with a mask only if it is needed.

Compiled code cannot inspect a mask to see that it is only causal, and transformers always makes one
when it compiles. This implementation has no mask unless tokens are padded or the cache is static.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.modeling_utils import AttentionInterface

# Arguments of models that torch's attention does not support; transformers' function silently
# ignores attention sinks.
_BEYOND_TORCH = {"s_aux": "attention sinks", "softcap": "a softcap"}


def attention_forward(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    for name, what in _BEYOND_TORCH.items():
        if kwargs.get(name) is not None:
            raise ValueError(
                'attn_implementation="moe_ops": attention must be what torch\'s can do, got '
                f'{what} of {type(module).__name__}; use "eager".'
            )
    return sdpa_attention_forward(module, *args, **kwargs)


def causal_or_mask(**arguments: Any) -> Tensor | None:
    """Returns transformers' mask, or None if torch's is_causal suffices."""
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


def register() -> None:
    AttentionInterface.register("moe_ops", attention_forward)
    AttentionMaskInterface.register("moe_ops", causal_or_mask)
