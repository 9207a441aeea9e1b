"""torch's fast attention on the CPU for values that are narrower than keys, as latent attention's.

`scaled_dot_product_attention` takes its blocked kernel on the CPU only where queries, keys and
values have one width; otherwise it makes all scores of all heads. Keys of DeepSeek-V3 have 192
features and values 128: with values padded by zeros the products are a quarter more, and no
scores are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_attention = nn.functional.scaled_dot_product_attention


class PaddedValues(TorchFunctionMode):
    """While it is entered, values of attention on the CPU are as wide as keys."""

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
