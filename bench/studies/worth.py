"""The promise of a study before it is run, by the pilot in its plan: how many headlines it will
decide."""

from __future__ import annotations

from .inference import power
from .study import Study


def decisions(study: Study) -> dict[str, float | None]:
    """Key of a headline -> the chance that the study shows or contradicts it, None if nothing is
    known."""
    chances: dict[str, float | None] = {}
    for hypothesis in study.hypotheses:
        if not hypothesis.key:
            continue
        mean, deviation = hypothesis.expected, hypothesis.deviation
        if mean is None or deviation is None:
            chances[hypothesis.key] = None
            continue
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
