"""What a run measures, and what its cells have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moe_ops.bench.contenders import OURS, Contender
from moe_ops.bench.shapes import Bank, Tokens, flops
from moe_ops.bench.timing import Samples, alternate, speedup

MODES = ("forward", "quantized", "training", "scaling", "parts", "memory")
# A contender that would need longer for a call is left out.
TOO_SLOW_S = 60.0
# How long it would need is foretold from the number of tokens before, if that took so long.
STEADY_S = 1.0
# One that needs longer than this is called twice: to be checked, and to be timed.
SLOW_S = 6.0


@dataclass(frozen=True)
class Plan:
    """What to measure. Shapes by name, formats of the weights, numbers of tokens."""

    modes: tuple[str, ...] = MODES
    shapes: tuple[str, ...] = ("a32", "b", "c", "d")
    formats: tuple[str, ...] = ("fp32", "bf16")
    tokens: tuple[int, ...] = (1, 4, 16, 64, 512)
    quantized_shapes: tuple[str, ...] = ("a32", "d")
    training_shapes: tuple[str, ...] = ("a32", "c", "d")
    training_tokens: tuple[int, ...] = (16, 64, 512)
    part_tokens: tuple[int, ...] = (1, 64, 512, 2048)
    memory_shapes: tuple[str, ...] = ("a32",)
    threads: int = 1
    thp: bool = True
    budget_s: float = 5.0
    limit_s: float = 0.5
    only: tuple[str, ...] = ()


@dataclass
class Session:
    """One run: its plan, its contenders, and where progress is told."""

    plan: Plan
    contenders: list[Contender]
    log: Callable[[str], None]

    def chosen(self, weight_format: str) -> list[Contender]:
        return [c for c in self.contenders if weight_format in c.formats]


def relative_error(y: Tensor, truth: Tensor) -> float:
    y, truth = y.detach(), truth.detach()
    return float((y.double() - truth.double()).norm() / truth.double().norm())


def pace_of(samples: Mapping[str, Samples], num_tokens: int) -> dict[str, float]:
    """Seconds a token of those that took long enough to tell."""
    medians = {name: sample.median for name, sample in samples.items()}
    return {name: s / num_tokens for name, s in medians.items() if s > STEADY_S}


def take_turns(
    session: Session, jobs: dict[str, Any], first: Mapping[str, float]
) -> dict[str, Samples]:
    return alternate(jobs, budget_s=session.plan.budget_s, slow_s=SLOW_S, first_s=first)


def make_cell(
    mode: str,
    bank: Bank,
    weight_format: str,
    tokens: Tokens,
    samples: Mapping[str, Samples],
    skipped: Mapping[str, str],
    threads: int,
) -> dict[str, Any]:
    ours = next((name for name in reversed(OURS) if name in samples), None)
    contenders: dict[str, Any] = {}
    for name, sample in samples.items():
        contenders[name] = sample.to_dict()
        if ours is not None and name != ours:
            contenders[name]["ours_faster"] = speedup(samples, ours, name)
    return {
        "mode": mode,
        "shape": bank.shape.name,
        "weights": weight_format,
        "T": tokens.count,
        "threads": threads,
        "experts_used": tokens.experts_used,
        "flops": flops(bank.shape, tokens.count, training=mode == "training"),
        # A step reads the weights twice and writes gradients of their size once.
        "bytes": tokens.weight_bytes(bank.shape, weight_format) * (3 if mode == "training" else 1),
        "ours": ours,
        "contenders": contenders,
        "skipped": dict(skipped),
    }


def tell(session: Session, cell: Mapping[str, Any]) -> None:
    contenders = cell["contenders"]
    where = f"{cell['mode']} {cell['shape']} {cell['weights']} T={cell['T']}"
    times = ", ".join(f"{name} {c['ms']:.3g}" for name, c in contenders.items())
    session.log(f"{where}: {times} ms")
    for name, why in cell["skipped"].items():
        session.log(f"  {name}: {why}")


def in_a_sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
