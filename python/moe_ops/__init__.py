"""Mixture-of-experts operators for PyTorch.

``import moe_ops`` registers the ops under ``torch.ops.moe_ops`` and provides documented functions
for them as ``moe_ops.<op>``. Layers are in :mod:`moe_ops.layers`, the Hugging Face integration is
in :mod:`moe_ops.hf`, and reference implementations in plain torch are in :mod:`moe_ops.reference`.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

from moe_ops._threads import sleep_in_commands as _sleep_in_commands

_sleep_in_commands()

from moe_ops._load import load as _load  # noqa: E402

_load(__version__)

from moe_ops.numerics import (  # noqa: E402
    batch_invariant,
    is_batch_invariant_enabled,
    set_batch_invariant,
)
from moe_ops.ops import *  # noqa: E402, F403
from moe_ops.ops import __all__ as _ops  # noqa: E402
from moe_ops.packing import pack_weights, packed_weight_bytes, set_packing_policy, unpack_weights  # noqa: E402

__all__ = [
    "Int4WeightConfig",
    "Int8WeightConfig",
    "__version__",
    "batch_invariant",
    "is_batch_invariant_enabled",
    "pack_weights",
    "packed_weight_bytes",
    "quantize",
    "set_batch_invariant",
    "set_packing_policy",
    "unpack_weights",
]
__all__ += _ops

if TYPE_CHECKING:
    from moe_ops import reference as reference
    from moe_ops.quant import Int4WeightConfig as Int4WeightConfig
    from moe_ops.quant import Int8WeightConfig as Int8WeightConfig
    from moe_ops.quant import quantize as quantize
else:

    def __getattr__(name: str) -> Any:
        """Imports the reference and quantization on first use: no op needs them."""
        if name == "reference":
            return _import_module(f"{__name__}.reference")
        if name in ("Int4WeightConfig", "Int8WeightConfig", "quantize"):
            return getattr(_import_module(f"{__name__}.quant"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
