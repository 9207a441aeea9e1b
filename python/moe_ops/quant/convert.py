"""quantize: float experts and dense layers of a model out, quantized ones in."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from moe_ops._sharded import has_own_experts
from moe_ops.expert_weights import ExpertWeights, hooks_for

from .bank import FoundBank, check_finite, check_weights, find_banks, idle_patterns
from .calibration import CalibrationData, collect_calibration
from .config import WeightConfig, check_config, check_model
from .experts import QuantizedExperts
from .formats import check_divides, quantize_weight
from .linear import find_linears, quantize_linears
from .scales import GRID, ScaleChoice, find_x_scale

MODULES = ("experts", "linears", "all")


def quantize(
    model: nn.Module,
    config: WeightConfig,
    *,
    modules: str = "experts",
    dense: WeightConfig | None = None,
    calibration: CalibrationData | Iterable[Any] | Callable[[nn.Module], Any] | None = None,
    grid: int = GRID,
    skip: Sequence[str] = (),
    progress: Callable[[str, int, int], None] | None = None,
) -> nn.Module:
    """Replaces float experts, dense layers or both by quantized ones, in place.

    Example:
        moe_ops.quantize(model, Int4WeightConfig(group_size=64))
        moe_ops.quantize(model, Int4WeightConfig(), dense=Int8WeightConfig())

    Experts are those of `moe_ops.layers.Experts` (alone, in a `MoE`, anywhere in a model) and of
    the MoE blocks of transformers that :mod:`moe_ops.hf` supports, switched to moe_ops or not;
    routers, biases and everything else stay as they are. They become `QuantizedExperts` one after
    another, and the float weights of one layer go before the next is begun, unless something else
    holds them. Of experts that `moe_ops.parallel.shard_experts` has sharded, each process quantizes
    those that it has.

    Dense layers are the plain nn.Linear, but for those that choose experts, MLA's kv_b_proj and
    very small ones. They become `QuantizedLinear`; those that the groups of the format do not
    divide take the next smaller groups, or stay float.

    Quantized weights do not change any more; what goes into them has gradients.

    Args:
        model: a model, a layer, or `Experts`.
        config: `Int8WeightConfig()`, `Int4WeightConfig(group_size)` or `Fp8WeightConfig()`.
        modules: "experts", "linears", or "all" for both.
        dense: the config of dense layers, which are then quantized too; None is `config`.
        calibration: inputs for the activation-aware scale of w_gate_up's input channels: what
            `moe_ops.quant.collect_calibration` returned, or what it takes. None uses no such scale.
        grid: number of exponents tried for that scale, less one.
        skip: shell patterns of the names of experts and dense layers that stay float; one that
            matches none is warned of.
        progress: called with the name of each layer of experts, how many were done before it, and
            how many there are.

    Returns:
        `model`; where `model` is itself an `Experts`, a new `QuantizedExperts`.

    Raises:
        ValueError: nothing to quantize, another config, sizes that the groups do not divide, an
            activation that moe_ffn does not know, weights that are sharded over processes, on
            another device than the CPU and CUDA or on none, of a type that moe_ffn does not take,
            or not finite. The model is unchanged, unless only its numbers were at fault: then what
            came before is done.
        ImportError: a model of a transformers that is too old for moe_ops.hf.
    """
    check_model("quantize", model)
    check_config("quantize", config)
    if dense is not None:
        check_config("quantize", dense)
        modules = "all" if modules == "experts" else modules
    if modules not in MODULES:
        raise ValueError(f"quantize: modules must be one of {', '.join(MODULES)}, got {modules!r}.")
    patterns = (skip,) if isinstance(skip, str) else tuple(skip)
    linears = find_linears(model) if modules != "experts" else {}
    idle = patterns if modules == "linears" else idle_patterns(model, patterns)
    for pattern in idle:
        if not any(fnmatchcase(name, pattern) for name in linears):
            warnings.warn(
                f"quantize: skip must match the name of a layer, got {pattern!r}, which matches "
                "none.",
                stacklevel=2,
            )
    if modules != "linears":
        needed = modules == "experts" or not linears
        model = _quantize_experts(model, config, calibration, grid, patterns, progress, needed)
    elif not linears:
        raise ValueError(
            f"quantize: model must hold dense layers, got {type(model).__name__} without one."
        )
    elif calibration is not None:
        raise ValueError("quantize: calibration must be None for linears, got one.")
    if linears:
        quantize_linears(model, dense or config, patterns)
    return model


def _quantize_experts(
    model: nn.Module,
    config: WeightConfig,
    calibration: Any,
    grid: int,
    patterns: tuple[str, ...],
    progress: Callable[[str, int, int], None] | None,
    needed: bool,
) -> nn.Module:
    known = hooks_for(model)
    for hook in known:
        hook.check_root(model)
    names = []
    for found in find_banks(model, patterns):
        names.append(found.name)
        sharding, bank = _own_experts(found)
        if sharding is not None and calibration is not None:
            raise ValueError(
                f"quantize: calibration must be None where experts are shared out over processes, "
                f"got one for {found.name or 'the experts'}; quantize the whole model."
            )
        check_weights("quantize", found.name, found.module, bank)
        check_sizes(found.name, bank, config)
        del found, bank
    if not names:
        if not needed:
            return model
        raise ValueError(
            f"quantize: model must hold float experts, got {type(model).__name__} without any."
        )
    baseline = None
    if isinstance(calibration, CalibrationData):
        baseline = calibration
    elif calibration is not None:
        baseline = collect_calibration(model, calibration, outputs=False)
    if baseline is not None and (missing := [n for n in names if n not in baseline.banks]):
        raise ValueError(
            f"quantize: calibration must come from this model, got none for {missing[0]!r}."
        )
    for done, found in enumerate(find_banks(model, patterns)):
        if progress is not None:
            progress(found.name, done, len(names))
        _, bank = _own_experts(found)
        check_finite("quantize", found.name, found.module, bank)
        choice = None
        if baseline is not None:
            record = baseline.banks[found.name]
            choice = find_x_scale(bank, record.inputs, config.label, grid=grid)
        model = replace_bank(model, found, config.label, choice)
        del found, bank
    for hook in known:
        hook.mark_quantized(model, config.label, baseline is not None, patterns)
    return model


def new_experts(
    found: FoundBank, format: str, *, bank: ExpertWeights | None = None, x_scale: bool = False
) -> Any:
    """Returns the layer that can take the place of experts, its buffers not filled.

    Args:
        found: the experts.
        format: the name of the format, or of each weight.
        bank: those of their weights that are here; None is all.
        x_scale: whether it has an activation-aware scale.
    """
    cls = found.hook.quantized_class(found.module) or QuantizedExperts
    weights = found.bank if bank is None else bank
    return cls.for_weights(weights, format=format, x_scale=x_scale)


def replace_bank(
    model: nn.Module,
    found: FoundBank,
    format: str,
    choice: ScaleChoice | None = None,
) -> nn.Module:
    """Puts the quantized form of one bank where the bank is; returns the model."""
    sharding, bank = _own_experts(found)
    experts = new_experts(found, format, bank=bank, x_scale=choice is not None)
    fill(experts, bank, None if choice is None else choice.x_scale)
    experts.scale_exponent = None if choice is None else choice.exponent
    if sharding is not None:
        sharding.adopt(experts)
    experts.train(found.module.training)
    return found.hook.install(model, found.module, experts)


def _own_experts(found: FoundBank) -> tuple[Any, ExpertWeights]:
    """Returns how `moe_ops.parallel.shard_experts` shared a bank out, and the weights that are
    here; None and all weights of another bank."""
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


def check_sizes(name: str, bank: ExpertWeights, config: WeightConfig) -> None:
    for what, size in (("w_gate_up", bank.hidden_size), ("w_down", bank.intermediate_size)):
        where = f"{name}'s {what}" if name else what
        check_divides("quantize", where, size, config.format)
