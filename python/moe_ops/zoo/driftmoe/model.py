"""The router network, and the model that routes, predicts and learns one example at a time.

Letters: D features, E experts, K experts per token, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops._fields import check_choice, check_least
from moe_ops.layers import TopKRouter

from .._presets import preset
from .experts import (
    EXPERTS,
    StreamExpert,
    cooperative_labels,
    hoeffding_tree,
    probability_row,
    right_experts,
)

VARIANTS = ("data", "task")
PREDICTIONS = ("first", "vote")


@dataclass(frozen=True)
class DriftMoEConfig:
    """Sizes and options.

    Attributes:
        num_features: D, features per example. num_classes: C, the maximum number of classes.
        variant: "data": experts train on examples that the router sends them, and the correct
            experts are the router's labels. "task": expert c learns class c against the rest, from
            all examples, and the router learns the class; `num_experts` and `top_k` are then C.
        num_experts, top_k: E, and K experts that learn from an example.
        prediction: "first": the router's first expert predicts ("task": the router's class,
            independent of the experts). "vote": of the K experts ("task": of all), weighted by the
            router.
        expert: "tree" or "adaptive_tree", see `hoeffding_tree`; grace_period, delta: of it.
        hidden_sizes: of the router's layers. dropout: in its training steps.
        temperature: routing divides the logits by it; the router's loss does not.
        rate: of Adam. batch_size: examples of a router step; 1 in the published MoE-Task.
        standardize: the router gets features standardized with the mean and deviation of the stream
            so far.
        seed: of the router's weights, dropout and adaptive trees.
    """

    num_features: int = 24
    num_classes: int = 10
    variant: str = "data"
    num_experts: int = 4
    top_k: int = 2
    prediction: str = "first"
    expert: str = "tree"
    grace_period: int = 50
    delta: float = 1e-7
    hidden_sizes: tuple[int, ...] = (32, 16)
    dropout: float = 0.2
    temperature: float = 0.8
    rate: float = 2e-3
    batch_size: int = 32
    standardize: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("DriftMoEConfig", "variant", self.variant, VARIANTS)
        check_choice("DriftMoEConfig", "prediction", self.prediction, PREDICTIONS)
        check_choice("DriftMoEConfig", "expert", self.expert, EXPERTS)
        for name in ("num_features", "num_classes", "num_experts", "top_k", "batch_size"):
            check_least("DriftMoEConfig", name, getattr(self, name), 1)
        if not self.temperature > 0:
            raise ValueError(
                f"DriftMoEConfig: temperature must be above 0, got {self.temperature}."
            )

    tiny = preset("Four experts of which two learn from an example.")
    moe_data = preset(
        "The published MoE-Data: twelve experts, three learn, the router every 256 examples.",
        num_experts=12,
        top_k=3,
        hidden_sizes=(256, 128),
        batch_size=256,
    )
    moe_task = preset(
        "The published MoE-Task: an expert a class, a router step an example.",
        variant="task",
        hidden_sizes=(256, 128),
        batch_size=1,
    )

    @property
    def experts(self) -> int:
        """Returns E."""
        return self.num_classes if self.variant == "task" else self.num_experts

    @property
    def trained(self) -> int:
        """Returns K."""
        return self.num_classes if self.variant == "task" else self.top_k


class RunningScale(nn.Module):
    """Standardization by mean and deviation of all examples given to `update` (Welford's method,
    fp64).

    Features without variation so far are only shifted.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(num_features, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(num_features, dtype=torch.float64))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Adds one example, [D]."""
        self.count += 1
        away = x - self.mean
        self.mean += away / self.count
        self.squares += away * (x - self.mean)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., D] fp64 to fp32."""
        deviation = (self.squares / self.count.clamp(min=1)).sqrt()
        return ((x - self.mean) / deviation.masked_fill(deviation == 0, 1.0)).float()


