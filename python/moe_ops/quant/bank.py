"""The banks of float experts in a model, and whether the quantizer can read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_ops._sharded import check_whole, name_of
from moe_ops.expert_weights import ExpertsHook, ExpertWeights, hooks_for

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class FoundBank(NamedTuple):
    name: str
    module: nn.Module
    hook: ExpertsHook
    bank: ExpertWeights


def find_banks(
    root: nn.Module,
    skip: tuple[str, ...] = (),
    *,
    unsupported: str = "raise",
    op: str = "quantize",
) -> Iterator[FoundBank]:
    """The float banks of a model, one at a time: whoever drops the last one may free it.

    Args:
        skip: shell patterns of the names of modules to pass over.
        unsupported: "raise" or "skip", what to do about a bank whose experts moe_ffn cannot run.
        op: who asks, for errors.

    Raises:
        ValueError: such a bank.
    """
    known = hooks_for(root)
    for name in [n for n, _ in root.named_modules()]:
        try:
            module = root.get_submodule(name)
        except AttributeError:  # Was inside a bank that has been replaced.
            continue
        if any(fnmatchcase(name, pattern) for pattern in skip):
            continue
        for hook in known:
            try:
                bank = hook.weights(module)
            except ValueError as error:
                if unsupported == "skip":
                    break
                raise ValueError(f"{op}: {name or 'the model'} {error}") from None
            if bank is not None:
                yield FoundBank(name, module, hook, bank)
                break
        del module
        bank = None


def idle_patterns(root: nn.Module, skip: tuple[str, ...]) -> list[str]:
    """The patterns of `skip` that no bank's name matches."""
    known, idle = hooks_for(root), set(skip)
    for name, module in root.named_modules() if idle else ():
        here = {pattern for pattern in idle if fnmatchcase(name, pattern)}
        if here and _holds_bank(known, module):
            idle -= here
    return [pattern for pattern in skip if pattern in idle]


def _holds_bank(known: Sequence[ExpertsHook], module: nn.Module) -> bool:
    try:
        return any(hook.weights(module) is not None for hook in known)
    except ValueError:  # One that has no quantized form.
        return True


def check_weights(op: str, name: str, module: nn.Module, bank: ExpertWeights) -> None:
    """Raises ValueError, with the name of the weight, where a bank is not all here to be read.

    Args:
        op: the function that reads it.
        name: of `module`, which holds the bank.
    """
    check_whole_bank(op, name, module, bank)
    shapes = {"w_gate_up": "[E, 2I, H]", "w_down": "[E, H, I]"}
    for role, w in bank.tensors():
        what = _name_of(role, w, name, module)
        if w.device.type == "meta":
            raise ValueError(
                f"{op}: {what} must hold numbers, got a meta tensor; load all weights into memory "
                "first, without offloading any."
            )
        if w.device.type not in ("cpu", "cuda"):
            raise ValueError(
                f"{op}: {what} must be on the CPU or on CUDA, where quantized experts run, got "
                f"{w.device}; call model.cpu() first."
            )
        if w.dtype not in _FLOATS:
            raise ValueError(
                f"{op}: {what} must be float64, float32, bfloat16 or float16, got "
                f"{str(w.dtype).removeprefix('torch.')}."
            )
        if role in shapes and w.dim() != 3:
            raise ValueError(f"{op}: {what} must be {shapes[role]}, got shape {list(w.shape)}.")


def check_whole_bank(op: str, name: str, module: nn.Module, bank: ExpertWeights) -> None:
    """Raises ValueError where this process has a part of a weight only."""
    for role, w in bank.tensors():
        what = _name_of(role, w, name, module)
        check_whole(op, what, w, f"{op} has to come before the model is sharded")


@torch.no_grad()
def check_finite(op: str, name: str, module: nn.Module, bank: ExpertWeights) -> None:
    """Raises ValueError, with the name of the weight, where a number is infinite or NaN."""
    for role, w in bank.tensors():
        for expert in range(bank.num_experts):
            # Extremes are NaN where a number is, and many times faster to find than isfinite.
            low, high = w[expert].aminmax()
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise ValueError(
                    f"{op}: {_name_of(role, w, name, module)} must be finite, got infinities or "
                    f"NaNs in expert {expert}."
                )


def _name_of(role: str, w: Tensor, name: str, module: nn.Module) -> str:
    return name_of(module, w, name) or f"{name or 'the bank'}'s {role}"
