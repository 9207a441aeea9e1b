"""Training of Mowst (in turns) and Mowst* (jointly), with warm-ups and early stopping."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.studies.mowst.graphs import Graph
from moe_ops._fields import check_choice
from moe_ops.zoo.mowst.graphs import Edges
from moe_ops.zoo.mowst.model import Mowst, MowstOutput, mowst_loss

from ..progress import bar
from ..trainer import take_steps

WARM_UPS = ("none", "weak", "strong", "both")


@dataclass
class MowstHistory:
    """Best validation loss of each stage, and epochs it ran, in order."""

    stages: list[str] = field(default_factory=list)
    valid_loss: list[float] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)

    def add(self, stage: str, valid_loss: float, epochs: int) -> None:
        self.stages.append(stage)
        self.valid_loss.append(valid_loss)
        self.epochs.append(epochs)


def fit(
    model: Mowst,
    graph: Graph,
    *,
    warm_up: str = "none",
    epochs: int = 300,
    patience: int = 50,
    rounds: int = 20,
    round_patience: int = 3,
    lr: float = 1e-2,
    gate_lr: float | None = None,
    weight_decay: float = 5e-4,
    progress: bool = True,
) -> MowstHistory:
    """Trains on the whole graph at once, AdamW; every stage ends with its best weights.

    Best is the lowest loss of the validation nodes, in `eval()`.

    Mowst*: all parameters on the joint loss. Mowst: in turns, first the weak expert and the gate
    with the strong expert fixed, then the strong expert with those fixed, until `round_patience`
    rounds in a row did not lower the validation loss. Fixed parts are in `eval()`, computed once a
    turn, and do not change.

    Args:
        warm_up: experts trained alone first: "none", "weak", "strong" or "both".
        epochs, patience: of a stage: at most so many, and how many without a better loss end it.
        rounds, round_patience: of Mowst's turns.
        lr: of experts; gate_lr: of the gate, None: `lr`.
        weight_decay: of everything but the gate.
        progress: show a bar of epochs.

    Raises:
        ValueError: an unknown warm-up, no training or validation node, a loss that is not finite.
    """
    check_choice("fit", "warm_up", warm_up, WARM_UPS)
    for name in ("train", "valid"):
        if not bool(getattr(graph, name).any()):
            raise ValueError(f"fit: graph must have {name} nodes, got none.")
    edges = model.strong.prepare(graph.edge_index, graph.x.shape[0])
    history = MowstHistory()
    before = model.training
    settings: dict[str, Any] = {"epochs": epochs, "patience": patience, "progress": progress}

    def optimizer(*parts: nn.Module) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = []
        for part in parts:
            gate = part is model.gate
            parameters = list(part.parameters())
            if parameters:
                groups.append(
                    {
                        "params": parameters,
                        "lr": (gate_lr or lr) if gate else lr,
                        "weight_decay": 0.0 if gate else weight_decay,
                    }
                )
        return torch.optim.AdamW(groups)

    def alone(name: str, expert: nn.Module, logits: Callable[[], Tensor]) -> None:
        def loss(nodes: Tensor) -> Tensor:
            return F.cross_entropy(logits()[nodes], graph.y[nodes])

        stage(f"warm-up {name}", [expert], loss)

    def stage(name: str, parts: list[nn.Module], loss: Callable[[Tensor], Tensor]) -> float:
        model.eval()
        best, ran = _train(name, parts, optimizer(*parts), loss, graph, **settings)
        history.add(name, best, ran)
        return best

    if warm_up in ("weak", "both"):
        alone("weak", model.weak, lambda: model.weak(graph.x))
    if warm_up in ("strong", "both"):
        alone("strong", model.strong, lambda: model.strong(graph.x, edges))

    if model.config.joint:

        def joint_loss(nodes: Tensor) -> Tensor:
            return _loss_at(model(graph.x, edges), graph.y, nodes, joint=True)

        stage("joint", [model.weak, model.strong, model.gate], joint_loss)
    else:
        _in_turns(model, graph, edges, stage, rounds, round_patience)
    model.train(before)
    return history


def _in_turns(
    model: Mowst,
    graph: Graph,
    edges: Edges,
    stage: Callable[..., float],
    rounds: int,
    round_patience: int,
) -> None:
    best, best_state, since = math.inf, copy.deepcopy(model.state_dict()), 0
    for round_number in range(rounds):
        model.eval()
        with torch.no_grad():
            strong = model.strong(graph.x, edges)

        def weak_turn(nodes: Tensor, strong: Tensor = strong) -> Tensor:
            weak = model.weak(graph.x)
            output = MowstOutput(weak, strong, model.confidence(weak))
            return _loss_at(output, graph.y, nodes, joint=False)

        stage(f"round {round_number} weak", [model.weak, model.gate], weak_turn)
        model.eval()
        with torch.no_grad():
            weak = model.weak(graph.x)
            confidence = model.confidence(weak)

        def strong_turn(
            nodes: Tensor, weak: Tensor = weak, confidence: Tensor = confidence
        ) -> Tensor:
            output = MowstOutput(weak, model.strong(graph.x, edges), confidence)
            return _loss_at(output, graph.y, nodes, joint=False)

        value = stage(f"round {round_number} strong", [model.strong], strong_turn)
        if value < best:
            best, best_state, since = value, copy.deepcopy(model.state_dict()), 0
        else:
            since += 1
            if since >= round_patience:
                break
    model.load_state_dict(best_state)


def _loss_at(output: MowstOutput, labels: Tensor, nodes: Tensor, *, joint: bool) -> Tensor:
    return mowst_loss(MowstOutput(*(t[nodes] for t in output)), labels[nodes], joint=joint)


def _train(
    name: str,
    parts: list[nn.Module],
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Tensor], Tensor],
    graph: Graph,
    *,
    epochs: int,
    patience: int,
    progress: bool,
) -> tuple[float, int]:
    """Trains `parts` on loss(train nodes); leaves them in eval() with their best state.

    The state before the first epoch counts too, so a stage never makes validation worse.
    """

    def valid_loss() -> float:
        for part in parts:
            part.eval()
        with torch.no_grad():
            value = float(loss(graph.valid))
        if not math.isfinite(value):
            raise ValueError(f"fit: the validation loss of {name} must be finite, got {value}.")
        return value

    def state() -> list[dict[str, Any]]:
        return [copy.deepcopy(part.state_dict()) for part in parts]

    best, best_state, since, ran = valid_loss(), state(), 0, 0

    def of_step(step: int) -> dict[str, Tensor]:
        for part in parts:
            part.train()
        return {"loss": loss(graph.train)}

    with bar(epochs, name, progress) as shown:

        def after(step: int, _: Mapping[str, Tensor]) -> bool:
            nonlocal best, best_state, since, ran
            value = valid_loss()
            ran += 1
            shown.update()
            shown.set_postfix(valid=f"{value:.4f}")
            if value < best:
                best, best_state, since = value, state(), 0
            else:
                since += 1
            return since >= patience

        take_steps(optimizer, of_step, range(epochs), after=after)
    for part, saved in zip(parts, best_state, strict=True):
        part.load_state_dict(saved)
        part.eval()
    return best, ran
