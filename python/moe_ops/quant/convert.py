"""quantize_experts: float banks of a model out, quantised ones in."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from moe_ops._sharded import has_own_experts
from moe_ops.expert_weights import ExpertWeights, hooks_for
from moe_ops.weight_formats import WeightFormat

from .bank import FoundBank, check_finite, check_weights, find_banks, idle_patterns
from .calibration import CalibrationData, collect_calibration
from .formats import check_divides, door_format, quantize_weight
from .scales import GRID, ScaleChoice, find_x_scale


def quantize_experts(
    model: nn.Module,
    format: str = "int4",
    *,
    group_size: int | None = None,
    calibration: CalibrationData | Iterable[Any] | Callable[[nn.Module], Any] | None = None,
    grid: int = GRID,
    skip: Sequence[str] = (),
    progress: Callable[[str, int, int], None] | None = None,
) -> nn.Module:
    """Replaces every bank of float experts in `model` by a quantised one, in place.

    Known are `moe_ops.layers.Experts` (alone, in a `MoE`, anywhere in a model) and the MoE blocks
    of transformers that :mod:`moe_ops.hf` supports, switched to moe_ops or not. Routers, shared
    experts, attention and biases stay as they are. Banks are replaced one after another, and the
    float weights of one go before the next is begun, unless something else holds them.

    The quantised weights do not change any more; x and routing weights have gradients through them.

    Of a bank that `moe_ops.parallel.shard_experts` has sharded, each process quantises the experts
    that it has.

    Args:
        model: a model, a layer, or a bank.
        format: "int8" (one scale an output feature) or "int4" (one scale a group of inputs).
        group_size: of int4: 32, 64 or 128; must divide H and I. None is 64.
        calibration: inputs for the activation-aware scale of w_gate_up's input channels: what
            `moe_ops.quant.collect_calibration` returned, or what it takes. None uses no such scale.
        grid: number of exponents tried for that scale, less one.
        skip: shell patterns of the names of banks that stay float; one that matches none is warned
            of.
        progress: called with the name of each bank, how many were done before it, and how many
            there are.

    Returns:
        `model`; where `model` is itself an `Experts`, a new `QuantizedExperts`.

    Raises:
        ValueError: no float bank, an unknown format, sizes that the groups do not divide, an
            activation that moe_ffn does not know, weights that are sharded over processes, on
            another device than the CPU and CUDA or on none, of a type that moe_ffn does not take,
            or not finite. The model is unchanged, unless only its numbers were at fault: then banks
            before that one are done.
        ImportError: a model of a transformers that is too old for moe_ops.hf.
    """
    how = door_format("quantize_experts", format, group_size)
    patterns = (skip,) if isinstance(skip, str) else tuple(skip)
    known = hooks_for(model)
    for hook in known:
        hook.check_root(model)
    for pattern in idle_patterns(model, patterns):
        warnings.warn(
            f"quantize_experts: skip must match the name of a bank, got {pattern!r}, which matches "
            "none.",
            stacklevel=2,
        )
    names = []
    for found in find_banks(model, patterns):
        names.append(found.name)
        sharding, bank = _own_experts(found)
        if sharding is not None and calibration is not None:
            raise ValueError(
                f"quantize_experts: calibration must be None where experts are shared out over "
                f"processes, got one for {found.name or 'the bank'}; quantise the whole model."
            )
        check_weights("quantize_experts", found.name, found.module, bank)
        check_sizes(found.name, bank, how)
        del found, bank
    if not names:
        raise ValueError(
            f"quantize_experts: model must hold a bank of float experts, got "
            f"{type(model).__name__} without one."
        )
    baseline = None
    if isinstance(calibration, CalibrationData):
        baseline = calibration
    elif calibration is not None:
        baseline = collect_calibration(model, calibration, outputs=False)
    if baseline is not None and (missing := [n for n in names if n not in baseline.banks]):
        raise ValueError(
            f"quantize_experts: calibration must come from this model, got none for {missing[0]!r}."
        )
    for done, found in enumerate(find_banks(model, patterns)):
        if progress is not None:
            progress(found.name, done, len(names))
        _, bank = _own_experts(found)
        check_finite("quantize_experts", found.name, found.module, bank)
        choice = None
        if baseline is not None:
            record = baseline.banks[found.name]
            choice = find_x_scale(bank, record.inputs, how.label, grid=grid)
        model = replace_bank(model, found, how.label, choice)
        del found, bank
    for hook in known:
        hook.mark_quantized(model, how.label, baseline is not None, patterns)
    return model


def replace_bank(
    model: nn.Module,
    found: FoundBank,
    format: str,
    choice: ScaleChoice | None = None,
) -> nn.Module:
    """Puts the quantised form of one bank where the bank is; returns the model."""
    sharding, bank = _own_experts(found)
    experts = found.hook.new_quantized(
        found.module,
        bank,
        format=format,
        x_scale=choice is not None,
    )
    fill(experts, bank, None if choice is None else choice.x_scale)
    experts.scale_exponent = None if choice is None else choice.exponent
    if sharding is not None:
        sharding.adopt(experts)
    experts.train(found.module.training)
    return found.hook.install(model, found.module, experts)


def _own_experts(found: FoundBank) -> tuple[Any, ExpertWeights]:
    """How `moe_ops.parallel.shard_experts` shared a bank out, and the weights that are here; None
    and all weights of another bank."""
    sharding = getattr(found.module, "sharding", None)
    if sharding is None or not has_own_experts(found.module, found.bank.down):
        return None, found.bank
    return sharding, found.bank.local()


@torch.no_grad()
def fill(experts: Any, bank: ExpertWeights, x_scale: torch.Tensor | None = None) -> None:
    """Rounds the weights of `bank` into the buffers of `experts`, an expert at a time."""
    if x_scale is not None:
        experts.x_scale.copy_(x_scale)
    for e in range(bank.num_experts):
        weight = bank.gate_up_of(e)
        if x_scale is not None:
            weight /= x_scale
        for name, w in (("w_gate_up", weight), ("w_down", bank.down_of(e))):
            q, scale = quantize_weight(w, experts.formats[name].label)
            getattr(experts, name)[e].copy_(q)
            getattr(experts, f"{name}_scale")[e].copy_(scale)
    for name in ("b_gate_up", "b_down"):
        bias = getattr(bank, name)
        if bias is not None:
            getattr(experts, name).copy_(bias)


def check_sizes(name: str, bank: ExpertWeights, how: WeightFormat) -> None:
    for what, size in (("w_gate_up", bank.hidden_size), ("w_down", bank.intermediate_size)):
        where = f"{name}'s {what}" if name else what
        check_divides("quantize_experts", where, size, how)
