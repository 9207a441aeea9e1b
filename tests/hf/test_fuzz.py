"""A random draw of every model family; `python -m tests.hf.fuzz` runs many more."""

from __future__ import annotations

import dataclasses
import random

import pytest

from .families import FAMILIES
from .fuzz import outcome_of
from .fuzz_draws import MODES, Draw, options_of, random_draw


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    "family",
    [
        # What a draw shows of one family it shows of the code that families share.
        pytest.param(family, marks=pytest.mark.full if i % 2 else ())
        for i, family in enumerate(FAMILIES)
    ],
)
def test_optimized_models_compute_what_they_did(family, request):
    rng = random.Random(family)
    wanted = 4 if request.config.getoption("--full") else 1
    for _ in range(12 * wanted):  # Some draws are refused by transformers.
        modes = ("none", rng.choice(MODES[1:]))
        draw = dataclasses.replace(random_draw(rng, family), modes=modes)
        outcome = outcome_of(draw)
        assert not outcome["fault"], f"python -m tests.hf.fuzz '{draw}'\n{outcome['fault']}"
        wanted -= "refused" not in outcome
        if wanted == 0:
            return
    pytest.fail(f"{wanted} draws more could not be checked")


def test_draws_are_read_again_from_their_text():
    rng = random.Random(0)
    for _ in range(100):
        draw = random_draw(rng)
        assert Draw.of(str(draw)) == draw
    assert Draw.of("family=olmoe clip_qkv=8.0").overrides == {"clip_qkv": 8.0}
    assert 8.0 in options_of("olmoe")["clip_qkv"]
