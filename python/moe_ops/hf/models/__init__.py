"""Tables of the formulas that modules of transformers compute and the attributes that they read.

Each kind of module has a file with a table, keyed by the digest of a class's code: model families
share code, so that 52 classes of norms are one entry, and a class whose code changes in a later
release is no longer found. A new family needs no entry if it repeats known code; otherwise read the
code and add an entry, which tests/hf/test_known.py verifies.
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
