"""Performance targets of moe_ops on CPUs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from bench.harness.targets import Verdict, judge

HF = "HF grouped_mm"
Cell = Mapping[str, Any]


@dataclass(frozen=True)
class _Group:
    mode: str
    label: str
    chosen: Callable[[Cell], bool]


def _cells(weights: str, low: int, high: int) -> Callable[[Cell], bool]:
    return lambda c: c["weights"] == weights and low <= c["T"] <= high


_FP32_FEW = _Group("forward", "fp32 forward, T 1 to 4", _cells("fp32", 1, 4))
_FP32_SOME = _Group("forward", "fp32 forward, T 16 to 64", _cells("fp32", 16, 64))
_FP32_MANY = _Group("forward", "fp32 forward, T 512 and more", _cells("fp32", 512, 1 << 30))
_BF16_FEW = _Group("forward", "bf16 forward, T 1 to 4", _cells("bf16", 1, 4))
_BF16_SOME = _Group("forward", "bf16 forward, T 16 to 64", _cells("bf16", 16, 64))
_BF16_MANY = _Group("forward", "bf16 forward, T 512 and more", _cells("bf16", 512, 1 << 30))


def _training(weights: str, low: int, high: int, thp: bool) -> Callable[[Cell], bool]:
    inner = _cells(weights, low, high)
    return lambda c: inner(c) and bool(c.get("thp")) == thp


_TRAIN_SOME = _Group("training", "fp32 training, T 16 to 64", _training("fp32", 16, 64, False))
_TRAIN_MANY = _Group("training", "fp32 training, T 512", _training("fp32", 512, 1 << 30, False))
_THP_SOME = _Group(
    "training", "fp32 training with THP, T 16 to 64", _training("fp32", 16, 64, True)
)
_THP_MANY = _Group(
    "training", "fp32 training with THP, T 512", _training("fp32", 512, 1 << 30, True)
)
_BF16_TRAIN = _Group("training", "bf16 training", _training("bf16", 0, 1 << 30, False))
_INT8_ONE = _Group("quantized", "int8 forward, T 1", _cells("int8", 1, 1))
_INT4_ONE = _Group("quantized", "int4 forward, T 1", _cells("int4", 1, 1))
_INT_MANY = _Group("quantized", "int8, int4 forward, T 64 and more", lambda c: bool(c["T"] >= 64))

# Group, metric, minimum.
_TARGETS: tuple[tuple[_Group, str, float], ...] = (
    (_FP32_FEW, "best peer", 1.0),
    (_FP32_FEW, HF, 1.4),
    (_FP32_FEW, "limit", 0.90),
    (_FP32_SOME, "best peer", 1.2),
    (_FP32_SOME, HF, 2.0),
    (_FP32_SOME, "limit", 0.60),
    (_FP32_MANY, "best peer", 1.05),
    (_FP32_MANY, HF, 1.3),
    (_FP32_MANY, "limit", 0.82),
    (_BF16_FEW, "best peer", 1.4),
    (_BF16_FEW, HF, 2.5),
    (_BF16_FEW, "limit", 0.90),
    (_BF16_SOME, "best peer", 1.5),
    (_BF16_SOME, HF, 4.0),
    (_BF16_SOME, "limit", 0.55),
    (_BF16_MANY, "best peer", 1.3),
    (_BF16_MANY, HF, 8.0),
    (_BF16_MANY, "limit", 0.75),
    (_TRAIN_SOME, HF, 3.0),
    (_TRAIN_SOME, "limit", 0.45),
    (_TRAIN_MANY, HF, 1.45),
    (_TRAIN_MANY, "limit", 0.70),
    (_THP_SOME, HF, 1.8),
    (_THP_MANY, HF, 1.3),
    (_BF16_TRAIN, HF, 25.0),
    (_INT8_ONE, "best ggml", 1.5),
    (_INT4_ONE, "best ggml", 1.6),
    (_INT8_ONE, "limit", 0.75),
    (_INT4_ONE, "limit", 0.75),
    (_INT_MANY, "bf16 moe_ops", 1.0),
)


def verdicts(result: Mapping[str, Any]) -> list[Verdict]:
    """Returns a verdict for every target, in the order of the list above."""
    found = [_of_group(result, *target) for target in _TARGETS]
    found += _of_parts(result.get("parts", ()))
    found.append(_of_scaling(result.get("scaling", ())))
    found.append(_of_memory(result.get("memory", ())))
    found += [_of_errors(result, "fp32", 2e-6), _of_errors(result, "bf16", 2.5e-3)]
    return found


def metric(cell: Cell, what: str) -> float | None:
    """Returns our smallest speed-up over the baselines in `what`, or the fraction of the hardware
    limit reached."""
    found, ours = cell["contenders"], cell["ours"]
    if ours is None:
        return None
    if what == "limit":
        return float(found[ours]["of_limit"])
    if what == "best peer":
        names = [n for n in found if not n.startswith("moe_ops") and n != "bf16 moe_ops"]
    elif what == "best ggml":
        names = [n for n in found if n.startswith("ggml")]
    else:
        names = [what]
    ratios = [found[n]["ours_faster"] for n in names if "ours_faster" in found.get(n, {})]
    return min(ratios) if ratios else None


def _of_group(result: Mapping[str, Any], group: _Group, what: str, least: float) -> Verdict:
    values: list[tuple[float, str]] = []
    at_limit: dict[str, float] = {}
    for cell in result.get(group.mode, ()):
        if group.chosen(cell) and (value := metric(cell, what)) is not None:
            where = f"{cell['shape']} {cell['weights']} T={cell['T']}"
            values.append((value, where))
            share = metric(cell, "limit") or 0.0
            at_limit[where] = value / share if 0.0 < share <= 1.0 else math.inf
    show: Callable[[float], str] = "{:.0%}".format if what == "limit" else "{:.2f}x".format
    must = f"{show(least)} of the limit" if what == "limit" else f"{show(least)} {what}"
    verdict = judge(group.label, must, values, least, show)
    # Both values of an integer-versus-bfloat16 target are ours: there is no fixed time to beat.
    if what in ("limit", "bf16 moe_ops") or verdict.worst is None:
        return verdict
    short = [at_limit[where] for value, where in values if value < least]
    worst = at_limit[verdict.where]
    return replace(
        verdict,
        at_limit=show(worst) if math.isfinite(worst) else None,
        out_of_reach=bool(short) and max(short) < least,
    )


def _of_parts(cells: Iterable[Cell]) -> list[Verdict]:
    """Returns verdicts against the fastest torch form."""
    cells = list(cells)
    found = []
    for part, least in (("router", 2.0), ("sort", 10.0), ("combine", 10.0)):
        values = [(min(c["speedup"].values()), f"T={c['T']}") for c in cells if c["part"] == part]
        found.append(judge(part, f"{least:.0f}x torch", values, least, "{:.2f}x".format))
    return found


def _of_scaling(cells: Iterable[Cell]) -> Verdict:
    values = [
        (c["speedup"], f"{c['mode']} {c['weights']} T={c['T']}") for c in cells if c["T"] >= 512
    ]
    return judge("two threads, T 512", "1.70x one thread", values, 1.7, "{:.2f}x".format)


def _of_memory(cells: Iterable[Cell]) -> Verdict:
    values = [
        (c["mib"]["moe_ops"] / c["mib"][HF], f"{c['shape']} {c['weights']} T={c['T']}")
        for c in cells
        if "moe_ops" in c["mib"] and c["mib"].get(HF, 0) > 0
    ]
    must = "at most 0.60x HF grouped_mm"
    return judge("memory of a training step", must, values, 0.6, "{:.2f}x".format, most=True)


def _of_errors(result: Mapping[str, Any], weights: str, bound: float) -> Verdict:
    values = []
    for cell in result.get("forward", ()):
        ours = cell["contenders"].get(cell["ours"] or "", {})
        if cell["weights"] == weights and "error" in ours:
            values.append((ours["error"], f"{cell['shape']} T={cell['T']}"))
    must = f"at most {bound:.1e}"
    return judge(f"{weights} error", must, values, bound, "{:.1e}".format, most=True)
