"""User interface for packed copies of expert weights for inference.

:mod:`moe_ops.expert_weights.packing` documents when copies are used and dropped.
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
    """Sets when experts pack their weights automatically, for the whole process.

    Experts can be packed automatically in `eval()`, in calls without gradients, on the CPU. Experts
    packed by `pack_weights` keep their copies under every policy.

    Args:
        policy: "auto": experts with at least 1 MiB of weights are packed once their unchanged
            weights have processed enough rows that packing would have paid off (1024 per expert,
            counting at most 16 per expert and call), if the copy fits into the budget: 32 MiB per
            call, one module at a time. Never while `torch.use_deterministic_algorithms` is on,
            because results change by rounding at the call that completes the copy. "off": no
            automatic packing; automatic copies are dropped. "always": experts are packed at their
            first such call, without a budget unless `max_bytes` is given. None keeps the policy.
        max_bytes: budget of all copies together; None is a quarter of the memory that is available
            without them, at the time of packing.

    As a context manager it restores the old settings at the end. Initial settings come from
    ``MOE_OPS_PACKING`` (a policy, default "auto") and ``MOE_OPS_PACKING_MB`` (a budget in MiB).

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

    The copies take about the memory of the weights once more. They are used in calls without
    gradients, and dropped when the weights change, at `train()`, or by :func:`unpack_weights`.

    Args:
        model: a module with `moe_ops.layers.Experts`, or blocks of transformers that run on
            moe_ops.

    Quantized experts are skipped with a warning: their kernels read the stored weights directly. So
    do all CUDA kernels: experts on CUDA are skipped. A model that moves to CUDA loses its copies.

    Returns:
        Bytes of the copies of `model`; 0 on CUDA.

    Raises:
        ValueError: no experts, or weights that cannot be packed: on another device, of a tensor
            subclass (such as sharded ones), or made in inference mode (such tensors have no version
            counter).
    """
    found = ((name, m, packable_weights(m)) for name, m in model.named_modules())
    banks = [(name, m, weights) for name, m, weights in found if weights is not None]
    quantized = sum(map(is_quantized, model.modules()))
    if quantized:
        warnings.warn(
            f"pack_weights: skipped {quantized} bank{'s' if quantized > 1 else ''} of quantized "
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
    """Drops the packed copies of `model`; returns their bytes. Automatic packing may pack them
    again."""
    freed = packed_weight_bytes(model)
    for module in model.modules():
        invalidate(module)
    return freed


def packed_weight_bytes(model: nn.Module | None = None) -> int:
    """Returns the bytes of packed copies, including those in progress, of `model` or of all modules
    if it is None."""
    return sum(state.num_bytes for state in states(model))


def packing_settings() -> tuple[str, int]:
    """Returns the policy, and the current budget in bytes."""
    policy, max_bytes = current_settings()
    if max_bytes is None:
        max_bytes = budget(packed_weight_bytes())
    return policy, max_bytes
