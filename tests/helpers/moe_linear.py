"""Cases of moe_linear_map and moe_linear_reduce that reach into several blocks."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.routing import Routing

from moe_ops.testing import VIEWS, short

# Enough rows of an expert for blocks of tokens on the CPU: one block, a chunk of two, many chunks.
ROUTINGS_OF_BLOCKS = [
    pytest.param(routing, id=str(routing), marks=() if first else pytest.mark.slow_on_simulator)
    for routing, first in (
        (Routing(64, 4, 2, "dropped"), True),
        (Routing(200, 4, 2), False),
        (Routing(300, 3, 2, "half_empty"), False),
        (Routing(270, 2, 2, "out_of_range", torch.int64), False),
        (Routing(600, 5, 3, "repeated"), False),
        (Routing(200, 4, 1, "one_expert"), True),
    )
]

VIEWS_OF_BLOCKS = [
    pytest.param(
        view,
        dtype,
        marks=()
        if dtype == torch.float32 or view in ("contiguous", "transposed")
        else pytest.mark.slow_on_simulator,
        id=f"{short(dtype)}-{view}",
    )
    for dtype in (torch.float32, torch.bfloat16)
    for view in (*VIEWS, "step2_last")
]
