"""One GPU and CPU memory: experts on the CPU, the rest of a model on the GPU."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from moe_ops._sharded import is_sharded
from moe_ops.hf.decode.optimize import is_optimized
from moe_ops.hf.experts.cached import set_cached
from moe_ops.hf.experts.placed import is_placed, run_ahead, set_placed, unset_placed
from moe_ops.hf.experts.streamed import set_streamed
from moe_ops.hf.experts.switch import enable, is_quantized, status
from moe_ops.hf.models.known import Unknown, find
from moe_ops.quant import WeightConfig, quantize
from moe_ops.quant.config import check_config, check_model

__all__ = ["place", "unplace"]

# Attributes with the weights of blocks that also contain the router, by class of transformers. The
# experts of JetMoE's attention stay with the attention.
_WEIGHTS = {
    "JetMoeAttention": (),
    "JetMoeMoE": ("input_linear", "output_linear"),
    "Llama4TextMoe": ("experts",),
}


def place(
    model: nn.Module,
    dense: torch.device | str = "cuda",
    *,
    experts: torch.device | str = "cpu",
    layers: Sequence[str] | str | None = None,
    quantization: WeightConfig | None = None,
    stream_min_tokens: int | None = None,
    cached_experts: int | None = None,
) -> dict[str, str]:
    """Keeps the experts of a transformers model on the CPU and moves the rest to a GPU, in place.

    Experts run on moe_ops (:func:`moe_ops.hf.enable`), where their weights are: a call copies its
    tokens and routing to the CPU and its result back, in both directions of autograd. With
    `stream_min_tokens`, calls with many tokens instead copy the weights to the GPU. Later calls of
    `.to`, `.cuda` and the like move the rest of the model only; dtypes change everywhere.
    Parameters, their names and checkpoints do not change, but for `quantization`.

    Call it before :func:`moe_ops.hf.optimize`, and on a model that was loaded into CPU memory,
    without `device_map`. Adapters of peft may be added before or after it. Those on experts are
    computed and stay on the CPU, too; import peft or `moe_ops.hf.lora` before the call.

    Args:
        model: a transformers model, or any module with MoE blocks of one.
        dense: device of everything but experts: CUDA or the CPU. On the CPU, calls of experts copy
            their tensors too, as a GPU would need it.
        experts: device of experts; only the CPU.
        layers: shell patterns of the names of MoE blocks, as `enable` returns them, whose experts
            stay on the CPU; other experts go to `dense`. None: all.
        quantization: `moe_ops.quant.Int8WeightConfig()` or another config for the experts that stay
            on the CPU; None leaves their weights as they are, float or quantized.

        stream_min_tokens: number of tokens from which on a call copies the experts to `dense`; None
            is never.
        cached_experts: N, number of experts per layer with a copy on `dense`, at least 1; larger
            values than E mean E. Calls without gradients that are not streamed compute those
            experts there, and the others on the CPU, which then take the slots that were used least
            recently. None caches nothing.

    Returns:
        Name of each MoE block -> device of its experts.

    Raises:
        ValueError: an argument of another kind; a pattern that matches no block; a model on the
            meta device, with hooks of accelerate, sharded, offloaded, or optimized already; models
            that `enable` and `quantize` reject.
    """
    device = check_options("place", dense, experts, quantization, stream_min_tokens, cached_experts)
    _check_model(model)
    placed, others = matching_blocks(model, layers)
    called = [n for n in placed if quantization or _is_called(model.get_submodule(n))]
    for option, value, done in (
        ("stream_min_tokens", stream_min_tokens, "streamed"),
        ("cached_experts", cached_experts, "cached"),
    ):
        if value is not None and not called:
            raise ValueError(
                f"place: {option} must be None for a model without experts that can be {done}, "
                f"got {value}; quantize them."
            )
    blocks = enable(model)
    if quantization is not None:
        for name in placed:
            for bank in _banks(model.get_submodule(name)):
                bank.cpu()  # Quantized experts are on the device of the float ones.
        quantize(model, quantization, skip=others)
    banks = [bank for name in placed for bank in _banks(model.get_submodule(name))]
    module: Any
    for module in model.modules():
        if _base(module) in banks:
            module.cpu()  # With its adapters, if it is a wrapper of peft.
    for bank in banks:
        set_placed(bank)
    for module in list(model.modules()):
        shared = _shared_experts(module)
        if shared is not None and is_placed(_base(module.experts)):
            run_ahead(_base(module.experts), shared)
    if "peft" in sys.modules:
        importlib.import_module("moe_ops.hf.lora")  # Keeps adapters beside their experts.
    model.to(device)
    model.__dict__.pop("hf_device_map", None)
    set_streamed(banks, device.type, None)
    set_cached(banks, device.type, None)
    chosen = [bank for name in called for bank in _banks(model.get_submodule(name))]
    set_streamed(chosen, device.type, stream_min_tokens)
    set_cached(chosen, device.type, cached_experts)
    where = "cpu"
    if stream_min_tokens is not None:
        where += f", {device} from {stream_min_tokens} tokens"
    if cached_experts is not None:
        where += f", {cached_experts} experts cached on {device}"
    found = {name: "cpu" if name in placed else str(device) for name in blocks}
    return found | dict.fromkeys(called, where)


def unplace(model: nn.Module, device: torch.device | str = "cpu") -> dict[str, str]:
    """Undoes :func:`place`: moves the whole model to one device, in place.

    Experts get their former classes back, and `.to`, `.cuda` and the like move them again. They
    stay on moe_ops until :func:`moe_ops.hf.disable`, and stay quantized if they are. Adapters of
    peft move along. The state of an optimizer stays where it is: load its `state_dict` again.

    Args:
        model: a model that `place` or `load_placed` returned or changed.
        device: CUDA or the CPU. If its memory is too small, torch's error leaves a part of the
            model there, and `model.to("cpu")` moves all of it back.

    Returns:
        Name of each MoE block whose experts were placed -> their device.

    Raises:
        ValueError: another device; a model without placed experts, one that is optimized, or one
            whose experts got another class since, for instance by parametrizations. The model is
            unchanged.
    """
    target = _device("unplace", "device", device, ("cuda", "cpu"))
    named = model.named_modules() if isinstance(model, nn.Module) else ()
    banks = {module: name for name, module in named if is_placed(module)}
    if not banks:
        raise ValueError(
            f"unplace: model must have experts that place put on the CPU, got {model!r:.80}."
        )
    if is_optimized(model):
        raise ValueError("unplace: model must not be optimized; call restore first.")
    for bank, name in banks.items():
        if not is_placed(bank, itself=True):
            raise ValueError(
                f"unplace: {name} must have the class that place gave it, got one derived from it; "
                "remove parametrizations first."
            )
    set_streamed(list(banks), target.type, None)
    set_cached(list(banks), target.type, None)
    for bank in banks:
        unset_placed(bank)
    model.to(target)
    blocks = (n for n in status(model) if banks.keys() & _banks(model.get_submodule(n)))
    return dict.fromkeys(blocks, str(target))


def check_options(
    op: str,
    dense: Any,
    experts: Any,
    quantization: Any,
    stream_min_tokens: Any,
    cached_experts: Any,
) -> torch.device:
    """Returns the device of everything but experts.

    Raises:
        ValueError: options that `place` does not take, in a sentence of `op`.
    """
    _device(op, "experts", experts, ("cpu",))
    device = _device(op, "dense", dense, ("cuda", "cpu"))
    if quantization is not None:
        check_config(op, quantization)
    for name, number in (
        ("stream_min_tokens", stream_min_tokens),
        ("cached_experts", cached_experts),
    ):
        if number is not None and (type(number) is not int or number < 1):
            raise ValueError(f"{op}: {name} must be None or at least 1, got {number!r}.")
    return device


def _check_model(model: Any) -> None:
    check_model("place", model)
    if is_optimized(model):
        raise ValueError("place: model must not be optimized yet; call restore, place, optimize.")
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise ValueError(
            "place: model must have no hooks of accelerate, got some; load it without device_map."
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_sharded(tensor) or tensor.is_meta:
            what = "a meta tensor" if tensor.is_meta else "a DTensor"
            raise ValueError(f"place: model must be whole and in memory, got {what} as {name}.")
    for name, state in status(model).items():
        if state == "moe_ops (offloaded)":
            raise ValueError(f"place: experts must be in memory, got offloaded ones as {name}.")
        if getattr(model.get_submodule(name), "dispatcher", None) is not None:
            raise ValueError(f"place: experts must be in one process, got sharded ones as {name}.")


def _device(op: str, argument: str, value: Any, kinds: tuple[str, ...]) -> torch.device:
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError):
        device = torch.device("meta")
    if device.type not in kinds:
        raise ValueError(f"{op}: {argument} must be {' or '.join(kinds)}, got {value!r}.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"{op}: {argument} must be a CUDA device that torch sees, got {str(value)!r} with "
            f"{torch.cuda.device_count()} devices."
        )
    return device


def matching_blocks(model: nn.Module, layers: Any) -> tuple[list[str], list[str]]:
    """Returns the names of the blocks whose experts stay on the CPU, and of the others.

    Raises:
        ValueError: `layers` is no pattern, or one that matches no block.
    """
    found = [name for name in status(model) if _banks(model.get_submodule(name))]
    if layers is None or not found:
        return found, []
    patterns = (layers,) if isinstance(layers, str) else tuple(layers)
    for pattern in patterns:
        if not isinstance(pattern, str) or not any(fnmatchcase(name, pattern) for name in found):
            raise ValueError(
                f"place: layers must be patterns of the names of MoE blocks, as {found[0]!r}, got "
                f"{pattern!r}, which matches none."
            )
    placed = [name for name in found if any(fnmatchcase(name, p) for p in patterns)]
    return placed, [name for name in found if name not in placed]


def bank_tensors(block: nn.Module) -> list[Tensor]:
    """Returns the tensors of a block's experts that `place` keeps on the CPU."""
    return [t for bank in _banks(block) for t in (*bank.parameters(), *bank.buffers())]


def _shared_experts(block: Any) -> nn.Module | None:
    """Returns the shared experts of a block whose output is known to be a sum with theirs."""
    try:
        name = find("block", block).shared_of(block)
    except Unknown:
        return None
    return None if name is None else block.get_submodule(name)


def _base(module: Any) -> nn.Module:
    """Returns the module inside the wrappers of peft."""
    base: nn.Module = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    return base


def _is_called(block: nn.Module) -> bool:
    """Returns whether a block's experts are called, instead of only their weights read."""
    return is_quantized(block) or not any(cls.__name__ in _WEIGHTS for cls in type(block).__mro__)


def _banks(block: nn.Module) -> list[nn.Module]:
    """Returns the modules of an MoE block that contain expert weights and nothing else."""
    for cls in type(block).__mro__:
        if (names := _WEIGHTS.get(cls.__name__)) is not None:
            if names and is_quantized(block):
                names = ("experts",)
            return [block.get_submodule(name) for name in names]
    return [block]
