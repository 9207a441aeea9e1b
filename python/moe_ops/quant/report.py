"""Measures how much a quantized model differs from the float one, in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from moe_ops.expert_weights import is_quantized

from .calibration import CalibrationData, perplexity


@dataclass(frozen=True)
class BankQuality:
    """One bank.

    error: |y - y_float| / |y_float| of its output, Frobenius norms, over `num_tokens` tokens.
    exponent: of the activation-aware scale, None without one.
    """

    name: str
    format: str
    error: float
    num_tokens: int
    bytes_before: int
    bytes_after: int
    exponent: float | None = None


@dataclass(frozen=True)
class QuantizationReport:
    """Result of :func:`compare_quality`."""

    banks: list[BankQuality]
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    num_tokens: int = 0

    @property
    def bytes_before(self) -> int:
        return sum(b.bytes_before for b in self.banks)

    @property
    def bytes_after(self) -> int:
        return sum(b.bytes_after for b in self.banks)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bytes_before": self.bytes_before, "bytes_after": self.bytes_after}

    def table(self) -> str:
        """Lines for people: a bank each, then the sums."""
        width = max(len("bank"), *(len(b.name) for b in self.banks))
        lines = [f"{'bank':{width}}  {'format':>12}  {'error':>8}  {'MiB':>16}  exponent"]
        for b in self.banks:
            size = f"{b.bytes_before / 2**20:.1f} -> {b.bytes_after / 2**20:.1f}"
            exponent = "-" if b.exponent is None else f"{b.exponent:.2g}"
            lines.append(
                f"{b.name:{width}}  {b.format:>12}  {b.error:8.5f}  {size:>16}  {exponent:>8}"
            )
        share = self.bytes_after / self.bytes_before
        lines.append(
            f"experts: {self.bytes_before / 2**20:.1f} MiB -> {self.bytes_after / 2**20:.1f} MiB "
            f"({share:.1%})"
        )
        if self.perplexity_before is not None and self.perplexity_after is not None:
            change = self.perplexity_after / self.perplexity_before - 1
            lines.append(
                f"perplexity: {self.perplexity_before:.4f} -> {self.perplexity_after:.4f} "
                f"({change:+.2%}) over {self.num_tokens} tokens"
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


@torch.no_grad()
def compare_quality(model: nn.Module, baseline: CalibrationData) -> QuantizationReport:
    """Compares a quantized model with what was recorded of it before.

    A bank is judged alone: it gets the inputs that the float bank had. Inputs that served for
    choosing scales flatter the result; record others for the report.

    Args:
        model: the quantized model.
        baseline: `collect_calibration` of the model before, with outputs.

    Raises:
        ValueError: a baseline without outputs, or of another model.
    """
    banks = []
    for name, record in baseline.banks.items():
        if record.y is None:
            raise ValueError("compare_quality: baseline must have outputs, got one without.")
        experts = quantized_experts_of(model, name)
        if experts is None:  # Skipped.
            continue
        y = experts.run(*record.inputs).float()
        error = float((y - record.y).double().norm() / record.y.double().norm().clamp(min=1e-300))
        banks.append(
            BankQuality(
                name=name or "experts",
                format=experts.format_name,
                error=error,
                num_tokens=y.shape[0],
                bytes_before=record.num_bytes,
                bytes_after=experts.num_bytes,
                exponent=experts.scale_exponent,
            )
        )
    if not banks:
        raise ValueError(
            f"compare_quality: model must hold quantized experts, got {type(model).__name__} "
            "without any."
        )
    after, count = None, 0
    if baseline.tokens is not None:
        count = baseline.tokens.numel()
        after = perplexity(
            model, baseline.tokens, context=baseline.context, forward=baseline.forward
        )
    return QuantizationReport(banks, baseline.perplexity, after, count)


def quantized_experts_of(model: nn.Module, name: str) -> Any:
    """The quantized bank that took the place of the float one called `name`, or None."""
    try:
        module: Any = model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"compare_quality: baseline must be of this model, got a bank {name!r}."
        ) from None
    if not is_quantized(module):  # A block that keeps its bank as a part.
        module = getattr(module, "experts", None)
    return module if is_quantized(module) else None
