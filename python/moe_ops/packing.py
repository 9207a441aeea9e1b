"""Packed copies of expert weights for inference, as users make and drop them.

:mod:`moe_ops.expert_weights.packing` says when a copy is used and when it goes.
"""

from __future__ import annotations

import warnings

from torch import nn

from moe_ops.expert_weights import is_quantized
from moe_ops.expert_weights.packing import (
    apply_settings,
    budget,
    check_can_pack,
    current_settings,
    invalidate,
    pack_now,
    packable_weights,
    states,
)
from moe_ops.expert_weights.policy import POLICIES, Settings
from moe_ops.memory import available_memory

__all__ = [
    "available_memory",
    "pack_weights",
    "packed_weight_bytes",
    "packing_settings",
    "set_packing_policy",
    "unpack_weights",
]


class set_packing_policy:
    """Sets when banks of experts pack their weights by themselves, for the whole process.

    A bank can pack itself in `eval()`, in calls that want no gradient, on the CPU. Banks that were
    packed by `pack_weights` keep their copies under every policy.

    Args:
        policy: "auto", a bank whose weights take 1 MiB or more packs itself once they have served
            so many rows unchanged that it would have paid by then (1024 an expert; of one call at
            most 16 an expert count), if the copy fits into the budget: 32 MiB per call, one bank at
            a time. Never while `torch.use_deterministic_algorithms` is on, since results change by
            rounding at the call that ends it. "off", none does, and copies that banks made by
            themselves go. "always", each does at its first such call, without a budget unless
            `max_bytes` is given. None leaves the policy as it is.
        max_bytes: budget of all copies together; None is a quarter of the memory that would be
            available without them, at the moment of packing.

    As a context manager it puts the old settings back at the end. At the start they come from
    ``MOE_OPS_PACKING`` (a policy, "auto" if not set) and ``MOE_OPS_PACKING_MB`` (a budget in MiB).

    Raises:
        ValueError: an unknown policy or a negative budget.
    """

    def __init__(self, policy: str | None = None, *, max_bytes: int | None = None) -> None:
        before = current_settings()
        policy = before.policy if policy is None else policy
        if policy not in POLICIES:
            raise ValueError(
                f"set_packing_policy: policy must be one of {', '.join(POLICIES)}, got {policy!r}."
            )
        if max_bytes is not None and max_bytes < 0:
            raise ValueError(f"set_packing_policy: max_bytes must be at least 0, got {max_bytes}.")
        self._before = before
        apply_settings(Settings(policy, max_bytes))

    def __enter__(self) -> set_packing_policy:
        return self

    def __exit__(self, *_: object) -> None:
        apply_settings(self._before)


def pack_weights(model: nn.Module) -> int:
    """Packs the expert weights of `model` now, whatever the policy and the budget.

    The copies take about the memory of the weights once more. They are used in calls that want no
    gradient, and go when the weights change, at `train()`, or with :func:`unpack_weights`.

    Args:
        model: a module that holds `moe_ops.layers.Experts`, or blocks of transformers that run on
            moe_ops.

    Banks with quantized experts are skipped with a warning: their kernels read the weights as they
    lie. So do all CUDA kernels: banks on CUDA are passed over. A model that moves there leaves its
    copies behind.

    Returns:
        Bytes of the copies of `model`; 0 on CUDA.

    Raises:
        ValueError: no such bank, or weights that cannot be packed: on another device, of a tensor
            subclass (sharded ones are), or made in inference mode (such tensors do not count their
            versions).
    """
    found = ((name, m, packable_weights(m)) for name, m in model.named_modules())
    banks = [(name, m, weights) for name, m, weights in found if weights is not None]
    quantized = sum(map(is_quantized, model.modules()))
    if quantized:
        warnings.warn(
            f"pack_weights: skipped {quantized} bank{'s' if quantized > 1 else ''} of quantised "
            "experts, which need no packed copy.",
            stacklevel=2,
        )
    elif not banks:
        raise ValueError(
            f"pack_weights: model must hold a bank of experts that runs on moe_ops, got "
            f"{type(model).__name__} without one."
        )
    on_cuda = {m for _, m, w in banks if w.w_gate_up.is_cuda and w.w_down.is_cuda}
    for module in on_cuda:
        invalidate(module)  # Copies of the weights before they moved.
    banks = [found for found in banks if found[1] not in on_cuda]
    for name, module, weights in banks:
        check_can_pack(name, module, weights)
    for _, module, weights in banks:
        pack_now(module, weights)
    return packed_weight_bytes(model)


def unpack_weights(model: nn.Module) -> int:
    """Drops the packed copies of `model`; returns their bytes. Banks may pack themselves again."""
    freed = packed_weight_bytes(model)
    for module in model.modules():
        invalidate(module)
    return freed


def packed_weight_bytes(model: nn.Module | None = None) -> int:
    """Bytes of the packed copies of `model`'s banks, those begun included; of all without one."""
    return sum(state.num_bytes for state in states(model))


def packing_settings() -> tuple[str, int]:
    """The policy, and the budget in bytes at this moment."""
    policy, max_bytes = current_settings()
    if max_bytes is None:
        max_bytes = budget(packed_weight_bytes())
    return policy, max_bytes
