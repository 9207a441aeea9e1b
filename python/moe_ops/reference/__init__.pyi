from moe_ops.ops import *  # noqa: F403
from moe_ops.ops import __all__ as __all__
