"""Parameters, FLOPs and saved activations, counted on the meta device without memory.

FLOPs are those of matrix multiplications and convolutions; a multiply-add counts as two. Attention
counts as if all keys were attended to, also where it is causal. Routed experts count by slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .claims import Claim, Runs


def example(module: Any, lead: tuple[int, ...], **where: Any) -> Tensor:
    """Returns a random input of a module for a scene's leading dimensions."""
    shape = (module.rows * lead[0], *lead[1:], *module.features)
    return torch.randn(shape, **where)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def flops(module: nn.Module, lead: tuple[int, ...]) -> int:
    """Returns the FLOPs of a forward pass; the module must be on the meta device."""
    x = example(module, lead, device="meta", dtype=next(module.parameters()).dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(x)
    return counter.get_total_flops()


def saved_bytes(module: nn.Module, lead: tuple[int, ...]) -> int:
    """Returns the bytes that a training forward pass saves for backward, without parameters.

    Each storage counts once, also the input. The module must be on the meta device.
    """
    weights = {p.untyped_storage()._cdata for p in module.parameters()}
    held: dict[int, tuple[int, Any]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            held[storage._cdata] = (storage.nbytes(), storage)
        return tensor

    x = example(module, lead, device="meta", dtype=next(module.parameters()).dtype)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module.train()(x.requires_grad_())
    del out
    module.eval()
    return sum(size for size, _ in held.values())


def total(runs: Runs, of: Mapping[str, float]) -> float:
    return sum(count * of[name] for count, name in runs)


def count(claim: Claim) -> dict[str, Any]:
    """Returns everything that is counted of a claim, by arm.

    Each arm has "parameters", "weights" in bytes, and by scene the "flops" of a forward pass and,
    in measured scenes, the "saved" bytes of activations.
    """
    with torch.device("meta"):
        modules = claim.build()
    for module in modules.values():
        module.to(claim.dtype)
    sizes = {name: parameters(m) for name, m in modules.items()}
    scenes = {**claim.scenes, **claim.counted_scenes}
    found: dict[str, Any] = {}
    for name, arm in claim.arms.items():
        held = round(total(arm.holds or arm.runs, sizes))
        runs = arm.counted or arm.runs
        names = {run for _, run in runs}
        found[name] = {"parameters": held, "weights": held * claim.dtype.itemsize}
        found[name]["flops"] = {
            scene: round(total(runs, {n: flops(modules[n], lead) for n in names}))
            for scene, lead in scenes.items()
        }
        found[name]["saved"] = {
            scene: round(total(runs, {n: saved_bytes(modules[n], lead) for n in names}))
            for scene, lead in claim.scenes.items()
        }
    return found
