"""Switching of a live model to moe_ops and back."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from torch import nn
from transformers.integrations.moe import ExpertsInterface

from moe_ops.expert_weights.packing import invalidate
from moe_ops.hf.experts.placed import is_placed, set_placed
from moe_ops.hf.models.known import own_class
from moe_ops.quant.config import check_model

# Blocks outside transformers' experts interface, and the module with their subclass.
_BLOCKS = {
    "transformers.models.dbrx.modeling_dbrx.DbrxExperts": "moe_ops.hf.experts.dbrx",
    "transformers.models.jetmoe.modeling_jetmoe.JetMoeAttention": (
        "moe_ops.hf.experts.jetmoe_attention"
    ),
    "transformers.models.jetmoe.modeling_jetmoe.JetMoeMoE": "moe_ops.hf.experts.jetmoe",
    "transformers.models.llama4.modeling_llama4.Llama4TextMoe": "moe_ops.hf.experts.llama4",
    "transformers.models.longcat_flash.modeling_longcat_flash.LongcatFlashExperts": (
        "moe_ops.hf.experts.longcat"
    ),
}
# Inner modules that the new forwards call like the original ones.
_CALLED = ("router", "shared_expert", "experts.router", "kv_proj")
_PREVIOUS = "_moe_ops_previous_implementation"


def enable(model: nn.Module) -> dict[str, str]:
    """Switches every MoE block of `model` to moe_ops, in place.

    Modules on transformers' experts interface get ``"moe_ops"`` as their implementation. JetMoE's
    feed-forward and attention experts, DBRX's and LongCat-Flash's experts and Llama 4's block get a
    subclass with another forward. Parameters, buffers, names and the state dict do not change, so
    optimizers and checkpoints remain valid. Call it before the model is compiled, sharded or given
    accelerate hooks.

    Args:
        model: a transformers model or any module with MoE blocks of one.

    Returns:
        Name of each block that now runs on moe_ops -> method: ``"experts_implementation"``,
        ``"forward"``, ``"quantized"`` for experts of `moe_ops.quantize`, or ``"offloaded"``
        for experts of `moe_ops.offload`, which always run on moe_ops. Blocks that were already
        switched are included.

    Raises:
        ValueError: nothing to switch, or a block that cannot be switched; the model is unchanged.
    """
    check_model("enable", model)
    on_interface: list[nn.Module] = []
    by_class: list[tuple[nn.Module, ModuleType]] = []
    report: dict[str, str] = {}
    refused: list[str] = []
    for name, module in model.named_modules():
        interface = interface_of(module)
        if is_quantized(module):
            report[name] = "offloaded" if module.format_name == "offloaded" else "quantized"
        elif interface is not None:
            if "moe_ops" not in interface:
                refused.append(f"{name} ({type(module).__name__}) has quantized experts")
                continue
            if _config(module)._experts_implementation == "deepgemm_megamoe":
                raise ValueError(
                    f"moe_ops.hf.enable: {name} must not use deepgemm_megamoe, which has already "
                    "changed the layout of its weights; load the model with "
                    'experts_implementation="moe_ops".'
                )
            on_interface.append(module)
            report[name] = "experts_implementation"
        elif _is_switched(module):
            report[name] = "forward"
        elif (where := _BLOCKS.get(_path(type(module)))) is not None:
            _check_hooks(name, module)
            by_class.append((module, importlib.import_module(where)))
            report[name] = "forward"
    if not report:
        raise ValueError(
            f"moe_ops.hf.enable: {type(model).__name__} holds no MoE block that moe_ops can run"
            + (f" ({'; '.join(refused)})." if refused else ".")
        )

    # All are read before one is set: the layers of a model share one config.
    previous = [_config(module)._experts_implementation for module in on_interface]
    for module, implementation in zip(on_interface, previous, strict=True):
        if implementation != "moe_ops":
            setattr(module, _PREVIOUS, implementation)
            set_implementation(module, "moe_ops")
    for module, blocks in by_class:
        _set_class(module, blocks.Block)
        for part, part_class in getattr(blocks, "PARTS", {}).items():
            module.get_submodule(part).__class__ = part_class
    return report


def disable(model: nn.Module) -> dict[str, str]:
    """Undoes :func:`enable`.

    Blocks loaded with ``experts_implementation="moe_ops"`` get transformers' default,
    ``"grouped_mm"``; others their previous implementation. Quantized blocks are unchanged.

    Returns:
        Name of each block that no longer runs on moe_ops -> its implementation (``"forward"`` for a
        block with its original forward). Empty if none ran on moe_ops.
    """
    report = {}
    for name, module in model.named_modules():
        invalidate(module)
        if _is_switched(module):
            for submodule in module.modules():
                _set_class(submodule, getattr(type(submodule), "replaces", type(submodule)))
            report[name] = "forward"
        elif interface_of(module) is not None:
            previous = module.__dict__.pop(_PREVIOUS, "grouped_mm")
            if status_of(module) == "moe_ops":
                report[name] = previous
    for name, module in model.named_modules():
        if name in report and report[name] != "forward":
            set_implementation(module, report[name])
    return report


def status(model: nn.Module) -> dict[str, str]:
    """Returns the current implementation of each MoE block, by name.

    It is ``"moe_ops"``; for quantized experts ``"moe_ops (int4 g64)"`` or similar, and ``"moe_ops
    (offloaded)"``; another experts implementation; or ``"transformers"`` for a block outside the
    experts interface, which silently ignores ``experts_implementation="moe_ops"``.
    """
    blocks = ((name, status_of(module)) for name, module in model.named_modules())
    return {name: state for name, state in blocks if state is not None}


def status_of(module: nn.Module) -> str | None:
    """Returns the entry of :func:`status` for one module; None for other modules than MoE
    blocks."""
    if is_quantized(module):
        return f"moe_ops ({module.format_name})"
    if _is_switched(module):
        return "moe_ops"
    if interface_of(module) is not None:
        return _config(module)._experts_implementation or "eager"
    return "transformers" if _path(type(module)) in _BLOCKS else None


@contextlib.contextmanager
def assert_used(model: nn.Module) -> Iterator[dict[str, int]]:
    """Verifies that moe_ops really runs: counts the calls of each switched block inside the
    context.

    Yields:
        Name of each block on moe_ops -> number of its calls so far.

    Raises:
        RuntimeError: no block of `model` is on moe_ops, or none was called by the end.
    """
    calls = {name: 0 for name, state in status(model).items() if state.startswith("moe_ops")}
    if not calls:
        raise RuntimeError(
            f"moe_ops.hf.assert_used: no block of {type(model).__name__} is on moe_ops (a model "
            'outside the experts interface ignores experts_implementation="moe_ops"); call '
            "moe_ops.hf.enable(model)."
        )

    def counter(name: str):
        def hook(module, args):
            calls[name] += 1

        return hook

    handles = [model.get_submodule(n).register_forward_pre_hook(counter(n)) for n in calls]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
    if not any(calls.values()):
        raise RuntimeError(
            f"moe_ops.hf.assert_used: none of the {len(calls)} blocks of {type(model).__name__} "
            "on moe_ops was called; something else replaced the forward around them."
        )


def is_quantized(module: nn.Module) -> bool:
    """Returns whether `moe_ops.quantize` or `moe_ops.offload` made this block."""
    return getattr(type(module), "quantized_block", False)


def interface_of(module: nn.Module) -> ExpertsInterface | None:
    """Returns the registry in which the forward of a decorated class looks up its
    implementation."""
    cls: Any = own_class(type(module))
    for cell in getattr(cls.forward, "__closure__", None) or ():
        if isinstance(cell.cell_contents, ExpertsInterface):
            return cell.cell_contents
    return None


def _config(module: nn.Module) -> Any:
    return module.config


def set_implementation(module: nn.Module, implementation: str | None) -> None:
    # A dict with an empty key leaves sub-configs unchanged.
    _config(module)._experts_implementation = {"": implementation}


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _is_switched(module: nn.Module) -> bool:
    # The submodules of a block have subclasses of moe_ops too, but only the block matches an HF
    # class.
    replaced = getattr(type(module), "replaces", None)
    return isinstance(replaced, type) and _path(replaced) in _BLOCKS


def _set_class(module: nn.Module, cls: type) -> None:
    held = is_placed(module)
    module.__class__ = cls
    if held:
        set_placed(module)


def _check_hooks(name: str, module: nn.Module) -> None:
    if "forward" in module.__dict__:
        raise ValueError(
            f"moe_ops.hf.enable: {name} must have its class's forward, got one set on the module "
            "(by accelerate or kernels, for instance); call enable before them."
        )
    # The new forward reads the parameters of inner modules without calling them.
    for child_name, child in module.named_modules():
        called = child is module or child_name.startswith(_CALLED)
        called = called or next(child.parameters(), None) is None
        if not called and (child._forward_hooks or child._forward_pre_hooks):
            raise ValueError(
                f"moe_ops.hf.enable: {name}.{child_name} must have no forward hooks, got some "
                "(from tensor parallelism or accelerate, for instance); they would never run."
            )
