"""Streams of river with known drift positions."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Example = tuple[Any, Any]
DRIFTS = (0.25, 0.5, 0.75)
# Width of a gradual drift, as a fraction of the stream.
WIDTH = 0.05


def import_river() -> Any:
    """Imports river.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import river
        import river.datasets.synth
        import river.drift
        import river.forest
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the studies of driftmoe need {error.name}, which is not installed: "
            "pip install torch-moe-ops[streams]"
        ) from error
    return river


@dataclass(frozen=True)
class Stream:
    """Stream by name.

    Attributes:
        summary: short description with the kind of drift.
        num_features, num_classes: of its examples.
        make: (examples, seed) -> iterator over that many, or all if there are fewer.
        shares: positions of its sudden or gradual drifts, as fractions of the stream; empty for
            continuous or unknown drift.
    """

    summary: str
    num_features: int
    num_classes: int
    make: Callable[[int, int], Iterator[Example]]
    shares: tuple[float, ...] = ()

    def examples(self, count: int, seed: int = 0) -> Iterator[Example]:
        """Returns the first `count` examples; they depend only on the seed."""
        return self.make(count, seed)

    def drifts(self, count: int) -> list[int]:
        """Returns the drift positions in a stream of `count` examples."""
        return [round(share * count) for share in self.shares]


def switching(
    concepts: Sequence[Iterator[Example]],
    places: Sequence[int],
    count: int,
    *,
    width: float = 0.0,
    seed: int = 0,
) -> Iterator[Example]:
    """Yields `count` examples, of concept i + 1 from position i on.

    Args:
        width: 0: sudden. Otherwise example t is of a concept after position p with probability 1 /
            (1 + exp(-4 (t - p) / width)).
        seed: of these draws.

    Raises:
        ValueError: the number of positions is not one less than the concepts, or they are not in
            order.

    Source: Bifet et al. 2009 (New ensemble methods for evolving data streams, KDD).
    """
    if len(concepts) != len(places) + 1 or list(places) != sorted(places):
        raise ValueError(
            f"switching: places must be {len(concepts) - 1} in ascending order, got {list(places)}."
        )
    draw = random.Random(seed)
    for t in range(count):
        now = 0
        for i, place in enumerate(places):
            if width:
                away = min(max(-4 * (t - place) / width, -700.0), 700.0)
                passed = draw.random() < 1 / (1 + math.exp(away))
            else:
                passed = t >= place
            now = i + 1 if passed else now
        yield next(concepts[now])


def _led(width: float) -> Callable[[int, int], Iterator[Example]]:
    def make(count: int, seed: int) -> Iterator[Example]:
        """Yields LED digits of which 1, 3, 5, 7 attributes have swapped positions with irrelevant
        ones."""
        synth = import_river().datasets.synth
        concepts = [
            iter(
                synth.LEDDrift(
                    seed=1000 * seed + i,
                    noise_percentage=0.1,
                    irrelevant_features=True,
                    n_drift_features=2 * i + 1,
                )
            )
            for i in range(4)
        ]
        return _switched(concepts, count, width, seed)

    return make


def _sea(width: float) -> Callable[[int, int], Iterator[Example]]:
    def make(count: int, seed: int) -> Iterator[Example]:
        """Yields thresholds on a sum: functions 1, 2, 4, 1 with a tenth of the classes flipped."""
        synth = import_river().datasets.synth
        concepts = [
            iter(synth.SEA(variant=variant, noise=0.1, seed=1000 * seed + i))
            for i, variant in enumerate((0, 1, 3, 0))
        ]
        return _switched(concepts, count, width, seed)

    return make


def _switched(
    concepts: list[Iterator[Example]], count: int, width: float, seed: int
) -> Iterator[Example]:
    places = [round(share * count) for share in DRIFTS]
    return switching(concepts, places, count, width=width * count, seed=seed)


def _rbf(speed: float) -> Callable[[int, int], Iterator[Example]]:
    def make(count: int, seed: int) -> Iterator[Example]:
        """Yields five classes around 50 moving centroids."""
        synth = import_river().datasets.synth
        stream = synth.RandomRBFDrift(
            seed_model=seed, seed_sample=seed, n_classes=5, n_features=10, n_centroids=50,
            change_speed=speed, n_drift_centroids=50,
        )  # fmt: skip
        return stream.take(count)

    return make


def _shuttle(count: int, seed: int) -> Iterator[Example]:
    """Yields NASA's shuttle sensor data in order, from an offset determined by the seed; the
    classes are very uneven (79 % are of one)."""
    rows = list(import_river().datasets.Shuttle())
    start = random.Random(seed).randrange(len(rows))
    return iter((rows[start:] + rows[:start])[:count])


STREAMS = {
    "led_a": Stream("LED digits, sudden drifts", 24, 10, _led(0.0), DRIFTS),
    "led_g": Stream("LED digits, gradual drifts", 24, 10, _led(WIDTH), DRIFTS),
    "sea_a": Stream("SEA, sudden drifts", 3, 2, _sea(0.0), DRIFTS),
    "sea_g": Stream("SEA, gradual drifts", 3, 2, _sea(WIDTH), DRIFTS),
    "rbf_m": Stream("centroids that move at 1e-4", 10, 5, _rbf(1e-4)),
    "rbf_f": Stream("centroids that move at 1e-3", 10, 5, _rbf(1e-3)),
    "shuttle": Stream("sensors of a space shuttle (river's own file)", 9, 7, _shuttle),
}