class StreamRouter(nn.Module):
    """Network D -> hidden sizes -> E: linear maps, ReLU and dropout, then a `TopKRouter`.

    Weights have Xavier's initialization, biases start at 0.
    """

    def __init__(self, config: DriftMoEConfig) -> None:
        super().__init__()
        self.scale = RunningScale(config.num_features) if config.standardize else None
        layers: list[nn.Module] = []
        sizes = (config.num_features, *config.hidden_sizes)
        for i in range(len(config.hidden_sizes)):
            linear = nn.Linear(sizes[i], sizes[i + 1])
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.ReLU(), nn.Dropout(config.dropout)]
        self.trunk = nn.Sequential(*layers)
        self.router = TopKRouter(sizes[-1], config.experts, config.trained, bias=True)
        nn.init.xavier_uniform_(self.router.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Returns router_logits [T, E] of features [T, D] fp64."""
        return self.router.logits(self.trunk(self.scale(x) if self.scale else x.float()))


class Step(NamedTuple):
    """Result of one example.

    label: prediction before learning from it; None if there was none. topk_ids: [K] the experts
    that learned from it, in the router's order. right: [E] bool, the experts that would have been
    right; None under "task", whose experts answer other questions.
    """

    label: Any
    topk_ids: Tensor
    right: Tensor | None


class DriftMoE(nn.Module):
    """Classifier of a stream: experts that learn online, and a router over them.

    The module's parameters are the router's. The experts hold no tensors and are not in its state
    dict.

    Args:
        config: sizes and choices.
        make_expert: expert index -> a `StreamExpert`; None: trees of river. Under "task" its
            classes are True and False.

    Raises:
        ImportError: trees are needed and river is not installed.
    """

    def __init__(
        self, config: DriftMoEConfig, make_expert: Callable[[int], StreamExpert] | None = None
    ) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.network = StreamRouter(config)
            # Dropout uses torch's global generator; the model stores its state.
            self._noise = torch.get_rng_state()
        self.experts: list[StreamExpert] = [
            hoeffding_tree(config.expert, config.grace_period, config.delta, config.seed + i)
            if make_expert is None
            else make_expert(i)
            for i in range(config.experts)
        ]
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=config.rate)
        self.classes: dict[Any, int] = {}
        self.names: tuple[Any, ...] = ()
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self.eval()

    # Prediction.

    def predict_one(self, x: Mapping[Any, Any]) -> Any:
        """Returns the most likely class, None before the first example."""
        return self._label(self._scores(*self._routed(x)[1:], x))

    def predict_proba_one(self, x: Mapping[Any, Any]) -> dict[Any, float]:
        """Returns class -> probability for the classes seen so far; empty before the first
        example."""
        scores = self._scores(*self._routed(x)[1:], x)
        total = sum(scores) or 1.0
        return {label: scores[i] / total for label, i in self.classes.items()}

    @torch.no_grad()
    def _routed(self, x: Mapping[Any, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns features [D], logits [E] divided by the temperature, topk_weights and topk_ids
        [K]."""
        features = self._features(x)
        logits = self._logits(features) / self.config.temperature
        weights, ids = self.network.router.route(logits)
        return features, logits[0], weights[0], ids[0]

    def _logits(self, features: Tensor) -> Tensor:
        """Returns router_logits [1, E] of features [D]."""
        logits: Tensor = self.network(features[None])
        return logits

    def _features(self, x: Mapping[Any, Any]) -> Tensor:
        names = self.names or tuple(x)
        if len(names) != self.config.num_features or len(x) != len(names):
            raise ValueError(
                f"DriftMoE: examples must have {self.config.num_features} features, got {len(x)}."
            )
        try:
            values = [float(x[name]) for name in names]
        except KeyError as error:
            raise ValueError(
                f"DriftMoE: examples must have the features of the first one, got one without "
                f"{error.args[0]!r}."
            ) from None
        except (TypeError, ValueError):
            values = [math.nan]
        if not all(map(math.isfinite, values)):
            raise ValueError(f"DriftMoE: features must be finite numbers, got {dict(x)}.")
        self.names = names
        return torch.tensor(values, dtype=torch.float64)

    def _scores(
        self, logits: Tensor, weights: Tensor, ids: Tensor, x: Mapping[Any, Any]
    ) -> list[float]:
        """Returns a score for each class seen so far; calls only the experts that it needs."""
        config = self.config
        if config.variant == "task":
            likely: list[float] = F.softmax(logits[: len(self.classes)], dim=0).tolist()
            if config.prediction == "first":
                return likely
            return [p * self._said(c, x).get(True, 0.0) for c, p in enumerate(likely)]
        chosen = ids.tolist()[:1] if config.prediction == "first" else ids.tolist()
        shares = [1.0] if config.prediction == "first" else weights.tolist()
        total = [0.0] * len(self.classes)
        for share, e in zip(shares, chosen, strict=True):
            said = probability_row(self._said(e, x), self.classes)
            total = [old + share * p for old, p in zip(total, said, strict=True)]
        return total

    def _said(self, expert: int, x: Mapping[Any, Any]) -> Mapping[Any, float]:
        return self.experts[expert].predict_proba_one(x)

    def _label(self, scores: Sequence[float]) -> Any:
        best = max(scores, default=0.0)
        if best <= 0:
            return None
        number = scores.index(best)
        return next(label for label, i in self.classes.items() if i == number)

    # Learning.

    def learn_one(self, x: Mapping[Any, Any], y: Any) -> None:
        """Learns from one labeled example."""
        self._learn(x, y, self._routed(x))

    def observe(self, x: Mapping[Any, Any], y: Any) -> Step:
        """Runs `predict_one`, then `learn_one`, with one pass of the router."""
        routed = self._routed(x)
        label = self._label(self._scores(*routed[1:], x))
        right = self._learn(x, y, routed)
        return Step(label, routed[3], right)

    def _learn(
        self, x: Mapping[Any, Any], y: Any, routed: tuple[Tensor, Tensor, Tensor, Tensor]
    ) -> Tensor | None:
        features, _, _, ids = routed
        if y not in self.classes:
            if len(self.classes) == self.config.num_classes:
                raise ValueError(
                    f"DriftMoE: there must be at most {self.config.num_classes} classes, got "
                    f"{y!r} beside {', '.join(map(repr, self.classes))}."
                )
            self.classes[y] = len(self.classes)
        number = self.classes[y]
        right = None
        if self.config.variant == "task":
            label = F.one_hot(torch.tensor(number), self.config.experts).double()
            for c, expert in enumerate(self.experts):
                expert.learn_one(x, c == number)
        else:
            rows = [probability_row(expert.predict_proba_one(x), self.classes)
                    for expert in self.experts]  # fmt: skip
            probabilities = torch.tensor(rows, dtype=torch.float64)
            label = cooperative_labels(probabilities, number)
            right = right_experts(probabilities, number)
            for e in ids.tolist():
                self.experts[e].learn_one(x, y)
        if self.network.scale is not None:
            self.network.scale.update(features)
        self._waiting.append((features, label))
        if len(self._waiting) == self.config.batch_size:
            self._router_step()
        return right

    def _router_step(self) -> None:
        """Makes one Adam step on the binary cross-entropy of the collected examples."""
        features, labels = (torch.stack(part) for part in zip(*self._waiting, strict=True))
        self._waiting.clear()
        self.network.train()
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._noise)
            logits = self.network(features)
            self._noise = torch.get_rng_state()
        loss = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.network.eval()
