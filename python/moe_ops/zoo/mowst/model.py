"""The two experts of Mowst, the confidence that mixes them, and the loss.

The weak expert is an MLP on a node's own features, the strong one a graph network. The confidence C
is a function of the distance between the weak expert's prediction and a uniform one.

Letters: N nodes, n classes, p the weak and q the strong expert's probabilities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops._fields import check_choice, check_least

from .._presets import preset
from .graphs import GNN, MLP, Edges

CONFIDENCES = ("variance", "entropy", "monotone", "free")


@dataclass(frozen=True)
class MowstConfig:
    """Sizes and options.

    Attributes:
        in_size, num_classes: features of a node and classes.
        backbone: of the strong expert: "gcn", "sage", "gat" or "gin".
        hidden_size, num_layers, dropout, heads: of both experts (heads: "gat" only).
        joint: Mowst* (one loss on the mixed prediction) instead of Mowst (the mixed loss).
        confidence: "variance" or "entropy": C is that dispersion. "monotone": learned, never
            falling in either dispersion, 0 for a uniform prediction and 1 for a certain one.
            "free": a learned network with a sigmoid, without these guarantees.
        gate_hidden, gate_dropout: of the learned kinds (dropout: "free" only).
        detach_dispersion: no gradient reaches the weak expert through C.
    """

    in_size: int = 16
    num_classes: int = 4
    backbone: str = "gcn"
    hidden_size: int = 64
    num_layers: int = 2
    dropout: float = 0.5
    heads: int = 1
    joint: bool = True
    confidence: str = "monotone"
    gate_hidden: int = 16
    gate_dropout: float = 0.0
    detach_dispersion: bool = False

    def __post_init__(self) -> None:
        check_least("MowstConfig", "num_classes", self.num_classes, 2)
        check_least("MowstConfig", "num_layers", self.num_layers, 1)
        check_choice("MowstConfig", "confidence", self.confidence, CONFIDENCES)

    tiny = preset("For tests and tries.", hidden_size=16, dropout=0.0)
    flickr = preset(
        "The paper's GCN for Flickr: 500 features, 7 classes, 3 layers of 256.",
        in_size=500,
        num_classes=7,
        hidden_size=256,
        num_layers=3,
        joint=False,
    )
    arxiv = preset(
        "The paper's GCN for ogbn-arxiv: 128 features, 40 classes, 3 layers of 256.",
        in_size=128,
        num_classes=40,
        hidden_size=256,
        num_layers=3,
    )


def dispersion(logits: Tensor) -> Tensor:
    """Returns [N, 2] for logits [N, n]: the distance of softmax(logits) from uniform, by two
    measures in [0, 1].

    The first is the variance of the probabilities over that of a one-hot vector, (n - 1) / n^2;
    the second is 1 - entropy / log n. Both are 0 for a uniform and 1 for a one-hot prediction.
    """
    num_classes = logits.shape[-1]
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    variance = p.var(-1, correction=0) * (num_classes**2 / (num_classes - 1))
    # Where p rounds to 0, log_p is finite and their product is 0.
    entropy = -(p * log_p).sum(-1) / math.log(num_classes)
    return torch.stack([variance, 1 - entropy], dim=-1)


class FixedConfidence(nn.Module):
    """Confidence equal to one of the dispersions, without parameters."""

    def __init__(self, column: int) -> None:
        super().__init__()
        self.column = column

    def forward(self, d: Tensor) -> Tensor:
        return d[:, self.column]


class MonotoneConfidence(nn.Module):
    """Learned confidence C = (f(d) - f(0)) / (f(1) - f(0)), where f is monotone in both
    dispersions.

    f sums sigmoid units with positive weights, so it never decreases; the quotient makes C(0) = 0
    and C(1) = 1 for any weights. It starts near the mean of the two dispersions.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        # softplus(0.54) is 1: units start with slope about 1 and thresholds spread over the range
        # of d.
        self.slope = nn.Parameter(torch.full((hidden_size, 2), 0.54))
        self.threshold = nn.Parameter(torch.linspace(-2, 0, hidden_size))
        self.height = nn.Parameter(torch.zeros(hidden_size))

    def _rise(self, d: Tensor) -> Tensor:
        units = torch.sigmoid(d @ F.softplus(self.slope).T + self.threshold)
        return units @ self.height.softmax(0)

    def forward(self, d: Tensor) -> Tensor:
        low, high = self._rise(torch.stack([torch.zeros_like(d[0]), torch.ones_like(d[0])]))
        span = (high - low).clamp(min=torch.finfo(d.dtype).eps)
        return ((self._rise(d) - low) / span).clamp(0, 1)


class FreeConfidence(nn.Module):
    """A two-layer network with batch normalization and a sigmoid, as in the authors' code."""

    def __init__(self, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, hidden_size),
            nn.BatchNorm1d(hidden_size),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_size, 1),
        )

    def forward(self, d: Tensor) -> Tensor:
        return self.net(d)[:, 0].sigmoid()


