"""Tables of the formulas that modules of transformers compute and the attributes they read.

One file a kind of module, and in it a table by the digest of the code of a class: releases of
transformers share code among families, so that 52 classes of norms are one entry, and a class whose
code changes in a later release is no longer found. A new family wants no entry where it repeats
known code; otherwise read the code, add an entry, and tests/hf/test_known.py compares it.
"""

from moe_ops.hf.models.attention import register_attention
from moe_ops.hf.models.layers import register_block, register_layer
from moe_ops.hf.models.networks import register_network
from moe_ops.hf.models.norms import register_norm
from moe_ops.hf.models.routers import register_router

__all__ = [
    "register_attention",
    "register_block",
    "register_layer",
    "register_network",
    "register_norm",
    "register_router",
]
