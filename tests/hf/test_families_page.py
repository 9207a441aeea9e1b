"""docs/families.md lists the families of transformers that the tests build, and what runs there.

python -m tests.hf.test_families_page      # prints the table of the page
"""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

import moe_ops
import moe_ops.hf

from . import families
from .test_known import KNOWN

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
# Parts that `moe_ops.hf.optimize` knows -> the words of the page, in their order there.
PARTS = {
    "block": "the MoE block",
    "shared": "shared experts",
    "router": "routers",
    "attention": "attention",
    "network": "dense networks",
    "norm": "norms",
}
SWITCHES = {"experts_implementation": "yes", "forward": "by `enable`"}


def table() -> list[str]:
    """Returns the lines of the page's table."""
    heads = ("class (`model_type`)", "experts on moe_ops", "int8 and int4 experts", "other parts")
    lines = [f"| {' | '.join(heads)} |", "|---|---|---|---|"]
    for family in families.FAMILIES:
        model = families.build(family)
        (switch,) = set(moe_ops.hf.enable(model).values())
        try:
            moe_ops.quantize(families.build(family), moe_ops.Int8WeightConfig())
            quantized = "yes"
        except ValueError:
            quantized = "no"
        parts = [word for part, word in PARTS.items() if part in KNOWN[family].split()]
        name = f"`{type(model).__name__}` (`{model.config.model_type}`)"
        lines.append(f"| {' | '.join((name, SWITCHES[switch], quantized, ', '.join(parts)))} |")
    return lines


@pytest.mark.cpu_only
@pytest.mark.skipif(not transformers.__version__.startswith("5.25."), reason="the page is of 5.25")
def test_the_page_has_the_table():
    text = PAGE.read_text()
    assert "\n".join(table()) in text, "python -m tests.hf.test_families_page prints the new table"
    assert f"{len(families.FAMILIES)} families" in text


if __name__ == "__main__":
    print("\n".join(table()))