class MowstOutput(NamedTuple):
    """Output of both experts. weak_logits, strong_logits [N, n]; confidence [N] in [0, 1]."""

    weak_logits: Tensor
    strong_logits: Tensor
    confidence: Tensor

    def log_probs(self) -> Tensor:
        """Returns log(C p + (1 - C) q) [N, n]; it and its gradients are finite for C = 0 and
        C = 1."""
        tiny = torch.finfo(self.confidence.dtype).tiny
        log_c = self.confidence.clamp(min=tiny).log()[:, None]
        log_rest = (1 - self.confidence).clamp(min=tiny).log()[:, None]
        return torch.logaddexp(
            log_c + self.weak_logits.log_softmax(-1), log_rest + self.strong_logits.log_softmax(-1)
        )


class Prediction(NamedTuple):
    """Result of `Mowst.predict`.

    probs: [N, n]. confidence: [N]. used_strong: [N] bool, nodes whose strong expert was computed.
    """

    probs: Tensor
    confidence: Tensor
    used_strong: Tensor


class Mowst(nn.Module):
    """The two experts and the confidence. `strong` may be any module with `GNN`'s interface."""

    def __init__(self, config: MowstConfig, strong: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        sizes = (config.in_size, config.hidden_size, config.num_classes, config.num_layers)
        self.weak = MLP(*sizes, config.dropout)
        if strong is None:
            strong = GNN(config.backbone, *sizes, config.dropout, config.heads)
        # Any, because mypy knows only that a module's attributes are tensors or modules.
        self.strong: Any = strong
        self.gate = make_confidence(config)

    def confidence(self, weak_logits: Tensor) -> Tensor:
        """Returns C [N] from the weak expert's logits [N, n]."""
        if self.config.detach_dispersion:
            weak_logits = weak_logits.detach()
        return self.gate(dispersion(weak_logits))

    def forward(self, x: Tensor, edges: Edges) -> MowstOutput:
        """Runs both experts on all nodes; `edges` is `model.strong.prepare(edge_index, N)`."""
        weak = self.weak(x)
        return MowstOutput(weak, self.strong(x, edges), self.confidence(weak))

    @torch.no_grad()
    def predict(
        self,
        x: Tensor,
        edge_index: Tensor,
        *,
        mode: str | None = None,
        threshold: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Prediction:
        """Predicts all nodes; the strong expert is computed only where needed.

        Args:
            x, edge_index: the graph.
            mode: "mixed": C p + (1 - C) q. "stochastic": p with probability C, else q, so a
                fraction of about C of the nodes skips the strong expert. None: "mixed" for Mowst*,
                "stochastic" for Mowst, as they are trained.
            threshold: for "mixed": nodes with C >= threshold get p alone. The error of a
                probability is then at most 1 - threshold.
            generator: of the draws of "stochastic".

        Runs in `eval()`; the model's mode is restored afterwards.
        """
        mode = mode or ("mixed" if self.config.joint else "stochastic")
        check_choice("Mowst", "mode", mode, ("mixed", "stochastic"))
        before = self.training
        self.eval()
        try:
            weak = self.weak(x)
            confidence = self.confidence(weak)
            if mode == "mixed":
                needed = confidence < threshold
            else:
                draw = torch.rand(confidence.shape, generator=generator, dtype=confidence.dtype)
                needed = draw.to(confidence.device) >= confidence
            edges = self.strong.prepare(edge_index, x.shape[0])
            strong = self.strong.at(needed, x, edges)
        finally:
            self.train(before)
        probs = weak.softmax(-1)
        strong = strong.softmax(-1)
        if mode == "mixed":
            share = confidence[needed, None]
            probs[needed] = share * probs[needed] + (1 - share) * strong
        else:
            probs[needed] = strong
        return Prediction(probs, confidence, needed)


def make_confidence(config: MowstConfig) -> nn.Module:
    if config.confidence == "monotone":
        return MonotoneConfidence(config.gate_hidden)
    if config.confidence == "free":
        return FreeConfidence(config.gate_hidden, config.gate_dropout)
    return FixedConfidence(("variance", "entropy").index(config.confidence))


def mowst_loss(output: MowstOutput, labels: Tensor, *, joint: bool) -> Tensor:
    """Returns the loss of a set of nodes, a scalar.

    Mowst: mean of C L(p, y) + (1 - C) L(q, y). Mowst* (joint): mean of L(C p + (1 - C) q, y), which
    is never larger, since L is convex.
    """
    if joint:
        return F.nll_loss(output.log_probs(), labels)
    weak = F.cross_entropy(output.weak_logits, labels, reduction="none")
    strong = F.cross_entropy(output.strong_logits, labels, reduction="none")
    c = output.confidence
    return (c * weak + (1 - c) * strong).mean()
