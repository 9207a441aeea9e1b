"""torch's fast CPU attention for values that are narrower than keys, as in MLA.

`scaled_dot_product_attention` uses its blocked kernel on the CPU only if queries, keys and values
have equal widths; otherwise it computes all scores of all heads at once. Keys of DeepSeek-V3 have
192 features and values 128: padding values with zeros increases the GEMMs by a quarter, and no
scores are stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_attention = nn.functional.scaled_dot_product_attention


class PaddedValues(TorchFunctionMode):
    """Torch function mode that pads the values of CPU attention to the width of keys."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not _attention or len(args) < 3 or torch.compiler.is_compiling():
            return func(*args, **kwargs)
        query, key, value, *rest = args
        more = key.shape[-1] - value.shape[-1]
        if more <= 0 or value.device.type != "cpu":
            return func(*args, **kwargs)
        padded = nn.functional.pad(value, (0, more))
        return func(query, key, padded, *rest, **kwargs)[..., : value.shape[-1]]
