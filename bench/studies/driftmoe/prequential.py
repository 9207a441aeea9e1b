"""Prequential evaluation: every example first tests the model, then trains it."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from ..progress import bar


@dataclass
class Prequential:
    """Results of a run over a stream.

    Attributes:
        hits: True for each correct prediction. labels: the true classes, by index.
        curve: accuracy of each whole window, in order. window: its examples.
        detected: examples at which the detector found a drift of the error.
        oracle, any_expert: fraction of examples for which some expert was right, and the mean
            fraction of experts that were; None for a model without experts for the model's own
            classes. The second is the accuracy of a randomly selected expert.
        effective_experts: exp of the entropy of the first experts, None as for oracle.
        seconds: of processor time, not included in `numbers`.
    """

    hits: list[bool] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    window: int = 1000
    detected: list[int] = field(default_factory=list)
    oracle: float | None = None
    any_expert: float | None = None
    effective_experts: float | None = None
    seconds: float = 0.0

    @property
    def accuracy(self) -> float:
        return sum(self.hits) / len(self.hits)

    @property
    def curve(self) -> list[float]:
        parts = range(0, len(self.hits) - self.window + 1, self.window)
        return [sum(self.hits[i : i + self.window]) / self.window for i in parts]

    def numbers(self, drifts: Sequence[int] = (), span: int | None = None) -> dict[str, Any]:
        """Returns the results as JSON, with drifts also the accuracy before and after them."""
        found = {
            "accuracy": self.accuracy,
            "kappa M": kappa_m(self.hits, self.labels),
            "kappa temporal": kappa_temporal(self.hits, self.labels),
            "oracle": self.oracle,
            "any expert": self.any_expert,
            "effective experts": self.effective_experts,
            "before drifts": None,
            "after drifts": None,
        }
        if drifts:
            before, after = around(self.hits, drifts, span or self.window)
            found |= {"before drifts": before, "after drifts": after}
        return {
            # JSON has no NaN.
            "numbers": {k: None if v is None or math.isnan(v) else v for k, v in found.items()},
            "curve": [round(value, 4) for value in self.curve],
            "window": self.window,
            "detected": self.detected,
        }


def kappa_m(hits: Sequence[bool], labels: Sequence[int]) -> float:
    """Returns (p - m) / (1 - m), where m is the prequential accuracy of the most frequent class so
    far (ties: the earliest); nan if m is 1.

    Source: Bifet et al. 2015 (Efficient Online Evaluation of Big Data Stream Classifiers, KDD).
    """
    counts: Counter[int] = Counter()
    right = 0
    for label in labels:
        right += bool(counts) and counts.most_common(1)[0][0] == label
        counts[label] += 1
    return _beyond(hits, right)


def kappa_temporal(hits: Sequence[bool], labels: Sequence[int]) -> float:
    """Returns kappa_m's formula with a classifier that repeats the last class as the baseline."""
    return _beyond(hits, sum(a == b for a, b in pairwise(labels)))


def _beyond(hits: Sequence[bool], right: int) -> float:
    share, baseline = sum(hits) / len(hits), right / len(hits)
    return (share - baseline) / (1 - baseline) if baseline < 1 else float("nan")


def around(hits: Sequence[bool], drifts: Sequence[int], span: int) -> tuple[float, float]:
    """Returns the mean accuracy of the `span` examples before each drift, and of the `span`
    examples from it on."""
    parts: list[list[float]] = [[], []]
    for place in drifts:
        if place < 1 or place >= len(hits):
            raise ValueError(f"around: drifts must be in [1, {len(hits) - 1}], got {place}.")
        for found, piece in zip(
            parts, (hits[max(0, place - span) : place], hits[place : place + span]), strict=True
        ):
            found.append(sum(piece) / len(piece))
    return sum(parts[0]) / len(parts[0]), sum(parts[1]) / len(parts[1])


def prequential(
    model: Any,
    stream: Iterable[tuple[Any, Any]],
    *,
    total: int = 0,
    window: int = 1000,
    delay: int = 0,
    detector: Any = None,
    what: str = "stream",
    progress: bool = True,
) -> Prequential:
    """Runs a classifier over a stream.

    Args:
        model: with `predict_one` and `learn_one`, ours or one of river.
        stream: pairs of an example and its class.
        total: examples, for the bar.
        window: examples per point of the curve.
        delay: examples until a class is known; the last ones' never are.
        detector: of river.drift, fed with 1 for each wrong prediction, else 0; or None.
        what: name of the run, for its bar.

    Raises:
        ValueError: window below 1, a negative delay, or an empty stream.
    """
    if window < 1 or delay < 0:
        raise ValueError(
            f"prequential: window must be at least 1 and delay at least 0, got {window} and "
            f"{delay}."
        )
    found, began = Prequential(window=window), time.process_time()
    numbers: dict[Any, int] = {}
    waiting: deque[tuple[Any, Any]] = deque()
    ours = hasattr(model, "observe") and not delay
    usage = torch.zeros(len(model.experts), dtype=torch.long) if ours else None
    some, share_right = 0.0, 0.0
    same_question = False
    with bar(total, what, progress) as shown:
        for place, (x, y) in enumerate(stream):
            if usage is not None:
                label, ids, right = model.observe(x, y)
                usage[ids[0]] += 1
                if right is not None:
                    same_question = True
                    some += float(right.any())
                    share_right += float(right.double().mean())
            else:
                label = model.predict_one(x)
                waiting.append((x, y))
                if len(waiting) > delay:
                    model.learn_one(*waiting.popleft())
            hit = bool(label == y)
            found.hits.append(hit)
            found.labels.append(numbers.setdefault(y, len(numbers)))
            if detector is not None:
                detector.update(int(not hit))
                if detector.drift_detected:
                    found.detected.append(place)
            shown.update()
    count = len(found.hits)
    if not count:
        raise ValueError("prequential: stream must have an example, got none.")
    if usage is not None:
        share = usage.double() / count
        if same_question:
            found.oracle, found.any_expert = some / count, share_right / count
        found.effective_experts = float(torch.special.entr(share).sum().exp())
    found.seconds = time.process_time() - began
    return found
