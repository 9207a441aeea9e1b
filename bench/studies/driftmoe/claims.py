"""DriftMoE against a random router, one Hoeffding tree and an adaptive random forest, on streams.

Every example tests a model and then trains it, so that no data is held out. A seed determines the
stream and all models. Needs river.
"""

from __future__ import annotations

from typing import Any

from bench.studies.driftmoe.prequential import prequential
from bench.studies.driftmoe.streams import STREAMS
from bench.studies.driftmoe.training import ARMS, make_arm

from ..compare import Series, series
from ..picture import Picture
from ..study import Experiment, Headline, Hypothesis, Job, Results, Run, Study

COLUMNS = (
    "accuracy", "after drifts", "kappa M", "oracle", "any expert", "effective experts",
)  # fmt: skip
FOREST = 10
POINTS = 40
# Headlines decided by streams other than the leading one.
ELSEWHERE = ("random on rbf_m", "tree on rbf_m", "forest on rbf_m", "tree on sea_a")
EVERY = ("moe_data", "moe_data_vote", "moe_task", "random_router", "tree", "adaptive_forest")


def one(stream: str, arm: str, samples: int) -> Job:
    def perform(seed: int, run: Run) -> dict[str, Any]:
        there = STREAMS[stream]
        found = prequential(
            make_arm(arm, there, seed, FOREST),
            there.examples(samples, seed),
            window=samples // POINTS,
            progress=False,
        ).numbers(there.drifts(samples))
        row = {column: found["numbers"][column] for column in COLUMNS}
        return {"rows": {f"{stream}: {arm}": row}, "curve": found["curve"]}

    return perform


def ahead(
    stream: str, arm: str, other: str, statement: str, key: str, *, bound: float = 0.0
) -> Hypothesis:
    def of(r: Results) -> list[float]:
        return r.gap(f"{stream}: {arm}", f"{stream}: {other}", "accuracy")

    return Hypothesis(f"{stream}: {statement}", of, "accuracy", bound, False, key)


def study(name: str, stream: str, rank: int, minutes: float, samples: int, decides: bool) -> Study:
    """Returns a study; `decides`: the stream whose verdicts lead the page."""

    def key(name: str) -> str:
        there = f"{name} on {stream}"
        return name if decides else there * (there in ELSEWHERE)

    def routed_alone(r: Results) -> list[float]:
        return r.gap(f"{stream}: moe_data", f"{stream}: moe_data", "accuracy", "any expert")

    hypotheses = [
        ahead(
            stream, "moe_data", "random_router", "MoE-Data is 0.05 ahead of random routing",
            key("random"), bound=0.05,
        ),
        Hypothesis(
            f"{stream}: the router's expert is better than a random one of the same experts",
            routed_alone, "accuracy", below=False, key=key("routed"),
        ),
        ahead(stream, "moe_data", "tree", "MoE-Data is ahead of one tree", key("tree")),
        ahead(
            stream, "moe_data", "adaptive_forest",
            f"MoE-Data is at most 0.01 behind an adaptive forest of {FOREST} trees",
            key("forest"), bound=-0.01,
        ),
        ahead(
            stream, "moe_task", "adaptive_forest",
            "MoE-Task is at most 0.01 behind the forest", key("task"), bound=-0.01,
        ),
        ahead(
            stream, "moe_data_vote", "moe_data", "a vote of three experts is better than the first",
            key("vote"),
        ),
    ]  # fmt: skip

    def made() -> dict[str, str]:
        there = STREAMS[stream]
        return {
            "Stream": f"{there.summary}: {samples} examples of {there.num_features} features and "
            f"{there.num_classes} classes, drifts at "
            f"{', '.join(map(str, there.drifts(samples))) or 'no single places'}",
            "Models": "presets `moe_data` and `moe_task`; a Hoeffding tree with the experts' "
            f"options; river's ARFClassifier of {FOREST} trees",
            "Columns": "prequential accuracy; the same over the "
            f"{samples // POINTS} examples after each drift; kappa M; share of examples of which "
            "some expert was right; mean share of experts that were; exp of the entropy of first "
            "choices",
        }

    def pictures(results: Results) -> list[Picture]:
        x = [(i + 0.5) * (samples // POINTS) for i in range(POINTS)]
        curves: Series = {arm: series(x, results.every(arm, "curve")) for arm in EVERY}
        drifts = ", ".join(map(str, STREAMS[stream].drifts(samples)))
        title = f"{stream}: prequential accuracy{f', drifts at {drifts}' * bool(drifts)}"
        return [Picture(stream, title, "examples", "accuracy", "lines", curves)]

    runs = {arm: one(stream, arm, samples) for arm in EVERY}
    return Study(name, stream, rank, runs, 5, minutes, hypotheses, made, pictures)


assert set(EVERY) <= set(ARMS)

SHORT = (
    "20,000 of the published 1,000,000 examples, in which trees hardly split; streams of a million "
    "and forests of a hundred trees would test it"
)
EXPERIMENT = Experiment(
    "driftmoe",
    (
        study("driftmoe-sea", "sea_a", 35, 0.6, 20_000, False),
        study("driftmoe-rbf", "rbf_m", 36, 1.0, 20_000, False),
        study("driftmoe-shuttle", "shuttle", 37, 0.7, 20_000, False),
        study("driftmoe-led", "led_a", 34, 1.2, 20_000, True),
    ),
    (
        Headline(
            "random", "0.05 ahead of random routing, LED", "not compared", "mechanism",
            shown="trees learn what they are chosen for, and the router finds some of them",
        ),
        Headline(
            "routed", "the router's expert beats a random one of the same experts, LED",
            "not compared", "mechanism",
            shown="one of twelve is right in 86 % of the examples, any of them in 25 %",
        ),
        Headline(
            "tree", "ahead of one tree, LED", "ahead", "quality",
            shown="between drifts; in the window after one both have 0.22",
        ),
        Headline(
            "forest", "at most 0.01 behind an adaptive forest, LED",
            "level with forests of a hundred trees", "quality", untestable=SHORT,
        ),
        Headline(
            "random on rbf_m", "0.05 ahead of random routing, RBF", "–", "mechanism",
            shown="as on LED",
        ),
        Headline(
            "tree on rbf_m", "ahead of one tree, RBF", "ahead", "quality",
            shown="classes move all the time, and a choice of trees follows them better than one",
        ),
        Headline(
            "forest on rbf_m", "at most 0.01 behind an adaptive forest, RBF",
            "level with forests of a hundred trees", "quality", untestable=SHORT,
        ),
        Headline(
            "tree on sea_a", "ahead of one tree, SEA", "ahead", "quality",
            not_shown="likely: a drift moves a threshold, which one tree mends as fast",
        ),
        Headline(
            "task", "MoE-Task is at most 0.01 behind the forest, LED", "competitive", "quality",
            untestable=SHORT,
        ),
        Headline(
            "vote", "a vote of three beats the first expert, LED", "not used", "quality",
            not_shown="on SEA and RBF it does",
        ),
    ),
)  # fmt: skip
