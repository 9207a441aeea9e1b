"""Training that can be stopped and gone on with: checkpoints of the zoo's loops, and a loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from moe_ops import _files, _reading
from moe_ops._state import load_weights as load_weights
from moe_ops._state import read_state as read_state
from moe_ops._state import write_state as write_state

from .progress import bar

Model = TypeVar("Model", bound=nn.Module)
_WRONG_STATE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass
class Checkpoint:
    """All that a training run needs to go on; without a path it does nothing.

    history: a dataclass of lists or dicts.
    """

    path: str | Path | None
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    generator: torch.Generator
    history: Any

    def save(self, step: int) -> None:
        if self.path is None:
            return
        state: dict[str, Any] = {
            "step": step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "noise": torch.get_rng_state(),
            "cuda_noise": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "history": asdict(self.history),
        }
        path = Path(self.path)
        _files.make_folder(path.parent)
        write_state(path, state)

    def load(self) -> int:
        """Puts back what was saved; the number of steps done, 0 where there is no file."""
        if self.path is None:
            return 0
        try:
            state = read_state(self.path)
        except FileNotFoundError:
            return 0
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.generator.set_state(state["generator"])
            torch.set_rng_state(state["noise"])
            if state["cuda_noise"] and torch.cuda.is_available():
                torch.cuda.set_rng_state_all(state["cuda_noise"])
            for name in vars(self.history):
                setattr(self.history, name, state["history"][name])
            return int(state["step"])
        except _WRONG_STATE as error:
            raise ValueError(
                f"fit: checkpoint must be of a run with these arguments, got {self.path}: "
                f"{_reading.reason(error)}"
            ) from error


def _read_weights(model: Model, file: Path) -> Model:
    load_weights(model, file)
    return model


def _write_weights(model: nn.Module, file: Path) -> None:
    write_state(file, model.state_dict())


def train_once(
    model: Model,
    folder: Path,
    name: str,
    fit: Callable[[Path], Any],
    *,
    kept: str = "{name}.pt",
    read: Callable[[Model, Path], Model] = _read_weights,
    write: Callable[[Model, Path], Any] = _write_weights,
) -> Model:
    """The model that `folder` keeps; where it keeps none, this one, after `fit` has trained it.

    Args:
        fit: is told the file of its checkpoint, from which it goes on where it was cut.
        kept: the file in `folder` that is there when the model is.
        read: the model, or one like it, from that file. write: the other way round.
    """
    done, checkpoint = folder / kept.format(name=name), folder / f"{name}.training.pt"
    if done.exists():  # Something that is no file is refused by `read`, before anything trains.
        return read(model, done)
    fit(checkpoint)
    write(model, done)
    checkpoint.unlink()
    return model


def warm_up_then_cosine(step: int, warm_up: int, steps: int) -> float:
    """The rate's factor at a step: up to 1 in a line, then down to 0."""
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(steps - warm_up, 1)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


@dataclass
class Losses:
    """Values by step, under the names that a loss gives them."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, parts: dict[str, Tensor]) -> None:
        for name, part in parts.items():
            self.values.setdefault(name, []).append(float(part))


@dataclass(frozen=True)
class Group:
    """Parameters that train alike: a rate, steps of warm-up, and weight decay."""

    parameters: Sequence[nn.Parameter]
    rate: float
    warm_up: int = 0
    weight_decay: float = 0.0


class Lesson(NamedTuple):
    """The input of a training: groups of a model's parameters, and the loss of `train_steps`."""

    groups: Sequence[Group]
    loss: Callable[[int, torch.Generator], dict[str, Tensor]]


def take_steps(
    optimizer: torch.optim.Optimizer,
    loss: Callable[[int], Mapping[str, Tensor]],
    steps: Iterable[int],
    *,
    rate: Callable[[int], float] | None = None,
    clip: tuple[Sequence[nn.Parameter], float] | None = None,
    after: Callable[[int, Mapping[str, Tensor]], object] | None = None,
) -> None:
    """The loop of every training: a loss, its gradients, a step of the optimizer.

    Args:
        loss: from the number of the step to named scalars, of which "loss" is minimized.
        rate: of a step, for all parameters; None: as the optimizer has it.
        clip: parameters, and the most that the norm of their gradients may be.
        after: called with the number of a step that is done and its scalars; training ends where
            it returns True.

    Raises:
        ValueError: a loss that is not finite.
    """
    for step in steps:
        if rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
        parts = loss(step)
        if not bool(parts["loss"].isfinite()):
            raise ValueError(f"fit: the loss must be finite, got {float(parts['loss'])}.")
        optimizer.zero_grad(set_to_none=True)
        parts["loss"].backward()  # type: ignore[no-untyped-call]
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(*clip)
        optimizer.step()
        if after is not None and after(step, parts) is True:
            return


def train_steps(
    what: str,
    model: nn.Module,
    groups: Sequence[Group],
    loss: Callable[[int, torch.Generator], dict[str, Tensor]],
    *,
    steps: int,
    seed: int = 0,
    grad_clip: float = 1.0,
    checkpoint: str | Path | None = None,
    every: int = 100,
    watch: Callable[[int], None] | None = None,
    after: Callable[[], None] | None = None,
    progress: bool = True,
) -> dict[str, list[float]]:
    """AdamW on `loss`: warm-up, then a cosine to 0.

    Args:
        what: name of the run, for its bar.
        groups: all that is trained; groups without parameters are left out.
        loss: from the number of the step, from 1 on, and the generator of the batches to named
            scalars, of which "loss" is minimized.
        checkpoint: a file that is written every `every` steps and at the end. Where it is there
            already, training goes on from it, with the numbers of a run that was not cut; the other
            arguments must be those of that run.
        watch: called with the number of steps before each of these writes.
        after: called after each step, before these.

    Returns:
        The scalars by step.

    Raises:
        ValueError: a loss that is not finite, or a checkpoint of another run.
    """
    groups = [group for group in groups if group.parameters]
    parameters = [p for group in groups for p in group.parameters]
    optimizer = torch.optim.AdamW(
        [
            {"params": list(g.parameters), "lr": g.rate, "weight_decay": g.weight_decay}
            for g in groups
        ]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, [partial(warm_up_then_cosine, warm_up=g.warm_up, steps=steps) for g in groups]
    )
    generator = torch.Generator().manual_seed(seed)
    history = Losses()
    kept = Checkpoint(checkpoint, model, optimizer, schedule, generator, history)
    first = kept.load()
    before = model.training
    model.train()
    with bar(steps, what, progress) as shown:
        shown.update(first)

        def done(step: int, parts: Mapping[str, Tensor]) -> None:
            schedule.step()
            if after is not None:
                after()
            history.add({name: part.detach() for name, part in parts.items()})
            shown.update()
            shown.set_postfix(loss=f"{float(parts['loss'].detach()):.4f}")
            if step == steps or step % every == 0:
                if watch is not None:
                    watch(step)
                    model.train()
                kept.save(step)

        take_steps(
            optimizer,
            lambda step: loss(step, generator),
            range(first + 1, steps + 1),
            clip=(parameters, grad_clip),
            after=done,
        )
    model.train(before)
    return history.values
