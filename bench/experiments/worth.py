"""What a study promises before it is run: how many headlines it will decide.

By the pilot in its plan, or else by the run with seeds 0 to 2 before the present rules, which may
have been of another size: enough for an order of the queue, and not for a plan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .inference import power
from .report import Claim, Report
from .study import Experiment, Hypothesis, Study


def expected(
    hypothesis: Hypothesis, found: Experiment, before: Sequence[Report]
) -> tuple[float, float] | None:
    """Mean and deviation of a seed."""
    if hypothesis.expected is not None and hypothesis.deviation is not None:
        return hypothesis.expected, hypothesis.deviation
    statements = {h.earlier for h in found.headlines if h.key == hypothesis.key} - {""}
    claims: list[Claim] = [c for r in before for c in r.claims if c.statement in statements]
    if not claims:
        return None
    return claims[0].mean, claims[0].standard_error * math.sqrt(len(claims[0].differences))


def decisions(study: Study, found: Experiment, before: Sequence[Report]) -> dict[str, float | None]:
    """Key of a headline -> the chance that the study shows or contradicts it, None if nothing is
    known."""
    chances: dict[str, float | None] = {}
    for hypothesis in study.hypotheses:
        if not hypothesis.key:
            continue
        pilot = expected(hypothesis, found, before)
        if pilot is None:
            chances[hypothesis.key] = None
            continue
        mean, deviation = pilot
        beyond = mean - hypothesis.bound
        chances[hypothesis.key] = (
            sum(power(effect, deviation, study.seeds) for effect in (beyond, -beyond))
            if deviation > 0
            else float(beyond != 0)
        )
    return chances


def said(chances: dict[str, float | None]) -> str:
    """For a list of studies."""
    known = [chance for chance in chances.values() if chance is not None]
    if not known:
        return f"{len(chances)} headlines, nothing known"
    rest = (
        f", {len(chances) - len(known)} of which nothing is known"
        if len(known) < len(chances)
        else ""
    )
    return f"decides {sum(known):.1f} of {len(known)} headlines by what is known{rest}"
